// Gradient of the weight, summed over blocks of ROWS rows; the blocks' sums are added up by the caller.
// Inputs: x, cotangent [rows, width]; inverses float [rows] from the forward; constants, scale as there.
// Output: partials float [blocks, width]. Template: ROWS, THREADS, SCALED.
// Grid: groups of THREADS columns in x, blocks in y.
const uint column = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const uint block = threadgroup_position_in_grid.y;
const uint rows = uint(x_shape[0]);
const uint width = uint(x_shape[1]);
if (column < width) {
  float sum = 0.0f;
  const uint stop = metal::min(rows, (block + 1) * ROWS);
  for (uint row = block * ROWS; row < stop; ++row) {
    const uint i = row * width + column;
    sum += static_cast<float>(cotangent[i]) * static_cast<float>(x[i]) * inverses[row];
  }
  sum *= constants[1];
  if (SCALED) {
    sum *= static_cast<float>(scale[0]);
  }
  partials[block * width + column] = sum;
}
