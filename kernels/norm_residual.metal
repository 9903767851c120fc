// out = (residual + factor * norm(x) * weight) * scale over rows, norm(x) = x * (mean(x^2) + eps)^(-1/2), one pass.
// Inputs: x, residual [rows, width]; weight [width] (any array unless WEIGHTED); constants float [2]: eps, factor;
//   scale [1] (any array unless SCALED).
// Outputs: out [rows, width] of T; inverses float [rows], the factors of the rows' norms.
// Template: T, THREADS, VALUES (a thread's, THREADS * VALUES >= width), TURNS, WEIGHTED, SCALED.
// Grid: a group of THREADS for every TURNS rows, which share one reading of the weight.
// Replaces norm, product, sum and product: 3 values moved for each, not 5 to 9.
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
  float values[VALUES];
  float squares = 0.0f;
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = lid + j * THREADS;
    values[j] = 0.0f;
    if (i < width) {
      values[j] = static_cast<float>(x[base + i]);
    }
    squares += values[j] * values[j];
  }
  // By turns one of two places for the sums: the barrier of the next row lies between two uses of either.
  squares = group_sum(
      squares, partials + 32 * (turn % 2), thread_index_in_simdgroup, simdgroup_index_in_threadgroup, THREADS / 32);
  const float inverse = metal::rsqrt(squares / float(width) + constants[0]);
  for (uint j = 0; j < VALUES; ++j) {
    const uint i = lid + j * THREADS;
    if (i < width) {
      float y = values[j] * inverse * weights[j] + static_cast<float>(residual[base + i]);
      if (SCALED) {
        y *= static_cast<float>(scale[0]);
      }
      out[base + i] = static_cast<T>(y);
    }
  }
  if (lid == 0) {
    inverses[row] = inverse;
  }
}
