// Atomic values of device and threadgroup memory. The runtime hears of an atomic access first, and takes the
// plain ones until its end for part of it.
#pragma once

namespace metal {
template <typename T> struct atomic { T value; };
#define EMULATED_ATOMIC(NAME, RESULT)                                                                     \
  template <typename P, typename V>                                                                       \
  inline auto atomic_##NAME##_explicit(P* p, V v, memory_order) { \
    using T = decltype(p->value);                                                                         \
    emulated_atomic((const void*)&p->value, sizeof(T), 1);                                    \
    T old = p->value;                                                                                     \
    p->value = RESULT;                                                                                    \
    emulated_atomic_end();                                                                                \
    return old;                                                                                           \
  }
EMULATED_ATOMIC(fetch_add, T(old + T(v)))
EMULATED_ATOMIC(fetch_sub, T(old - T(v)))
EMULATED_ATOMIC(fetch_max, (T(v) > old ? T(v) : old))
EMULATED_ATOMIC(fetch_min, (T(v) < old ? T(v) : old))
EMULATED_ATOMIC(fetch_or, T(old | T(v)))
EMULATED_ATOMIC(fetch_and, T(old & T(v)))
EMULATED_ATOMIC(store, T(v))
EMULATED_ATOMIC(exchange, T(v))
template <typename P>
inline auto atomic_load_explicit(P* p, memory_order) {
  emulated_atomic((const void*)&p->value, sizeof(p->value), 0);
  auto value = p->value;
  emulated_atomic_end();
  return value;
}
using atomic_float = atomic<float>;
using atomic_uint = atomic<uint>;
using atomic_int = atomic<int>;
}  // namespace metal
