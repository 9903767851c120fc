// What lanes of a SIMD group exchange.
#pragma once

namespace metal {
namespace emulated {
template <typename T> EMULATED_INLINE T undefined() {
  T value;
  emulated_undefined(&value, sizeof(T));
  return value;
}
template <typename T> struct Lanes {
  unsigned char* at;
  EMULATED_INLINE T operator[](uint lane) const { return *reinterpret_cast<const T*>(at + 16 * lane); }
};
template <typename T> EMULATED_INLINE Lanes<T> exchange(T value, const char* file, int line) {
  static_assert(sizeof(T) <= 16, "lanes exchange at most 16 bytes");
  return {emulated_exchange(&value, sizeof(T), file, line)};
}
template <typename T> EMULATED_INLINE T from(T value, uint lane, bool defined, const char* file, int line) {
  auto lanes = exchange(value, file, line);
  return defined && lane < emulated_lanes() ? lanes[lane] : undefined<T>();
}
// The first lane that goes on computes it for all.
template <typename T, typename Join> EMULATED_INLINE T reduce(T value, Join join, const char* file, int line) {
  auto lanes = exchange(value, file, line);
  T* made = reinterpret_cast<T*>(lanes.at + EXCHANGE_RESULT);
  if (!lanes.at[EXCHANGE_DONE]) {
    T all = lanes[0];
    for (uint i = 1; i < emulated_lanes(); ++i) all = join(all, lanes[i]);
    *made = all;
    lanes.at[EXCHANGE_DONE] = 1;
  }
  return *made;
}
}  // namespace emulated

#define EMULATED_REDUCE(NAME, RESULT)                                                               \
  template <typename T> inline T NAME(T value, EMULATED_PLACE) {                                    \
    return emulated::reduce(value, [](T a, T b) { return static_cast<T>(RESULT); }, file, line);    \
  }
EMULATED_REDUCE(simd_sum, a + b)
EMULATED_REDUCE(simd_product, a * b)
EMULATED_REDUCE(simd_max, max(a, b))
EMULATED_REDUCE(simd_min, min(a, b))
EMULATED_REDUCE(simd_and, a & b)
EMULATED_REDUCE(simd_or, a | b)
EMULATED_REDUCE(simd_xor, a ^ b)

template <typename T> inline T simd_prefix_inclusive_sum(T value, EMULATED_PLACE) {
  auto lanes = emulated::exchange(value, file, line);
  T sum = lanes[0];
  for (uint i = 1; i <= emulated_lane(); ++i) sum = static_cast<T>(sum + lanes[i]);
  return sum;
}
template <typename T> inline T simd_prefix_exclusive_sum(T value, EMULATED_PLACE) {
  auto lanes = emulated::exchange(value, file, line);
  T sum = T(0);
  for (uint i = 0; i < emulated_lane(); ++i) sum = static_cast<T>(sum + lanes[i]);
  return sum;
}
template <typename T> inline T simd_broadcast(T value, ushort lane, EMULATED_PLACE) {
  if (lane >= 32) emulated_invalid("simd_broadcast from a lane that does not exist", file, line);
  return emulated::from(value, lane, true, file, line);
}
template <typename T> inline T simd_broadcast_first(T value, EMULATED_PLACE) {
  return emulated::from(value, 0, true, file, line);
}
template <typename T> inline T simd_shuffle(T value, ushort lane, EMULATED_PLACE) {
  if (lane >= 32) emulated_invalid("simd_shuffle from a lane that does not exist", file, line);
  return emulated::from(value, lane, true, file, line);
}
template <typename T> inline T simd_shuffle_xor(T value, ushort mask, EMULATED_PLACE) {
  if (mask >= 32) emulated_invalid("simd_shuffle_xor from a lane that does not exist", file, line);
  return emulated::from(value, emulated_lane() ^ mask, true, file, line);
}
template <typename T> inline T simd_shuffle_down(T value, ushort delta, EMULATED_PLACE) {
  return emulated::from(value, emulated_lane() + delta, true, file, line);
}
template <typename T> inline T simd_shuffle_up(T value, ushort delta, EMULATED_PLACE) {
  return emulated::from(value, emulated_lane() - delta, delta <= emulated_lane(), file, line);
}
inline bool simd_any(bool value, EMULATED_PLACE) { return simd_max(uint(value), file, line) != 0; }
inline bool simd_all(bool value, EMULATED_PLACE) { return simd_min(uint(value), file, line) != 0; }
}  // namespace metal
