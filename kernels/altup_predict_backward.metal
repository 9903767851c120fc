// Gradients of AltUp's prediction, one pass: of the streams, and of the mix, whose entries are products over a width.
// Inputs: first, others, mix as the forward's; d_active, d_rest, cotangents of its outputs.
// Outputs: d_first, d_others of T; d_mix float [tokens, STREAMS, STREAMS]. Template and grid as the forward's.
threadgroup float partial[STREAMS * STREAMS * 32];
const uint token = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(first_shape[1]);
const uint plane = uint(first_shape[0]) * width;
float mixed[STREAMS * STREAMS];
float dots[STREAMS * STREAMS];
for (uint k = 0; k < STREAMS * STREAMS; ++k) {
  mixed[k] = static_cast<float>(mix[token * (STREAMS * STREAMS) + k]);
  dots[k] = 0.0f;
}
for (uint v = 0; v < VALUES; ++v) {
  const uint column = lid + v * THREADS;
  if (column < width) {
    const uint at = token * width + column;
    float streams[STREAMS];
    float pulls[STREAMS];
    streams[0] = static_cast<float>(first[at]);
    pulls[0] = static_cast<float>(d_active[at]);
    for (uint i = 1; i < STREAMS; ++i) {
      streams[i] = static_cast<float>(others[(i - 1) * plane + at]);
      pulls[i] = static_cast<float>(d_rest[(i - 1) * plane + at]);
    }
    for (uint i = 0; i < STREAMS; ++i) {
      float sum = pulls[i];
      for (uint j = 0; j < STREAMS; ++j) {
        sum += mixed[j * STREAMS + i] * pulls[j];
        dots[j * STREAMS + i] += pulls[j] * streams[i];
      }
      if (i == 0) {
        d_first[at] = static_cast<T>(sum);
      } else {
        d_others[(i - 1) * plane + at] = static_cast<T>(sum);
      }
    }
  }
}
for (uint k = 0; k < STREAMS * STREAMS; ++k) {
  const float sum = simd_sum(dots[k]);
  if (thread_index_in_simdgroup == 0) {
    partial[k * 32 + simdgroup_index_in_threadgroup] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lid < STREAMS * STREAMS) {
  float sum = 0.0f;
  for (uint s = 0; s < THREADS / 32; ++s) {
    sum += partial[lid * 32 + s];
  }
  d_mix[token * (STREAMS * STREAMS) + lid] = sum;
}
