// flash_attention_keys with SIMD group matrices; D a multiple of 8. Inputs, outputs, template and bytes as there.
threadgroup float tiles[2 * COLS * (D + 4)];
threadgroup float scores[ROWS * (COLS + 4)];
threadgroup float wished[ROWS * (COLS + 4)];
threadgroup float totals[COLS];
threadgroup float alongs[COLS];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint mine = simdgroup_index_in_threadgroup * 8;
const uint own = mine + lane / 4;
const uint first = threadgroup_position_in_grid.x * ROWS;
const uint head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const uint heads = uint(q_shape[2]);
const uint kv_heads = uint(k_shape[2]);
const uint rows = uint(k_shape[1]);
const uint stop = uint(lengths[2 * batch + 1]);
const uint q_base = (batch * uint(q_shape[1]) * heads + head) * D;
const uint k_base = (batch * rows * kv_heads + head / (heads / kv_heads)) * D;
const uint s_base = (batch * heads + head) * uint(q_shape[1]);
const uint d_base = (batch * rows * heads + head) * D;
const uint columns = first < stop ? uint(lengths[2 * batch]) : 0;
const float scale = constants[0];
simdgroup_float8x8 keys[D / 8];
simdgroup_float8x8 values[D / 8];
simdgroup_float8x8 key_sums[D / 8];
simdgroup_float8x8 value_sums[D / 8];
clear_rows<D>(keys);
clear_rows<D>(values);
clear_rows<D>(key_sums);
clear_rows<D>(value_sums);
if (columns > 0) {
  for (uint part = 0; part < ROWS; part += 2 * COLS) {
    const uint count = metal::min(uint(2 * COLS), ROWS - part);
    const bool here = mine / (2 * COLS) * (2 * COLS) == part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_floats<T, D, 4 * ROWS>(tiles, k, k_base, kv_heads * D, first + part, stop, count, lid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (here) {
      load_rows<D>(tiles + (mine - part) * (D + 4), keys);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_floats<T, D, 4 * ROWS>(tiles, v, k_base, kv_heads * D, first + part, stop, count, lid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (here) {
      load_rows<D>(tiles + (mine - part) * (D + 4), values);
    }
  }
}
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_floats<T, D, 4 * ROWS>(tiles, q, q_base, heads * D, start, columns, COLS, lid);
  load_floats<T, D, 4 * ROWS>(tiles + COLS * (D + 4), cotangent, q_base, heads * D, start, columns, COLS, lid);
  if (lid < COLS && start + lid < columns) {
    totals[lid] = sums[s_base + start + lid];
    alongs[lid] = deltas[s_base + start + lid];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  matrix_products<D, COLS>(keys, tiles, scores + mine * (COLS + 4));
  matrix_products<D, COLS>(values, tiles + COLS * (D + 4), wished + mine * (COLS + 4));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < COLS / 4; ++j) {
    const uint column = lane % 4 + 4 * j;
    const uint i = own * (COLS + 4) + column;
    float weight = 0.0f;
    float slope = 0.0f;
    if (first + own < stop && start + column < columns) {
      weight = metal::exp(scores[i] * scale - totals[column]);
      slope = weight * (wished[i] - alongs[column]) * scale;
    }
    scores[i] = weight;
    wished[i] = slope;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  add_products<D, COLS>(scores + mine * (COLS + 4), tiles + COLS * (D + 4), value_sums);
  add_products<D, COLS>(wished + mine * (COLS + 4), tiles, key_sums);
}
for (uint part = 0; part < ROWS; part += 2 * COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (mine / (2 * COLS) * (2 * COLS) == part) {
    threadgroup float* tile = tiles + (mine - part) * (D + 4);
    store_rows<S, D>(tile, d_k, d_base, heads * D, first + mine, rows, lane, key_sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    store_rows<S, D>(tile, d_v, d_base, heads * D, first + mine, rows, lane, value_sums);
  }
}
