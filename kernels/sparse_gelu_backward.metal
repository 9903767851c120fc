// Gradients of sparse_gelu for the cotangent of its result, one pass; mean and deviation move with every value of a row.
// Inputs: gate, x, cotangent [rows, width]; means, deviations float [rows] from the forward; quantile float [1].
// Outputs: d_gate, d_x [rows, width] of T. Template and grid as the forward's.
threadgroup float sums[32];
const uint row = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(gate_shape[1]);
const uint base = row * width;
const float mean = means[row];
const float deviation = deviations[row];
const float threshold = mean + deviation * quantile[0];
float values[VALUES];
float pulls[VALUES];
float sum = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  values[j] = 0.0f;
  pulls[j] = 0.0f;
  if (i < width) {
    values[j] = static_cast<float>(gate[base + i]);
    const float over = values[j] - threshold;
    float kept = 0.0f;
    if (over > 0.0f) {
      const float part = gelu_tanh_part(over);
      const float c = static_cast<float>(cotangent[base + i]);
      kept = c * gelu_value(over, part);
      pulls[j] = c * static_cast<float>(x[base + i]) * gelu_slope(over, part);
    }
    d_x[base + i] = static_cast<T>(kept);
  }
  sum += pulls[j];
}
sum = group_sum(sum, sums, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, THREADS / 32);
const float even = sum / float(width);
const float slope = deviation > 0.0f ? quantile[0] * even / deviation : 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  if (i < width) {
    d_gate[base + i] = static_cast<T>(pulls[j] - even - slope * (values[j] - mean));
  }
}
