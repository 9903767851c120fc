// Reductions over a threadgroup of `simds` SIMD groups of 32 threads. Every thread takes part and gets the result.
// `shared` is threadgroup memory that nothing else uses: one value for each SIMD group (and for each of several sums).

template <typename Shared>
inline float group_sum(float value, Shared shared, uint lane, uint simd, uint simds) {
  value = simd_sum(value);
  if (lane == 0) {
    shared[simd] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simds ? shared[lane] : 0.0f);
}

template <typename Shared>
inline float group_max(float value, Shared shared, uint lane, uint simd, uint simds) {
  value = simd_max(value);
  if (lane == 0) {
    shared[simd] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(lane < simds ? shared[lane] : shared[0]);
}
