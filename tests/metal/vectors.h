// Vectors of two to four elements, and how they are made of their elements.
#pragma once

namespace metal {
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));

namespace emulated {
template <typename T, int N> struct Made {
  template <typename A> static EMULATED_INLINE void put(vec<T, N>& to, int& at, A value) {
    if constexpr (requires { value.x; }) {
      for (int i = 0; i < int(__builtin_vectorelements(A)); ++i) to[at++] = static_cast<T>(value[i]);
    } else {
      to[at++] = static_cast<T>(value);
    }
  }
  // From one scalar, all elements; else the arguments' elements in order.
  template <typename... A> static EMULATED_INLINE vec<T, N> of(A... values) {
    vec<T, N> made = {};
    int at = 0;
    (put(made, at, values), ...);
    if constexpr (sizeof...(A) == 1) {
      for (int i = at; i < N && at == 1; ++i) made[i] = made[0];
    }
    return made;
  }
};
}  // namespace emulated
}  // namespace metal

#define EMULATED_VECTORS(T)            \
  using T##2 = metal::vec<T, 2>;       \
  using T##3 = metal::vec<T, 3>;       \
  using T##4 = metal::vec<T, 4>;       \
  namespace metal {                    \
  using ::T##2;                        \
  using ::T##3;                        \
  using ::T##4;                        \
  namespace emulated {                 \
  using Made_##T##2 = Made<T, 2>;      \
  using Made_##T##3 = Made<T, 3>;      \
  using Made_##T##4 = Made<T, 4>;      \
  }                                    \
  }
EMULATED_VECTORS(float)
EMULATED_VECTORS(half)
EMULATED_VECTORS(bfloat)
EMULATED_VECTORS(int)
EMULATED_VECTORS(uint)
EMULATED_VECTORS(short)
EMULATED_VECTORS(ushort)
EMULATED_VECTORS(char)
EMULATED_VECTORS(uchar)
EMULATED_VECTORS(long)
EMULATED_VECTORS(ulong)

// float4(a, b, c, d) and the like, which C++ does not take for clang's vectors.
#define float2(...) emulated::Made_float2::of(__VA_ARGS__)
#define float3(...) emulated::Made_float3::of(__VA_ARGS__)
#define float4(...) emulated::Made_float4::of(__VA_ARGS__)
#define half2(...) emulated::Made_half2::of(__VA_ARGS__)
#define half3(...) emulated::Made_half3::of(__VA_ARGS__)
#define half4(...) emulated::Made_half4::of(__VA_ARGS__)
#define bfloat2(...) emulated::Made_bfloat2::of(__VA_ARGS__)
#define bfloat3(...) emulated::Made_bfloat3::of(__VA_ARGS__)
#define bfloat4(...) emulated::Made_bfloat4::of(__VA_ARGS__)
#define int2(...) emulated::Made_int2::of(__VA_ARGS__)
#define int3(...) emulated::Made_int3::of(__VA_ARGS__)
#define int4(...) emulated::Made_int4::of(__VA_ARGS__)
#define uint2(...) emulated::Made_uint2::of(__VA_ARGS__)
#define uint3(...) emulated::Made_uint3::of(__VA_ARGS__)
#define uint4(...) emulated::Made_uint4::of(__VA_ARGS__)
#define short2(...) emulated::Made_short2::of(__VA_ARGS__)
#define short3(...) emulated::Made_short3::of(__VA_ARGS__)
#define short4(...) emulated::Made_short4::of(__VA_ARGS__)
#define ushort2(...) emulated::Made_ushort2::of(__VA_ARGS__)
#define ushort3(...) emulated::Made_ushort3::of(__VA_ARGS__)
#define ushort4(...) emulated::Made_ushort4::of(__VA_ARGS__)
#define char2(...) emulated::Made_char2::of(__VA_ARGS__)
#define char3(...) emulated::Made_char3::of(__VA_ARGS__)
#define char4(...) emulated::Made_char4::of(__VA_ARGS__)
#define uchar2(...) emulated::Made_uchar2::of(__VA_ARGS__)
#define uchar3(...) emulated::Made_uchar3::of(__VA_ARGS__)
#define uchar4(...) emulated::Made_uchar4::of(__VA_ARGS__)
#define long2(...) emulated::Made_long2::of(__VA_ARGS__)
#define long3(...) emulated::Made_long3::of(__VA_ARGS__)
#define long4(...) emulated::Made_long4::of(__VA_ARGS__)
#define ulong2(...) emulated::Made_ulong2::of(__VA_ARGS__)
#define ulong3(...) emulated::Made_ulong3::of(__VA_ARGS__)
#define ulong4(...) emulated::Made_ulong4::of(__VA_ARGS__)

namespace metal {
template <typename V> EMULATED_INLINE auto dot(V a, V b) requires requires { a.x; } {
  auto sum = a[0] * b[0];
  for (int i = 1; i < int(__builtin_vectorelements(V)); ++i) sum += a[i] * b[i];
  return sum;
}
}  // namespace metal
