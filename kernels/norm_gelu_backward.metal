// Gradient of norm_gelu's x for the cotangent of its result, one pass; the norm is computed again.
// Inputs: x, cotangent [rows, width]; weight, constants as the forward's.
// Outputs: d_x [rows, width] of T; inverses float [rows], the factors of the rows' norms, for the weight's gradient.
// Template and grid as the forward's. Replaces the gradients of a gelu and of a norm: 3 values moved for each, not 6.
threadgroup float partial[2 * ROWS * SIMDS];
threadgroup float dots[2 * ROWS * SIMDS];
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint first = simd % SIMDS * 32 + lane;
const uint width = uint(x_shape[1]);
float weights[VALUES];
for (uint j = 0; j < VALUES; ++j) {
  const uint i = first + j * 32 * SIMDS;
  weights[j] = 0.0f;
  if (i < width) {
    weights[j] = static_cast<float>(weight[i]);
  }
}
for (uint turn = 0; turn < TURNS; ++turn) {
  const uint row = (threadgroup_position_in_grid.x * TURNS + turn) * ROWS + simd / SIMDS;
  const uint stop = row < uint(x_shape[0]) ? width : 0;
  const uint base = row * width;
  float values[VALUES];
  float pulls[VALUES];
  float squares = 0.0f;
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = first + j * 32 * SIMDS;
    values[j] = 0.0f;
    if (i < stop) {
      values[j] = static_cast<float>(x[base + i]);
    }
    squares += values[j] * values[j];
  }
  squares = row_group_sum<SIMDS>(squares, partial + turn % 2 * ROWS * SIMDS, lane, simd);
  const float inverse = metal::rsqrt(squares / float(width) + constants[0]);
  float dot = 0.0f;
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = first + j * 32 * SIMDS;
    pulls[j] = 0.0f;
    if (i < stop) {
      const float y = values[j] * inverse * weights[j];
      pulls[j] = static_cast<float>(cotangent[base + i]) * gelu_slope(y, gelu_tanh_part(y)) * weights[j];
    }
    dot += pulls[j] * values[j];
  }
  dot = row_group_sum<SIMDS>(dot, dots + turn % 2 * ROWS * SIMDS, lane, simd);
  const float along = dot * inverse * inverse / float(width);
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = first + j * 32 * SIMDS;
    if (i < stop) {
      d_x[base + i] = static_cast<T>(inverse * (pulls[j] - values[j] * along));
    }
  }
  if (first == 0 && stop > 0) {
    inverses[row] = inverse;
  }
}
