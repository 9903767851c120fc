// Mean of each cell of patches, rounded to T, times a factor; less a bias and times a scale where STANDARD: one pass.
// Inputs: x [cells * CELL, width], patches of a cell one after the other; bias, scale [width] (any array unless
//   STANDARD); constants float [1]: factor. Output: out [cells, width] of T.
// Template: T, CELL, THREADS, STANDARD. Grid: groups of THREADS columns in x, cells in y.
// Replaces a copy in float32, its mean, and steps on that: 2 bytes read for each value, not 2 + 4 + 4.
const uint column = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const uint cell = threadgroup_position_in_grid.y;
const uint width = uint(x_shape[1]);
if (column < width) {
  float sum = 0.0f;
  for (uint i = 0; i < CELL; ++i) {
    sum += static_cast<float>(x[(cell * CELL + i) * width + column]);
  }
  float mean = static_cast<float>(static_cast<T>(sum / float(CELL))) * constants[0];
  if (STANDARD) {
    mean = (mean - static_cast<float>(bias[column])) * static_cast<float>(scale[column]);
  }
  out[cell * width + column] = static_cast<T>(mean);
}
