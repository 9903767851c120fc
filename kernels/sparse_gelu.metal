// out = gelu_tanh(max(0, gate - mean - z * std)) * x, mean and (population) std over a row of gate, one pass.
// Inputs: gate, x [rows, width]; quantile float [1]: z. Outputs: out [rows, width] of T; means, deviations float [rows].
// Template: T, THREADS, VALUES (a thread's, THREADS * VALUES >= width). Grid: a group of THREADS for each row.
// Replaces five passes for the threshold and the gated gelu: 3 values moved for each, not 15.
threadgroup float sums[32];
threadgroup float squares[32];
const uint row = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint width = uint(gate_shape[1]);
const uint base = row * width;
float values[VALUES];
float sum = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  values[j] = 0.0f;
  if (i < width) {
    values[j] = static_cast<float>(gate[base + i]);
  }
  sum += values[j];
}
const float mean = group_sum(sum, sums, lane, simd, THREADS / 32) / float(width);
float square = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const float away = lid + j * THREADS < width ? values[j] - mean : 0.0f;
  square += away * away;
}
const float deviation = metal::sqrt(group_sum(square, squares, lane, simd, THREADS / 32) / float(width));
const float threshold = mean + deviation * quantile[0];
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  if (i < width) {
    const float over = values[j] - threshold;
    const float kept = over > 0.0f ? gelu_value(over, gelu_tanh_part(over)) : 0.0f;
    out[base + i] = static_cast<T>(kept * static_cast<float>(x[base + i]));
  }
}
if (lid == 0) {
  means[row] = mean;
  deviations[row] = deviation;
}
