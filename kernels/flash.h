// Tiles of attention's kernels. A tile holds rows of D values in threadgroup memory, D + 1 apart, so that a column's
// values lie in different banks. 16 lanes share four rows of a block; a lane has every 16th column of them.

template <typename T, uint D, uint THREADS, typename Tile, typename Source>
inline void load_tile(Tile tile, Source source, uint base, uint stride, uint first, uint count, uint rows, uint lid) {
  for (uint i = lid; i < rows * D; i += THREADS) {
    const uint row = i / D;
    const uint column = i % D;
    T value = static_cast<T>(0.0f);
    if (first + row < count) {
      value = source[base + (first + row) * stride + column];
    }
    tile[row * (D + 1) + column] = value;
  }
}

// products[i][j] = row i of a lane's four (from a_row) of tile a times row lane + 16 j of tile b, over D.
template <uint D, uint C, typename A, typename B>
inline void tile_products(A a, B b, uint a_row, uint lane, thread float (&products)[4][C]) {
  for (uint i = 0; i < 4; ++i) {
    for (uint j = 0; j < C; ++j) {
      products[i][j] = 0.0f;
    }
  }
  for (uint d = 0; d < D; ++d) {
    float right[C];
    for (uint j = 0; j < C; ++j) {
      right[j] = static_cast<float>(b[(lane + 16 * j) * (D + 1) + d]);
    }
    for (uint i = 0; i < 4; ++i) {
      const float left = static_cast<float>(a[(a_row + i) * (D + 1) + d]);
      for (uint j = 0; j < C; ++j) {
        products[i][j] = metal::fma(left, right[j], products[i][j]);
      }
    }
  }
}

// sums[i][j] += weights of row a_row + i times column lane + 16 j of the tile, over its COLS rows. Columns behind the
// last repeat it and are not written by who called.
template <uint D, uint COLS, uint W, typename Weights, typename Tile>
inline void add_rows(Weights weights, Tile tile, uint a_row, uint lane, thread float (&sums)[4][W]) {
  for (uint c = 0; c < COLS; ++c) {
    float right[W];
    for (uint j = 0; j < W; ++j) {
      right[j] = static_cast<float>(tile[c * (D + 1) + metal::min(lane + 16 * j, D - 1)]);
    }
    for (uint i = 0; i < 4; ++i) {
      const float left = weights[(a_row + i) * (COLS + 1) + c];
      for (uint j = 0; j < W; ++j) {
        sums[i][j] = metal::fma(left, right[j], sums[i][j]);
      }
    }
  }
}

// Over the 16 lanes that share a row.
inline float row_sum(float value) {
  for (ushort away = 8; away > 0; away /= 2) {
    value += simd_shuffle_xor(value, away);
  }
  return value;
}

inline float row_max(float value) {
  for (ushort away = 8; away > 0; away /= 2) {
    value = metal::max(value, simd_shuffle_xor(value, away));
  }
  return value;
}
