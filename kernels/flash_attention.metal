// Attention of all queries on all keys without their scores in memory: softmax(scale q k^T) v, and the logarithms of
// the softmax's denominators for the gradient (Dao et al. 2022, arXiv:2205.14135).
// Inputs: q [B, N, H, D]; k, v [B, M, G, D], H a multiple of G; lengths int [B, 2]: queries and keys of a row that count;
//   constants float [1]: scale.
// Outputs: out [B, N, H, D] of T, 0 behind a row's queries and where it has no keys; sums float [B, H, N].
// Template: T, D, ROWS, COLS; 4 * ROWS threads. Grid: groups of ROWS queries in x, heads in y, rows of the batch in z.
// A group reads its queries once and all keys and values once.
threadgroup T queries[ROWS * (D + 1)];
threadgroup T keys[COLS * (D + 1)];
threadgroup T values[COLS * (D + 1)];
threadgroup float weights[ROWS * (COLS + 1)];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = lid % 16;
const uint mine = lid / 16 * 4;
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
float best[4];
float total[4];
float made[4][(D + 15) / 16];
for (uint i = 0; i < 4; ++i) {
  best[i] = -3e38f;
  total[i] = 0.0f;
  for (uint j = 0; j < (D + 15) / 16; ++j) {
    made[i][j] = 0.0f;
  }
}
if (columns > 0) {
  load_tile<T, D, 4 * ROWS>(queries, q, q_base, heads * D, first, stop, ROWS, lid);
}
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_tile<T, D, 4 * ROWS>(keys, k, k_base, kv_heads * D, start, columns, COLS, lid);
  load_tile<T, D, 4 * ROWS>(values, v, k_base, kv_heads * D, start, columns, COLS, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float scores[4][COLS / 16];
  tile_products<D, COLS / 16>(queries, keys, mine, lane, scores);
  for (uint i = 0; i < 4; ++i) {
    float most = best[i];
    for (uint j = 0; j < COLS / 16; ++j) {
      scores[i][j] = start + lane + 16 * j < columns ? scores[i][j] * scale : -3e38f;
      most = metal::max(most, scores[i][j]);
    }
    most = row_max(most);
    const float shrink = metal::exp(best[i] - most);
    best[i] = most;
    total[i] *= shrink;
    for (uint j = 0; j < COLS / 16; ++j) {
      const float weight = metal::exp(scores[i][j] - most);
      total[i] += weight;
      weights[(mine + i) * (COLS + 1) + lane + 16 * j] = weight;
    }
    for (uint j = 0; j < (D + 15) / 16; ++j) {
      made[i][j] *= shrink;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  add_rows<D, COLS, (D + 15) / 16>(weights, values, mine, lane, made);
}
for (uint i = 0; i < 4; ++i) {
  const uint row = first + mine + i;
  const float all = row_sum(total[i]);
  const bool counts = row < stop && all > 0.0f;
  if (row < rows) {
    for (uint j = 0; j < (D + 15) / 16; ++j) {
      if (lane + 16 * j < D) {
        out[q_base + row * heads * D + lane + 16 * j] = static_cast<T>(counts ? made[i][j] / all : 0.0f);
      }
    }
    if (lane == 0) {
      sums[(batch * heads + head) * rows + row] = counts ? best[i] + metal::log(all) : 0.0f;
    }
  }
}
