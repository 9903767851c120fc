// Gradients of AltUp's correction, one pass. That of rest is the cotangent.
// Inputs: active, activated, shares as the forward's; cotangent as its output.
// Outputs: d_active, d_activated, d_added [tokens, width] of T; d_shares float [tokens, OTHERS].
// Template and grid as the forward's.
threadgroup float partial[OTHERS * 32];
const uint token = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(active_shape[1]);
const uint plane = uint(active_shape[0]) * width;
float share[OTHERS];
float dots[OTHERS];
for (uint j = 0; j < OTHERS; ++j) {
  share[j] = static_cast<float>(shares[token * OTHERS + j]);
  dots[j] = 0.0f;
}
for (uint v = 0; v < VALUES; ++v) {
  const uint column = lid + v * THREADS;
  if (column < width) {
    const uint at = token * width + column;
    const float gained = static_cast<float>(activated[at]) - static_cast<float>(active[at]);
    float through = 0.0f;
    float more = 0.0f;
    for (uint j = 0; j < OTHERS; ++j) {
      const float pull = static_cast<float>(cotangent[j * plane + at]);
      through += share[j] * pull;
      more += pull;
      dots[j] += pull * gained;
    }
    d_active[at] = static_cast<T>(-through);
    d_activated[at] = static_cast<T>(through);
    d_added[at] = static_cast<T>(more);
  }
}
for (uint j = 0; j < OTHERS; ++j) {
  const float sum = simd_sum(dots[j]);
  if (thread_index_in_simdgroup == 0) {
    partial[j * 32 + simdgroup_index_in_threadgroup] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lid < OTHERS) {
  float sum = 0.0f;
  for (uint s = 0; s < THREADS / 32; ++s) {
    sum += partial[lid * 32 + s];
  }
  d_shares[token * OTHERS + lid] = sum;
}
