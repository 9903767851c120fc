// Gradients of qk_norm_rope's two weights, summed over blocks of ROWS rows; the caller adds up the blocks' sums.
// Inputs: q, k, cosines, sines, constants as the forward's; pull_q, pull_k the cotangents.
// Output: partials float [blocks, 2, D]. Template: D, PAIRS, SIMDS, ROWS. Grid: a group of SIMDS SIMD groups for each
// block: each takes every SIMDS-th head of it.
threadgroup float shared[SIMDS * 2 * D];
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint lid = thread_position_in_threadgroup.x;
const uint heads = uint(q_shape[1]);
const uint kv_heads = uint(k_shape[1]);
const uint slots = heads + kv_heads;
const uint block = threadgroup_position_in_grid.x;
const uint first = block * ROWS;
const uint rows = metal::min(uint(ROWS), uint(q_shape[0]) - first);
float sums[2][2][PAIRS];
for (uint j = 0; j < PAIRS; ++j) {
  sums[0][0][j] = 0.0f;
  sums[0][1][j] = 0.0f;
  sums[1][0][j] = 0.0f;
  sums[1][1][j] = 0.0f;
}
for (uint at = simd; at < rows * slots; at += SIMDS) {
  const uint row = first + at / slots;
  const uint slot = at % slots;
  const uint which = slot < heads ? 0 : 1;
  const uint base = (which == 0 ? row * heads + slot : row * kv_heads + slot - heads) * D;
  float a[PAIRS];
  float b[PAIRS];
  float pull_a[PAIRS];
  float pull_b[PAIRS];
  if (which == 0) {
    load_pairs<D, PAIRS>(q, base, lane, true, a, b);
    load_pairs<D, PAIRS>(pull_q, base, lane, true, pull_a, pull_b);
  } else {
    load_pairs<D, PAIRS>(k, base, lane, true, a, b);
    load_pairs<D, PAIRS>(pull_k, base, lane, true, pull_a, pull_b);
  }
  turn_pairs<D, PAIRS>(cosines, sines, row * (D / 2), lane, true, -1.0f, pull_a, pull_b);
  const float inverse = metal::rsqrt(pairs_dot<PAIRS>(a, b, a, b) / float(D) + constants[0]);
  for (uint j = 0; j < PAIRS; ++j) {
    const float first_part = pull_a[j] * a[j] * inverse;
    const float second_part = pull_b[j] * b[j] * inverse;
    sums[0][0][j] += which == 0 ? first_part : 0.0f;
    sums[0][1][j] += which == 0 ? second_part : 0.0f;
    sums[1][0][j] += which == 0 ? 0.0f : first_part;
    sums[1][1][j] += which == 0 ? 0.0f : second_part;
  }
}
store_pairs<float, D, PAIRS>(shared, simd * 2 * D, lane, true, sums[0][0], sums[0][1]);
store_pairs<float, D, PAIRS>(shared, simd * 2 * D + D, lane, true, sums[1][0], sums[1][1]);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lid; i < 2 * D; i += 32 * SIMDS) {
  float sum = 0.0f;
  for (uint other = 0; other < SIMDS; ++other) {
    sum += shared[other * 2 * D + i];
  }
  partials[block * 2 * D + i] = sum;
}
