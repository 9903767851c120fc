// Gradients of x and of the residual for the cotangent of the forward's result, one pass.
// Inputs: x, cotangent [rows, width]; inverses float [rows] from the forward; weight, constants, scale as there.
// Outputs: d_x [rows, width] of T; d_residual, the same where SCALED; else it is the cotangent, and this output [1]
//   is not written.
// Template and grid as the forward's.
threadgroup float partials[64];
const uint lid = thread_position_in_threadgroup.x;
const uint rows = uint(x_shape[0]);
const uint width = uint(x_shape[1]);
float weights[VALUES];
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  weights[j] = constants[1];
  if (WEIGHTED && i < width) {
    weights[j] *= static_cast<float>(weight[i]);
  }
}
for (uint turn = 0; turn < TURNS; ++turn) {
  const uint row = threadgroup_position_in_grid.x * TURNS + turn;
  if (row >= rows) {
    break;
  }
  const uint base = row * width;
  const float inverse = inverses[row];
  float values[VALUES];
  float pulls[VALUES];
  float dot = 0.0f;
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = lid + j * THREADS;
    values[j] = 0.0f;
    pulls[j] = 0.0f;
    if (i < width) {
      values[j] = static_cast<float>(x[base + i]);
      float g = static_cast<float>(cotangent[base + i]);
      if (SCALED) {
        g *= static_cast<float>(scale[0]);
        d_residual[base + i] = static_cast<T>(g);
      }
      pulls[j] = g * weights[j];
    }
    dot += pulls[j] * values[j];
  }
  dot = group_sum(
      dot, partials + 32 * (turn % 2), thread_index_in_simdgroup, simdgroup_index_in_threadgroup, THREADS / 32);
  const float along = dot * inverse * inverse / float(width);
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = lid + j * THREADS;
    if (i < width) {
      d_x[base + i] = static_cast<T>(inverse * (pulls[j] - values[j] * along));
    }
  }
}
