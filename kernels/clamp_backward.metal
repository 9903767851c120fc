// d_x = cotangent where the forward's bit is set, else 0.
// Inputs: cotangent [n]; within uint8 [ceil(n / 8)]. Output: d_x [n] of T. Template: T, THREADS, VALUES (a thread's).
// Grid: one group of THREADS for every THREADS * VALUES values.
const uint count = uint(cotangent_shape[0]);
const uint first = threadgroup_position_in_grid.x * (THREADS * VALUES) + thread_position_in_threadgroup.x;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = first + j * THREADS;
  if (i < count) {
    const bool inside = (uint(within[i / 8]) >> (i % 8)) & 1u;
    d_x[i] = inside ? cotangent[i] : static_cast<T>(0.0f);
  }
}
