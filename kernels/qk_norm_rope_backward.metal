// Gradients of qk_norm_rope's queries, keys and values, one pass; the norms are computed again.
// Inputs: q, k, v, q_weight, k_weight, cosines, sines, constants as the forward's; pull_q, pull_k, pull_v the cotangents.
// Outputs: d_q, d_k, d_v of T. Template and grid as the forward's.
const uint lane = thread_index_in_simdgroup;
const uint heads = uint(q_shape[1]);
const uint kv_heads = uint(k_shape[1]);
const uint slots = heads + 2 * kv_heads;
const uint at = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
const uint row = at / slots;
const uint slot = at % slots;
const bool wanted = row < uint(q_shape[0]);
const bool query = slot < heads;
const bool value = slot >= heads + kv_heads;
const uint base = (query ? row * heads + slot : row * kv_heads + (slot - heads) % kv_heads) * D;
float a[PAIRS];
float b[PAIRS];
float pull_a[PAIRS];
float pull_b[PAIRS];
if (query) {
  load_pairs<D, PAIRS>(q, base, lane, wanted, a, b);
  load_pairs<D, PAIRS>(pull_q, base, lane, wanted, pull_a, pull_b);
} else if (value) {
  load_pairs<D, PAIRS>(v, base, lane, wanted, a, b);
  load_pairs<D, PAIRS>(pull_v, base, lane, wanted, pull_a, pull_b);
} else {
  load_pairs<D, PAIRS>(k, base, lane, wanted, a, b);
  load_pairs<D, PAIRS>(pull_k, base, lane, wanted, pull_a, pull_b);
}
if (!value) {
  turn_pairs<D, PAIRS>(cosines, sines, row * (D / 2), lane, wanted, -1.0f, pull_a, pull_b);
  if (query) {
    weigh_pairs<D, PAIRS>(q_weight, 1.0f, lane, pull_a, pull_b);
  } else {
    weigh_pairs<D, PAIRS>(k_weight, 1.0f, lane, pull_a, pull_b);
  }
}
const float inverse = metal::rsqrt(pairs_dot<PAIRS>(a, b, a, b) / float(D) + constants[0]);
const float along = pairs_dot<PAIRS>(a, b, pull_a, pull_b) * inverse * inverse / float(D);
for (uint j = 0; j < PAIRS; ++j) {
  a[j] = inverse * (pull_a[j] - a[j] * along);
  b[j] = inverse * (pull_b[j] - b[j] * along);
}
if (query) {
  store_pairs<T, D, PAIRS>(d_q, base, lane, wanted, a, b);
} else if (value) {
  store_pairs<T, D, PAIRS>(d_v, base, lane, wanted, a, b);
} else {
  store_pairs<T, D, PAIRS>(d_k, base, lane, wanted, a, b);
}
