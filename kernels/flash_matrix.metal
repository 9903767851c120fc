// flash_attention with SIMD group matrices; D a multiple of 8. Inputs, outputs, template and bytes as flash_attention's;
// 4 * ROWS threads, ROWS a multiple of 2 * COLS or COLS. Grid: groups of ROWS queries in x, heads in y, rows of the batch in z.
threadgroup float tiles[2 * COLS * (D + 4)];
threadgroup float scores[ROWS * (COLS + 4)];
threadgroup float diagonals[ROWS * 8];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint mine = simd * 8;
const uint own = mine + lane / 4;
const uint first = threadgroup_position_in_grid.x * ROWS;
const uint head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const uint heads = uint(q_shape[2]);
const uint kv_heads = uint(k_shape[2]);
const uint rows = uint(q_shape[1]);
const uint stop = uint(lengths[2 * batch]);
const uint q_base = (batch * rows * heads + head) * D;
const uint k_base = (batch * uint(k_shape[1]) * kv_heads + head / (heads / kv_heads)) * D;
const uint columns = first < stop ? uint(lengths[2 * batch + 1]) : 0;
const float scale = constants[0];
float best = -3e38f;
float total = 0.0f;
simdgroup_float8x8 left[D / 8];
simdgroup_float8x8 made[D / 8];
clear_rows<D>(left);
clear_rows<D>(made);
for (uint i = lane; i < 64; i += 32) {
  diagonals[simd * 64 + i] = 0.0f;
}
if (columns > 0) {
  for (uint part = 0; part < ROWS; part += 2 * COLS) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_floats<T, D, 4 * ROWS>(tiles, q, q_base, heads * D, first + part, stop, metal::min(uint(2 * COLS), ROWS - part), lid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (mine / (2 * COLS) * (2 * COLS) == part) {
      load_rows<D>(tiles + (mine - part) * (D + 4), left);
    }
  }
}
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_floats<T, D, 4 * ROWS>(tiles, k, k_base, kv_heads * D, start, columns, COLS, lid);
  load_floats<T, D, 4 * ROWS>(tiles + COLS * (D + 4), v, k_base, kv_heads * D, start, columns, COLS, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  matrix_products<D, COLS>(left, tiles, scores + mine * (COLS + 4));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float weights[COLS / 4];
  float most = best;
  for (uint j = 0; j < COLS / 4; ++j) {
    const uint column = lane % 4 + 4 * j;
    weights[j] = start + column < columns ? scores[own * (COLS + 4) + column] * scale : -3e38f;
    most = metal::max(most, weights[j]);
  }
  most = quad_most(most);
  const float shrink = metal::exp(best - most);
  best = most;
  total *= shrink;
  for (uint j = 0; j < COLS / 4; ++j) {
    const float weight = metal::exp(weights[j] - most);
    total += weight;
    scores[own * (COLS + 4) + lane % 4 + 4 * j] = weight;
  }
  if (lane % 4 == 0) {
    diagonals[simd * 64 + lane / 4 * 9] = shrink;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (simd_max(1.0f - shrink) > 0.0f) {
    scale_rows<D>(diagonals + simd * 64, made);
  }
  add_products<D, COLS>(scores + mine * (COLS + 4), tiles + COLS * (D + 4), made);
}
total = quad_add(total);
const bool counts = first + own < stop && total > 0.0f;
simdgroup_barrier(mem_flags::mem_threadgroup);
if (lane % 4 == 0) {
  diagonals[simd * 64 + lane / 4 * 9] = counts ? 1.0f / total : 0.0f;
  if (first + own < rows) {
    sums[(batch * heads + head) * rows + first + own] = counts ? best + metal::log(total) : 0.0f;
  }
}
simdgroup_barrier(mem_flags::mem_threadgroup);
scale_rows<D>(diagonals + simd * 64, made);
for (uint part = 0; part < ROWS; part += 2 * COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (mine / (2 * COLS) * (2 * COLS) == part) {
    store_rows<T, D>(tiles + (mine - part) * (D + 4), out, q_base, heads * D, first + mine, rows, lane, made);
  }
}
