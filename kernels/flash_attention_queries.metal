// Gradient of flash_attention's queries, and for the gradient of its keys the sums of out * cotangent over a head.
// Inputs: q, k, v, lengths, constants as the forward's; out, sums its outputs; cotangent as out.
// Outputs: d_q [B, N, H, D] of T; deltas float [B, H, N]. Template and grid as the forward's.
// A group reads its queries, outputs and cotangents once and all keys and values once.
threadgroup T queries[ROWS * (D + 1)];
threadgroup T pulls[ROWS * (D + 1)];
threadgroup T keys[COLS * (D + 1)];
threadgroup T values[COLS * (D + 1)];
threadgroup float slopes[ROWS * (COLS + 1)];
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
const uint s_base = (batch * heads + head) * rows;
const uint columns = first < stop ? uint(lengths[2 * batch + 1]) : 0;
const float scale = constants[0];
float delta[4];
float sum[4];
float made[4][(D + 15) / 16];
for (uint i = 0; i < 4; ++i) {
  delta[i] = 0.0f;
  sum[i] = 0.0f;
  for (uint j = 0; j < (D + 15) / 16; ++j) {
    made[i][j] = 0.0f;
  }
}
if (columns > 0) {
  load_tile<T, D, 4 * ROWS>(queries, q, q_base, heads * D, first, stop, ROWS, lid);
  load_tile<T, D, 4 * ROWS>(pulls, cotangent, q_base, heads * D, first, stop, ROWS, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < 4; ++i) {
    const uint row = first + mine + i;
    if (row < stop) {
      sum[i] = sums[s_base + row];
      for (uint j = 0; j < (D + 15) / 16; ++j) {
        if (lane + 16 * j < D) {
          delta[i] += static_cast<float>(out[q_base + row * heads * D + lane + 16 * j]) *
                      static_cast<float>(pulls[(mine + i) * (D + 1) + lane + 16 * j]);
        }
      }
    }
    delta[i] = row_sum(delta[i]);
  }
}
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_tile<T, D, 4 * ROWS>(keys, k, k_base, kv_heads * D, start, columns, COLS, lid);
  load_tile<T, D, 4 * ROWS>(values, v, k_base, kv_heads * D, start, columns, COLS, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float scores[4][COLS / 16];
  float wished[4][COLS / 16];
  tile_products<D, COLS / 16>(queries, keys, mine, lane, scores);
  tile_products<D, COLS / 16>(pulls, values, mine, lane, wished);
  for (uint i = 0; i < 4; ++i) {
    for (uint j = 0; j < COLS / 16; ++j) {
      float slope = 0.0f;
      if (first + mine + i < stop && start + lane + 16 * j < columns) {
        slope = metal::exp(scores[i][j] * scale - sum[i]) * (wished[i][j] - delta[i]) * scale;
      }
      slopes[(mine + i) * (COLS + 1) + lane + 16 * j] = slope;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  add_rows<D, COLS, (D + 15) / 16>(slopes, keys, mine, lane, made);
}
for (uint i = 0; i < 4; ++i) {
  const uint row = first + mine + i;
  if (row < rows) {
    for (uint j = 0; j < (D + 15) / 16; ++j) {
      if (lane + 16 * j < D) {
        d_q[q_base + row * heads * D + lane + 16 * j] = static_cast<T>(made[i][j]);
      }
    }
    if (lane == 0) {
      deltas[s_base + row] = delta[i];
    }
  }
}
