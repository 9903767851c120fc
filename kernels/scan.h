// Running sums over a SIMD group. Every lane takes part.

// The sum of the values of the lanes up to this one.
inline float sum_so_far(float value, uint lane) {
  for (uint away = 1; away < 32; away *= 2) {
    const float before = simd_shuffle_up(value, ushort(away));
    value += lane >= away ? before : 0.0f;
  }
  return value;
}
