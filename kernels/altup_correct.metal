// AltUp's correction of the streams that were not computed, and what the per-layer input adds to them, one pass:
// out_j = rest_j + share_j * (activated - active) + added.
// Inputs: active, activated, added [tokens, width]; rest [OTHERS, tokens, width]; shares [tokens, OTHERS].
// Output: out, as rest, of T. Template: T, OTHERS, THREADS, VALUES (a thread's, THREADS * VALUES >= width).
// Grid: a group of THREADS for each token.
const uint token = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(active_shape[1]);
const uint plane = uint(active_shape[0]) * width;
float share[OTHERS];
for (uint j = 0; j < OTHERS; ++j) {
  share[j] = static_cast<float>(shares[token * OTHERS + j]);
}
for (uint v = 0; v < VALUES; ++v) {
  const uint column = lid + v * THREADS;
  if (column < width) {
    const uint at = token * width + column;
    const float gained = static_cast<float>(activated[at]) - static_cast<float>(active[at]);
    const float more = static_cast<float>(added[at]);
    for (uint j = 0; j < OTHERS; ++j) {
      out[j * plane + at] = static_cast<T>(static_cast<float>(rest[j * plane + at]) + share[j] * gained + more);
    }
  }
}
