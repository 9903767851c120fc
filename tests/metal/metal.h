// Metal Shading Language 3.1 as C++ that clang compiles for the CPU: the part of it that kernels here use.
//
// With CHECK_ADDRESS_SPACES pointers carry their address space, and mixing them up does not compile; that form is never
// run, since clang instruments only plain pointers.
#pragma once
#include "runtime.h"

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using uint8_t = unsigned char;
using int8_t = signed char;
using uint16_t = unsigned short;
using int16_t = short;
using uint32_t = unsigned int;
using int32_t = int;
using uint64_t = unsigned long;
using int64_t = long;
using size_t = unsigned long;
using half = _Float16;
using float16_t = _Float16;
using bfloat = __bf16;
using bfloat16_t = __bf16;

#define EMULATED_TYPE(...) __VA_ARGS__
#ifdef CHECK_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define EMULATED_ARRAY(NAME, ELEMENT, SIZES, ID) static threadgroup EMULATED_TYPE ELEMENT NAME SIZES
#define EMULATED_VALUE(NAME, ELEMENT, ID) static threadgroup EMULATED_TYPE ELEMENT NAME
#else
#define device
#define constant
#define threadgroup
#define EMULATED_ARRAY(NAME, ELEMENT, SIZES, ID)                                                        \
  using NAME##_element = EMULATED_TYPE ELEMENT;                                                         \
  using NAME##_array = NAME##_element SIZES;                                                            \
  NAME##_array& NAME = *static_cast<NAME##_array*>(                                                     \
      emulated_threadgroup(ID, sizeof(NAME##_array), sizeof(NAME##_element), #NAME, __FILE__, __LINE__))
#define EMULATED_VALUE(NAME, ELEMENT, ID)                                                               \
  using NAME##_element = EMULATED_TYPE ELEMENT;                                                         \
  NAME##_element& NAME = *static_cast<NAME##_element*>(                                                 \
      emulated_threadgroup(ID, sizeof(NAME##_element), sizeof(NAME##_element), #NAME, __FILE__, __LINE__))
#endif
#define thread

// Where a call stands: its file, and line * 1024 + column.
#define EMULATED_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE() * 1024 + __builtin_COLUMN()
#define EMULATED_INLINE inline __attribute__((always_inline))
#define EMULATED_QUIET inline __attribute__((always_inline, nodebug))  // its lines are the caller's

#include "vectors.h"

enum class mem_flags { mem_none = 0, mem_threadgroup = 1, mem_device = 2, mem_threadgroup_and_device = 3 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed };

namespace metal {
using ::bfloat;
using ::half;
using ::mem_flags;
using ::memory_order;

template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { using type = T; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <typename A, typename B> inline constexpr bool is_same_v = false;
template <typename A> inline constexpr bool is_same_v<A, A> = true;

// float32 functions; half and bfloat are computed in float32 and rounded, as Metal's are.
#define EMULATED_UNARY(NAME, BUILTIN)                                                       \
  EMULATED_INLINE float NAME(float x) { return BUILTIN(x); }                                \
  EMULATED_INLINE half NAME(half x) { return static_cast<half>(BUILTIN(static_cast<float>(x))); } \
  EMULATED_INLINE bfloat NAME(bfloat x) { return static_cast<bfloat>(BUILTIN(static_cast<float>(x))); }
EMULATED_UNARY(exp, __builtin_expf)
EMULATED_UNARY(exp2, __builtin_exp2f)
EMULATED_UNARY(log, __builtin_logf)
EMULATED_UNARY(log2, __builtin_log2f)
EMULATED_UNARY(tanh, __builtin_tanhf)
EMULATED_UNARY(sqrt, __builtin_sqrtf)
EMULATED_UNARY(floor, __builtin_floorf)
EMULATED_UNARY(ceil, __builtin_ceilf)
EMULATED_UNARY(round, __builtin_roundf)
EMULATED_UNARY(rint, __builtin_rintf)
EMULATED_UNARY(trunc, __builtin_truncf)
EMULATED_UNARY(fabs, __builtin_fabsf)
EMULATED_UNARY(sin, __builtin_sinf)
EMULATED_UNARY(cos, __builtin_cosf)
EMULATED_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
EMULATED_INLINE float pow(float x, float y) { return __builtin_powf(x, y); }
EMULATED_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMULATED_INLINE bool isnan(float x) { return x != x; }
template <typename T> EMULATED_INLINE T abs(T x) { return x < T(0) ? T(-x) : x; }
template <typename T> EMULATED_INLINE T min(T a, T b) { return b < a ? b : a; }
template <typename T> EMULATED_INLINE T max(T a, T b) { return a < b ? b : a; }
EMULATED_INLINE float min(float a, float b) { return __builtin_fminf(a, b); }
EMULATED_INLINE float max(float a, float b) { return __builtin_fmaxf(a, b); }
template <typename T> EMULATED_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T> EMULATED_INLINE T select(T a, T b, bool second) { return second ? b : a; }
EMULATED_UNARY(asin, __builtin_asinf)
EMULATED_UNARY(acos, __builtin_acosf)
EMULATED_UNARY(atan, __builtin_atanf)
EMULATED_UNARY(tan, __builtin_tanf)
EMULATED_UNARY(sinh, __builtin_sinhf)
EMULATED_UNARY(cosh, __builtin_coshf)
EMULATED_UNARY(log10, __builtin_log10f)
EMULATED_UNARY(exp10, __builtin_exp10f)
EMULATED_INLINE half rsqrt(half x) { return static_cast<half>(rsqrt(static_cast<float>(x))); }
EMULATED_INLINE float fmin(float a, float b) { return __builtin_fminf(a, b); }
EMULATED_INLINE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
EMULATED_INLINE float fmod(float a, float b) { return __builtin_fmodf(a, b); }
EMULATED_INLINE float atan2(float a, float b) { return __builtin_atan2f(a, b); }
EMULATED_INLINE float copysign(float a, float b) { return __builtin_copysignf(a, b); }
EMULATED_INLINE float fract(float x) { return x - floor(x); }
EMULATED_INLINE float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
EMULATED_INLINE float mix(float a, float b, float t) { return a + (b - a) * t; }
EMULATED_INLINE float divide(float a, float b) { return a / b; }
EMULATED_INLINE float powr(float x, float y) { return __builtin_powf(x, y); }
EMULATED_INLINE float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
EMULATED_INLINE bool isinf(float x) { return abs(x) == __builtin_inff(); }
EMULATED_INLINE bool isfinite(float x) { return abs(x) < __builtin_inff(); }
EMULATED_INLINE bool signbit(float x) { return __builtin_signbitf(x); }
template <typename To, typename From> EMULATED_INLINE To as_type(From x) { return __builtin_bit_cast(To, x); }
namespace fast { using namespace ::metal; }
namespace precise { using namespace ::metal; }
EMULATED_INLINE uint popcount(uint x) { return uint(__builtin_popcount(x)); }
EMULATED_INLINE uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32; }
EMULATED_INLINE uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32; }

template <typename T> struct numeric_limits;
#define EMULATED_LIMITS(T, LOWEST, HIGHEST)                                             \
  template <> struct numeric_limits<T> {                                                \
    static constexpr T lowest() { return static_cast<T>(LOWEST); }                      \
    static constexpr T max() { return static_cast<T>(HIGHEST); }                        \
    static constexpr T infinity() { return static_cast<T>(__builtin_inff()); }          \
    static constexpr T quiet_NaN() { return static_cast<T>(__builtin_nanf("")); }       \
  };
#define EMULATED_INTEGER_LIMITS(T, LOWEST, HIGHEST)                                     \
  template <> struct numeric_limits<T> {                                                \
    static constexpr T lowest() { return LOWEST; }                                      \
    static constexpr T min() { return LOWEST; }                                         \
    static constexpr T max() { return HIGHEST; }                                        \
  };
EMULATED_LIMITS(float, -3.40282346638528859812e+38f, 3.40282346638528859812e+38f)
EMULATED_LIMITS(half, -65504.0f, 65504.0f)
EMULATED_LIMITS(bfloat, -3.38953138925153547590e+38f, 3.38953138925153547590e+38f)
EMULATED_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647)
EMULATED_INTEGER_LIMITS(uint, 0, 4294967295u)
EMULATED_INTEGER_LIMITS(uchar, 0, 255)
EMULATED_INTEGER_LIMITS(short, -32768, 32767)
EMULATED_INTEGER_LIMITS(ushort, 0, 65535)

inline void threadgroup_barrier(mem_flags flags, EMULATED_PLACE) { emulated_barrier(0, int(flags), file, line); }
inline void simdgroup_barrier(mem_flags flags, EMULATED_PLACE) { emulated_barrier(1, int(flags), file, line); }

}  // namespace metal

#include "lanes.h"
#include "atomics.h"
#include "matrix.h"

using namespace metal;
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159274101257324219f

// elem_to_loc of MLX's utilities: where element `elem` of an array of that shape lies, by its strides.
template <typename Shape, typename Strides>
EMULATED_QUIET size_t elem_to_loc(uint elem, Shape shape, Strides strides, int ndim) {
  size_t loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % uint(shape[i])) * size_t(strides[i]);
    elem /= uint(shape[i]);
  }
  return loc;
}

// Others of MLX's utilities.
template <typename A, typename B> inline A ceildiv(A a, B b) { return (a + b - 1) / b; }
EMULATED_INLINE float log1p(float x) { return __builtin_log1pf(x); }
EMULATED_INLINE bfloat log1p(bfloat x) { return static_cast<bfloat>(__builtin_log1pf(static_cast<float>(x))); }
template <typename T> struct Limits {
  static constexpr T max = numeric_limits<T>::max();
  static constexpr T min = numeric_limits<T>::lowest();
  static constexpr T finite_max = numeric_limits<T>::max();
  static constexpr T finite_min = numeric_limits<T>::lowest();
};
#define EMULATED_FLOAT_LIMITS(T)                                              \
  template <> struct Limits<T> {                                              \
    static constexpr T max = static_cast<T>(__builtin_inff());                \
    static constexpr T min = static_cast<T>(-__builtin_inff());               \
    static constexpr T finite_max = numeric_limits<T>::max();                 \
    static constexpr T finite_min = numeric_limits<T>::lowest();              \
  };
EMULATED_FLOAT_LIMITS(float)
EMULATED_FLOAT_LIMITS(half)
EMULATED_FLOAT_LIMITS(bfloat)

#include "entry.h"
