// Sum of each frame's values, and the sum of their squared differences from the frame's own mean, one pass.
// Input: x [frames, width]. Outputs: sums, squares float [frames].
// Template: THREADS, VALUES (a thread's, THREADS * VALUES >= width). Grid: a group of THREADS for each frame.
threadgroup float totals[32];
threadgroup float spreads[32];
const uint frame = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint width = uint(x_shape[1]);
float values[VALUES];
float sum = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  values[j] = 0.0f;
  if (i < width) {
    values[j] = static_cast<float>(x[frame * width + i]);
  }
  sum += values[j];
}
sum = group_sum(sum, totals, lane, simd, THREADS / 32);
const float mean = sum / float(width);
float square = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const float away = lid + j * THREADS < width ? values[j] - mean : 0.0f;
  square += away * away;
}
square = group_sum(square, spreads, lane, simd, THREADS / 32);
if (lid == 0) {
  sums[frame] = sum;
  squares[frame] = square;
}
