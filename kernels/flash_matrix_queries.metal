// flash_attention_queries with SIMD group matrices; D a multiple of 8. Inputs, outputs, template and bytes as there.
threadgroup float tiles[2 * COLS * (D + 4)];
threadgroup float scores[ROWS * (COLS + 4)];
threadgroup float wished[ROWS * (COLS + 4)];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint mine = simdgroup_index_in_threadgroup * 8;
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
const uint s_base = (batch * heads + head) * rows;
const uint columns = first < stop ? uint(lengths[2 * batch + 1]) : 0;
const float scale = constants[0];
float delta = 0.0f;
float sum = 0.0f;
simdgroup_float8x8 left[D / 8];
simdgroup_float8x8 pulls[D / 8];
simdgroup_float8x8 made[D / 8];
clear_rows<D>(left);
clear_rows<D>(pulls);
clear_rows<D>(made);
if (columns > 0) {
  for (uint part = 0; part < ROWS; part += 2 * COLS) {
    const uint count = metal::min(uint(2 * COLS), ROWS - part);
    const bool here = mine / (2 * COLS) * (2 * COLS) == part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_floats<T, D, 4 * ROWS>(tiles, q, q_base, heads * D, first + part, stop, count, lid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (here) {
      load_rows<D>(tiles + (mine - part) * (D + 4), left);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_floats<T, D, 4 * ROWS>(tiles, cotangent, q_base, heads * D, first + part, stop, count, lid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (here) {
      load_rows<D>(tiles + (mine - part) * (D + 4), pulls);
      if (first + own < stop) {
        for (uint column = lane % 4; column < D; column += 4) {
          delta += static_cast<float>(out[q_base + (first + own) * heads * D + column]) *
                   tiles[(own - part) * (D + 4) + column];
        }
        sum = sums[s_base + first + own];
      }
    }
  }
}
delta = quad_add(delta);
for (uint start = 0; start < columns; start += COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_floats<T, D, 4 * ROWS>(tiles, k, k_base, kv_heads * D, start, columns, COLS, lid);
  load_floats<T, D, 4 * ROWS>(tiles + COLS * (D + 4), v, k_base, kv_heads * D, start, columns, COLS, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  matrix_products<D, COLS>(left, tiles, scores + mine * (COLS + 4));
  matrix_products<D, COLS>(pulls, tiles + COLS * (D + 4), wished + mine * (COLS + 4));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < COLS / 4; ++j) {
    const uint column = lane % 4 + 4 * j;
    const uint i = own * (COLS + 4) + column;
    float slope = 0.0f;
    if (first + own < stop && start + column < columns) {
      slope = metal::exp(scores[i] * scale - sum) * (wished[i] - delta) * scale;
    }
    scores[i] = slope;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  add_products<D, COLS>(scores + mine * (COLS + 4), tiles, made);
}
for (uint part = 0; part < ROWS; part += 2 * COLS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (mine / (2 * COLS) * (2 * COLS) == part) {
    store_rows<T, D>(tiles + (mine - part) * (D + 4), d_q, q_base, heads * D, first + mine, rows, lane, made);
  }
}
if (lane % 4 == 0 && first + own < rows) {
  deltas[s_base + first + own] = delta;
}
