// out = x + table[0][column] + table[1][row] for patches with places (column, row); x alone where both are -1: one pass.
// Inputs: x [n, width]; table [2, places, width]; at int [n, 2]. Output: out [n, width] of T.
// Template: T, THREADS. Grid: groups of THREADS columns in x, patches in y.
// Replaces two gathers, their sum and a choice: 4 values moved for each, not 8.
const uint column = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const uint patch = threadgroup_position_in_grid.y;
const uint width = uint(x_shape[1]);
const uint places = uint(table_shape[1]);
if (column < width) {
  const int first = at[2 * patch];
  const int second = at[2 * patch + 1];
  float sum = static_cast<float>(x[patch * width + column]);
  if (first != -1 || second != -1) {
    const uint left = uint(metal::max(first, 0));
    const uint right = places + uint(metal::max(second, 0));
    sum += static_cast<float>(table[left * width + column]) + static_cast<float>(table[right * width + column]);
  }
  out[patch * width + column] = static_cast<T>(sum);
}
