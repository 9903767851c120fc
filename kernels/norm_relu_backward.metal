// Gradient of x for the cotangent of norm_relu's result, one pass; mean and deviation are computed again.
// Inputs: as the forward's, and cotangent [rows, width]. Output: d_x [rows, width] of T. Template and grid as the forward's.
const uint lane = thread_index_in_simdgroup;
const uint rows = uint(x_shape[0]);
const uint width = uint(x_shape[1]);
const uint row = threadgroup_position_in_grid.x * 8 + simdgroup_index_in_threadgroup;
bool kept = row < rows;
if (MASKED && kept) {
  kept = valid[row / PER_MASK];
}
float values[VALUES];
const float inverse = centred_row<VALUES>(values, x, row * width, width, kept, constants[0], lane);
float pulls[VALUES];
float even = 0.0f;
float along = 0.0f;
for (uint v = 0; v < VALUES; ++v) {
  const uint i = lane + 32 * v;
  pulls[v] = 0.0f;
  values[v] *= inverse;
  if (kept && i < width) {
    const float w = static_cast<float>(weight[i]);
    pulls[v] = values[v] * w > 0.0f ? static_cast<float>(cotangent[row * width + i]) * w : 0.0f;
  }
  even += pulls[v];
  along += pulls[v] * values[v];
}
even = simd_sum(even) / float(width);
along = simd_sum(along) / float(width);
for (uint v = 0; v < VALUES; ++v) {
  const uint i = lane + 32 * v;
  if (row < rows && i < width) {
    d_x[row * width + i] = static_cast<T>(inverse * (pulls[v] - even - values[v] * along));
  }
}
