// Gradient of the weight, summed over blocks of ROWS rows of channels; what called adds up the blocks.
// Inputs: x, cotangent [rows, channels], PER_FRAME rows a frame; weight [channels]; means, inverses float [frames].
// Output: partials float [blocks, channels]. Template: ROWS, PER_FRAME, THREADS.
// Grid: groups of THREADS for the channels in x, blocks in y.
const uint channel = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const uint rows = uint(x_shape[0]);
const uint channels = uint(x_shape[1]);
const uint block = threadgroup_position_in_grid.y;
if (channel < channels) {
  const float w = static_cast<float>(weight[channel]);
  float sum = 0.0f;
  for (uint n = 0; n < ROWS; ++n) {
    const uint row = block * ROWS + n;
    if (row < rows) {
      const float away = static_cast<float>(x[row * channels + channel]) - means[row / PER_FRAME];
      if (away * w > 0.0f) {
        sum += static_cast<float>(cotangent[row * channels + channel]) * away * inverses[row / PER_FRAME];
      }
    }
  }
  partials[block * channels + channel] = sum;
}
