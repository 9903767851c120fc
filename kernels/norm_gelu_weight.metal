// Gradient of norm_gelu's weight, summed over blocks of ROWS rows; the caller adds up the blocks' sums.
// Inputs: x, cotangent [rows, width]; weight [width]; inverses float [rows] from the backward.
// Output: partials float [blocks, width]. Template: ROWS, THREADS.
// Grid: groups of THREADS columns in x, blocks in y.
const uint column = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const uint block = threadgroup_position_in_grid.y;
const uint rows = uint(x_shape[0]);
const uint width = uint(x_shape[1]);
if (column < width) {
  const float w = static_cast<float>(weight[column]);
  float sum = 0.0f;
  const uint stop = metal::min(rows, (block + 1) * ROWS);
  for (uint row = block * ROWS; row < stop; ++row) {
    const uint i = row * width + column;
    const float normed = static_cast<float>(x[i]) * inverses[row];
    const float y = normed * w;
    sum += static_cast<float>(cotangent[i]) * gelu_slope(y, gelu_tanh_part(y)) * normed;
  }
  partials[block * width + column] = sum;
}
