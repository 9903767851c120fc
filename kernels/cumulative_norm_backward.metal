// d_x = g * inverse + 2 * d_square * (x - mean) + d_sum, g as for the pulls, one pass.
// Inputs: x, cotangent [frames, width]; weight [channels]; means, inverses, d_squares, d_sums float [frames].
// Output: d_x [frames, width] of T. Template: T, THREADS, VALUES. Grid: a group of THREADS for each frame.
const uint frame = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(x_shape[1]);
const uint channels = uint(weight_shape[0]);
const float mean = means[frame];
const float inverse = inverses[frame];
const float slope = 2.0f * d_squares[frame];
const float even = d_sums[frame];
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  if (i < width) {
    const float w = static_cast<float>(weight[i % channels]);
    const float away = static_cast<float>(x[frame * width + i]) - mean;
    const float g = away * w > 0.0f ? static_cast<float>(cotangent[frame * width + i]) * w : 0.0f;
    d_x[frame * width + i] = static_cast<T>(g * inverse + slope * away + even);
  }
}
