// Sums over the SIMD groups of a row, where a threadgroup has several rows: SIMDS groups of 32 threads for each.
// `shared` holds a value for each SIMD group of the threadgroup. Every thread takes part and gets its row's sum. A sum
// may begin while another thread still reads the one before, so sums in turn use two places in turn.

template <uint SIMDS, typename Shared>
inline float row_group_sum(float value, Shared shared, uint lane, uint simd) {
  value = simd_sum(value);
  if (SIMDS > 1) {
    if (lane == 0) {
      shared[simd] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    value = simd_sum(lane < SIMDS ? shared[simd / SIMDS * SIMDS + lane] : 0.0f);
  }
  return value;
}
