// Attention's tiles with SIMD group matrices of 8 x 8. A SIMD group has 8 rows of a block, of which a row's elements are
// shared by four lanes outside of products. Tiles are float32 in threadgroup memory, rows D + 4 apart.

template <typename T, uint D, uint THREADS, typename Source>
inline void load_floats(threadgroup float* tile, Source source, uint base, uint stride, uint first, uint count,
                        uint rows, uint lid) {
  for (uint i = lid; i < rows * D; i += THREADS) {
    const uint row = i / D;
    const uint column = i % D;
    float value = 0.0f;
    if (first + row < count) {
      value = static_cast<float>(source[base + (first + row) * stride + column]);
    }
    tile[row * (D + 4) + column] = value;
  }
}

// The 8 rows of a SIMD group at `tile`.
template <uint D>
inline void load_rows(const threadgroup float* tile, thread simdgroup_float8x8 (&rows)[D / 8]) {
  for (uint d = 0; d < D / 8; ++d) {
    simdgroup_load(rows[d], tile + 8 * d, D + 4);
  }
}

template <uint D>
inline void clear_rows(thread simdgroup_float8x8 (&rows)[D / 8]) {
  for (uint d = 0; d < D / 8; ++d) {
    rows[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

// The products of 8 rows with the COLS rows of a tile, to `products`, rows COLS + 4 apart.
template <uint D, uint COLS>
inline void matrix_products(const thread simdgroup_float8x8 (&rows)[D / 8], const threadgroup float* tile,
                            threadgroup float* products) {
  for (uint c = 0; c < COLS; c += 8) {
    simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint d = 0; d < D / 8; ++d) {
      simdgroup_float8x8 right;
      simdgroup_load(right, tile + c * (D + 4) + 8 * d, D + 4, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(sum, rows[d], right, sum);
    }
    simdgroup_store(sum, products + c, COLS + 4);
  }
}

// sums += weights (8 rows, COLS + 4 apart) times the COLS rows of a tile.
template <uint D, uint COLS>
inline void add_products(const threadgroup float* weights, const threadgroup float* tile,
                         thread simdgroup_float8x8 (&sums)[D / 8]) {
  for (uint c = 0; c < COLS; c += 8) {
    simdgroup_float8x8 left;
    simdgroup_load(left, weights + c, COLS + 4);
    for (uint d = 0; d < D / 8; ++d) {
      simdgroup_float8x8 right;
      simdgroup_load(right, tile + c * (D + 4) + 8 * d, D + 4);
      simdgroup_multiply_accumulate(sums[d], left, right, sums[d]);
    }
  }
}

// Each of 8 rows times its element of the diagonal matrix in threadgroup memory.
template <uint D>
inline void scale_rows(const threadgroup float* diagonal, thread simdgroup_float8x8 (&rows)[D / 8]) {
  simdgroup_float8x8 factors;
  simdgroup_load(factors, diagonal, 8);
  for (uint d = 0; d < D / 8; ++d) {
    simdgroup_float8x8 scaled;
    simdgroup_multiply(scaled, factors, rows[d]);
    rows[d] = scaled;
  }
}

// The 8 rows of a SIMD group to memory, by way of `tile`, those below `count`.
template <typename T, uint D, typename Target>
inline void store_rows(threadgroup float* tile, Target target, uint base, uint stride, uint first, uint count,
                       uint lane, const thread simdgroup_float8x8 (&rows)[D / 8]) {
  for (uint d = 0; d < D / 8; ++d) {
    simdgroup_store(rows[d], tile + 8 * d, D + 4);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = lane; i < 8 * D; i += 32) {
    if (first + i / D < count) {
      target[base + (first + i / D) * stride + i % D] = static_cast<T>(tile[i / D * (D + 4) + i % D]);
    }
  }
}

// Over the four lanes that share a row.
inline float quad_add(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(2));
}

inline float quad_most(float value) {
  value = metal::max(value, simd_shuffle_xor(value, ushort(1)));
  return metal::max(value, simd_shuffle_xor(value, ushort(2)));
}
