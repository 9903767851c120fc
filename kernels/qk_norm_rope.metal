// RMS norm of every head of queries, keys and values, weights on the first two, which also turn with x and y: one pass.
// Inputs: q [n, H, D]; k, v [n, G, D]; q_weight, k_weight [D]; cosines, sines [n, D / 2], those of x first; constants
//   float [1]: eps.
// Outputs: out_q, out_k, out_v of T, as q, k, v.
// Template: T, D (a multiple of 4), PAIRS (a lane's, 32 * PAIRS >= D / 2), SIMDS. Grid: a SIMD group for each head of
// each row, SIMDS of them in a group; heads of a row follow each other, so that its angles are read once.
// Replaces three norms and, for queries and keys, the products and joins of the rotation: 6 values moved for each, not 14.
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
if (query) {
  load_pairs<D, PAIRS>(q, base, lane, wanted, a, b);
} else if (value) {
  load_pairs<D, PAIRS>(v, base, lane, wanted, a, b);
} else {
  load_pairs<D, PAIRS>(k, base, lane, wanted, a, b);
}
const float inverse = metal::rsqrt(pairs_dot<PAIRS>(a, b, a, b) / float(D) + constants[0]);
if (query) {
  weigh_pairs<D, PAIRS>(q_weight, inverse, lane, a, b);
  turn_pairs<D, PAIRS>(cosines, sines, row * (D / 2), lane, wanted, 1.0f, a, b);
  store_pairs<T, D, PAIRS>(out_q, base, lane, wanted, a, b);
} else if (value) {
  for (uint j = 0; j < PAIRS; ++j) {
    a[j] *= inverse;
    b[j] *= inverse;
  }
  store_pairs<T, D, PAIRS>(out_v, base, lane, wanted, a, b);
} else {
  weigh_pairs<D, PAIRS>(k_weight, inverse, lane, a, b);
  turn_pairs<D, PAIRS>(cosines, sines, row * (D / 2), lane, wanted, 1.0f, a, b);
  store_pairs<T, D, PAIRS>(out_k, base, lane, wanted, a, b);
}
