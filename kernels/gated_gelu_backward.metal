// Gradients of gelu_tanh(gate) * x for the cotangent of its result, in one pass; the tanh is computed again.
// Inputs: gate, x, cotangent [n]. Outputs: d_gate, d_x [n] of T. Template and grid as the forward's.
// Replaces a compiled pass that reads the tanh as well: 5 values moved for each, not 6.
const uint count = uint(gate_shape[0]);
const uint first = threadgroup_position_in_grid.x * (THREADS * VALUES) + thread_position_in_threadgroup.x;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = first + j * THREADS;
  if (i < count) {
    const float g = static_cast<float>(gate[i]);
    const float part = gelu_tanh_part(g);
    const float c = static_cast<float>(cotangent[i]);
    d_gate[i] = static_cast<T>(c * static_cast<float>(x[i]) * gelu_slope(g, part));
    d_x[i] = static_cast<T>(c * gelu_value(g, part));
  }
}
