// out = relu((x - mean) * inverse * weight), mean and inverse of each frame, one pass.
// Inputs: x [frames, width]; weight [channels], of every channels values of a frame; means, inverses float [frames].
// Output: out [frames, width] of T. Template: T, THREADS, VALUES (THREADS * VALUES >= width).
// Grid: a group of THREADS for each frame.
// Replaces (with its two companions) sums, differences, squares and norm: 3 values moved for each, not 4.
const uint frame = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(x_shape[1]);
const uint channels = uint(weight_shape[0]);
const float mean = means[frame];
const float inverse = inverses[frame];
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  if (i < width) {
    const float y = (static_cast<float>(x[frame * width + i]) - mean) * inverse * static_cast<float>(weight[i % channels]);
    out[frame * width + i] = static_cast<T>(y > 0.0f ? y : 0.0f);
  }
}
