// Gradients of flash_attention's keys and values, those of each query head by themselves.
// Inputs: q, k, v, lengths, constants as the forward's; cotangent as its out; sums its output; deltas from
//   flash_attention_queries.
// Outputs: d_k, d_v [B, M, H, D] of S; where H is not G the caller adds up the heads that share keys.
// Template: T, S, D, ROWS, COLS; 4 * ROWS threads. Grid: groups of ROWS keys in x, query heads in y, rows of the batch
// in z. A group reads its keys and values once and all queries and cotangents once.
threadgroup T keys[ROWS * (D + 1)];
threadgroup T values[ROWS * (D + 1)];
threadgroup T queries[COLS * (D + 1)];
threadgroup T pulls[COLS * (D + 1)];
threadgroup float weights[ROWS * (COLS + 1)];
threadgroup float slopes[ROWS * (COLS + 1)];
threadgroup float totals[COLS];
threadgroup float alongs[COLS];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = lid % 16;
const uint mine = lid / 16 * 4;
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
float key_sums[4][(D + 15) / 16];
float value_sums[4][(D + 15) / 16];
for (uint i = 0; i < 4; ++i) {
  for (uint j = 0; j < (D + 15) / 16; ++j) {
    key_sums[i][j] = 0.0f;
    value_sums[i][j] = 0.0f;
  }
}
if (columns > 0) {
  load_tile<T, D, 4 * ROWS>(keys, k, k_base, kv_heads * D, first, stop, ROWS, lid);
  load_tile<T, D, 4 * ROWS>(values, v, k_base, kv_heads * D, first, stop, ROWS, lid);
}
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_tile<T, D, 4 * ROWS>(queries, q, q_base, heads * D, start, columns, COLS, lid);
  load_tile<T, D, 4 * ROWS>(pulls, cotangent, q_base, heads * D, start, columns, COLS, lid);
  if (lid < COLS && start + lid < columns) {
    totals[lid] = sums[s_base + start + lid];
    alongs[lid] = deltas[s_base + start + lid];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float scores[4][COLS / 16];
  float wished[4][COLS / 16];
  tile_products<D, COLS / 16>(keys, queries, mine, lane, scores);
  tile_products<D, COLS / 16>(values, pulls, mine, lane, wished);
  for (uint i = 0; i < 4; ++i) {
    for (uint j = 0; j < COLS / 16; ++j) {
      const uint column = lane + 16 * j;
      float weight = 0.0f;
      float slope = 0.0f;
      if (first + mine + i < stop && start + column < columns) {
        weight = metal::exp(scores[i][j] * scale - totals[column]);
        slope = weight * (wished[i][j] - alongs[column]) * scale;
      }
      weights[(mine + i) * (COLS + 1) + column] = weight;
      slopes[(mine + i) * (COLS + 1) + column] = slope;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  add_rows<D, COLS, (D + 15) / 16>(weights, pulls, mine, lane, value_sums);
  add_rows<D, COLS, (D + 15) / 16>(slopes, queries, mine, lane, key_sums);
}
for (uint i = 0; i < 4; ++i) {
  const uint row = first + mine + i;
  for (uint j = 0; j < (D + 15) / 16; ++j) {
    const uint column = lane + 16 * j;
    if (row < rows && column < D) {
      d_k[d_base + row * heads * D + column] = static_cast<S>(key_sums[i][j]);
      d_v[d_base + row * heads * D + column] = static_cast<S>(value_sums[i][j]);
    }
  }
}
