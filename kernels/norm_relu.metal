// out = relu(layer_norm(x) * weight) of rows, 0 in rows that the mask leaves out, one pass.
// Inputs: x [rows, width]; weight [width]; valid bool [rows / PER_MASK] (any array unless MASKED), one for PER_MASK rows;
//   constants float [1]: eps.
// Output: out [rows, width] of T. Template: T, VALUES (32 * VALUES >= width), PER_MASK, MASKED.
// Grid: groups of 256 threads, a SIMD group for each row. Replaces norm, relu and product: 2 values moved for each, not 4.
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
for (uint v = 0; v < VALUES; ++v) {
  const uint i = lane + 32 * v;
  if (row < rows && i < width) {
    const float y = values[v] * inverse * static_cast<float>(weight[i]);
    out[row * width + i] = static_cast<T>(kept && y > 0.0f ? y : 0.0f);
  }
}
