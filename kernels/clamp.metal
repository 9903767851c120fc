// out = x between low and high, NaN as it is; and a bit for each value: whether it lies within (bounds included).
// Inputs: x [n]; low, high [1], read in the dtype of x. Outputs: out [n] of T; within uint8 [ceil(n / 8)], value 8 i + j
//   in bit j of byte i. Template: T, THREADS. Grid: groups of THREADS, eight values a thread.
// Replaces two passes forward, and the copy of x that the gradient would keep.
const uint count = uint(x_shape[0]);
const uint byte = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
const float lowest = static_cast<float>(static_cast<T>(low[0]));
const float highest = static_cast<float>(static_cast<T>(high[0]));
if (8 * byte < count) {
  uint bits = 0;
  for (uint j = 0; j < 8; ++j) {
    const uint i = 8 * byte + j;
    if (i < count) {
      float value = static_cast<float>(x[i]);
      if (value >= lowest && value <= highest) {
        bits |= 1u << j;
      }
      if (value < lowest) {
        value = lowest;
      }
      if (value > highest) {
        value = highest;
      }
      out[i] = static_cast<T>(value);
    }
  }
  within[byte] = static_cast<uint8_t>(bits);
}
