// Matrices of 8 x 8 elements that a SIMD group holds, two elements a lane, laid out as Apple's GPUs do: lane l has row
// (l/4 & 4) + l/2 % 4 and columns (l/4 & 2) * 2 + l % 2 * 2 and the next.
#pragma once

namespace metal {
template <typename T, int Rows = 8, int Columns = 8> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "there are matrices of 8 x 8 elements only");
  vec<T, 2> elements;
  simdgroup_matrix() { emulated_undefined(&elements, sizeof elements); }
  explicit simdgroup_matrix(T diagonal) {
    elements[0] = row() == column() ? diagonal : T(0);
    elements[1] = row() == column() + 1 ? diagonal : T(0);
  }
  EMULATED_INLINE vec<T, 2>& thread_elements() { return elements; }
  static EMULATED_INLINE uint row() { return (emulated_lane() / 4 & 4) + emulated_lane() / 2 % 4; }
  static EMULATED_INLINE uint column() { return (emulated_lane() / 4 & 2) * 2 + emulated_lane() % 2 * 2; }
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;

template <typename T, int R, int C> EMULATED_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> made;
  made.elements[0] = made.elements[1] = value;
  return made;
}

namespace emulated {
template <typename T> EMULATED_INLINE ulong place_of(ulong stride, ulong2 origin, bool transposed, int k) {
  ulong row = simdgroup_matrix<T>::row(), column = simdgroup_matrix<T>::column() + ulong(k);
  if (transposed) {
    const ulong swapped = row;
    row = column;
    column = swapped;
  }
  return (row + origin.y) * stride + column + origin.x;
}
// All lanes take part in what a matrix does.
EMULATED_INLINE void together(const char* file, int line) {
  if (emulated_lanes() != 32) emulated_invalid("a matrix needs 32 lanes", file, line);
  const uint nothing = 0;
  emulated_exchange(&nothing, sizeof nothing, file, line);
}
}  // namespace emulated

template <typename T, typename P>
EMULATED_QUIET void simdgroup_load(simdgroup_matrix<T>& to, P from, ulong stride = 8, ulong2 origin = ulong2{0, 0},
                                   bool transposed = false, EMULATED_PLACE) {
  emulated::together(file, line);
  for (int k = 0; k < 2; ++k) to.elements[k] = from[emulated::place_of<T>(stride, origin, transposed, k)];
}
template <typename T, typename P>
EMULATED_QUIET void simdgroup_store(simdgroup_matrix<T> from, P to, ulong stride = 8, ulong2 origin = ulong2{0, 0},
                                    bool transposed = false, EMULATED_PLACE) {
  emulated::together(file, line);
  for (int k = 0; k < 2; ++k) to[emulated::place_of<T>(stride, origin, transposed, k)] = from.elements[k];
}
// d = a b + c, in float32.
template <typename D, typename A, typename B, typename C>
EMULATED_QUIET void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                                  simdgroup_matrix<C> c, EMULATED_PLACE) {
  float x[2], y[2], sum[2];
  for (int k = 0; k < 2; ++k) {
    x[k] = static_cast<float>(a.elements[k]);
    y[k] = static_cast<float>(b.elements[k]);
    sum[k] = static_cast<float>(c.elements[k]);
  }
  emulated_multiply(x, y, sum, file, line);
  for (int k = 0; k < 2; ++k) d.elements[k] = static_cast<D>(sum[k]);
}
template <typename D, typename A, typename B>
EMULATED_QUIET void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                       EMULATED_PLACE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<float>(0.0f), file, line);
}
}  // namespace metal
