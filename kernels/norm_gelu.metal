// out = gelu_tanh(x * (mean(x^2) + eps)^(-1/2) * weight) over rows, one pass.
// Inputs: x [rows, width]; weight [width]; constants float [1]: eps. Output: out [rows, width] of T.
// Template: T, ROWS (of a group at once), TURNS (that it takes), SIMDS (of a row), VALUES (a thread's, 32 * SIMDS *
//   VALUES >= width). Grid: groups of ROWS * SIMDS SIMD groups for every ROWS * TURNS rows; the weight is read once.
// Replaces a norm and a gelu: 2 values moved for each, not 4.
threadgroup float partial[2 * ROWS * SIMDS];
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
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = first + j * 32 * SIMDS;
    if (i < stop) {
      const float y = values[j] * inverse * weights[j];
      out[base + i] = static_cast<T>(gelu_value(y, gelu_tanh_part(y)));
    }
  }
}
