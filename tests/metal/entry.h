// How the runtime calls a kernel.
#pragma once

namespace metal {
namespace emulated {
template <typename T> struct Buffer {};
template <typename T> struct Buffer<T*> {
  static EMULATED_INLINE T* from(unsigned char* at) { return (T*)at; }
};
template <typename T> struct Buffer<T&> {
  static EMULATED_INLINE T& from(unsigned char* at) { return *(T*)at; }
};
template <typename T> EMULATED_INLINE T buffer(unsigned char* at) { return Buffer<T>::from(at); }
template <typename T> struct Position {
  static EMULATED_INLINE T from(const unsigned* at) { return T(at[0]); }
};
template <> struct Position<uint3> {
  static EMULATED_INLINE uint3 from(const unsigned* at) { return uint3{at[0], at[1], at[2]}; }
};
template <> struct Position<uint2> {
  static EMULATED_INLINE uint2 from(const unsigned* at) { return uint2{at[0], at[1]}; }
};
template <typename T> EMULATED_INLINE T position(const unsigned* at) { return Position<T>::from(at); }
}  // namespace emulated
}  // namespace metal

extern "C" const char emulated_first __asm__("__ehdr_start") __attribute__((visibility("hidden")));
extern "C" const char emulated_last __asm__("_end") __attribute__((visibility("hidden")));
#define EMULATED_PLAIN extern "C" __attribute__((visibility("default"), no_sanitize("kernel-memory")))
EMULATED_PLAIN const char* emulated_low() { return &emulated_first; }
EMULATED_PLAIN const char* emulated_high() { return &emulated_last; }
#define EMULATED_ENTRY EMULATED_PLAIN void emulated_entry
