// Gradient of the weight, summed over blocks of ROWS rows; what called adds up the blocks.
// Inputs: as the backward's. Output: partials float [blocks, width]. Template: as the forward's, ROWS (a multiple of 8).
// Grid: a group of 256 threads for each block.
threadgroup float sums[8 * 32 * VALUES];
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint rows = uint(x_shape[0]);
const uint width = uint(x_shape[1]);
float total[VALUES];
for (uint v = 0; v < VALUES; ++v) {
  total[v] = 0.0f;
}
for (uint n = simd; n < ROWS; n += 8) {
  const uint row = threadgroup_position_in_grid.x * ROWS + n;
  bool kept = row < rows;
  if (MASKED && kept) {
    kept = valid[row / PER_MASK];
  }
  float values[VALUES];
  const float inverse = centred_row<VALUES>(values, x, row * width, width, kept, constants[0], lane);
  for (uint v = 0; v < VALUES; ++v) {
    const uint i = lane + 32 * v;
    if (kept && i < width && values[v] * static_cast<float>(weight[i]) > 0.0f) {
      total[v] += static_cast<float>(cotangent[row * width + i]) * values[v] * inverse;
    }
  }
}
for (uint v = 0; v < VALUES; ++v) {
  sums[simd * 32 * VALUES + lane + 32 * v] = total[v];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lid; i < width; i += 256) {
  float sum = 0.0f;
  for (uint n = 0; n < 8; ++n) {
    sum += sums[n * 32 * VALUES + i];
  }
  partials[threadgroup_position_in_grid.x * width + i] = sum;
}
