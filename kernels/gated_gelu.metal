// out = gelu_tanh(gate) * x in one pass.
// Inputs: gate, x [n]. Output: out [n] of T. Template: T, THREADS, VALUES (a thread's).
// Grid: one group of THREADS for every THREADS * VALUES values.
// Replaces a compiled pass that also writes the tanh: 3 values moved for each, not 4, and no tanh to keep.
const uint count = uint(gate_shape[0]);
const uint first = threadgroup_position_in_grid.x * (THREADS * VALUES) + thread_position_in_threadgroup.x;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = first + j * THREADS;
  if (i < count) {
    const float g = static_cast<float>(gate[i]);
    out[i] = static_cast<T>(gelu_value(g, gelu_tanh_part(g)) * static_cast<float>(x[i]));
  }
}
