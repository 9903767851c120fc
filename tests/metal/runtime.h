// What a kernel's text (through metal.h) and the runtime know of each other. Kernel and runtime are two shared objects.
#pragma once

// Where a thread is and how large all is, by Metal's names; a scalar is the first of its three.
#define EMULATED_POSITIONS(_)                                                                                    \
  _(thread_position_in_grid) _(thread_position_in_threadgroup) _(threadgroup_position_in_grid)                   \
  _(threads_per_grid) _(threads_per_threadgroup) _(threadgroups_per_grid) _(grid_size)                           \
  _(thread_index_in_threadgroup) _(thread_index_in_simdgroup) _(simdgroup_index_in_threadgroup)                  \
  _(simdgroups_per_threadgroup) _(threads_per_simdgroup) _(thread_execution_width)                               \
  _(dispatch_threads_per_threadgroup) _(dispatch_simdgroups_per_threadgroup)

struct EmulatedPositions {
#define EMULATED_FIELD(NAME) unsigned NAME[3];
  EMULATED_POSITIONS(EMULATED_FIELD)
#undef EMULATED_FIELD
};

enum EmulatedExchange { EXCHANGE_RESULT = 512, EXCHANGE_DONE = 528, EXCHANGE_BYTES = 544 };

extern "C" {
// `line` is line * 1024 + column, so that two calls in one line are two places.
// Blocks until every thread of the group (scope 0) or of the SIMD group (1) is at this place. order: bit 0 threadgroup
// memory, bit 1 device memory.
void emulated_barrier(int scope, int order, const char* file, int line);
// Leaves `size` bytes with the SIMD group, waits for all its lanes, returns the lanes' values 16 bytes apart. Behind them
// lies a slot for what is made of all, and a byte that is 0 until somebody has filled it.
unsigned char* emulated_exchange(const void* value, unsigned size, const char* file, int line);
// c += a b for 8 x 8 matrices of which each lane holds two elements, as floats; lanes wait for each other.
void emulated_multiply(const float* a, const float* b, float* c, const char* file, int line);
unsigned emulated_lanes();  // lanes of this SIMD group, 32 but in the last one
unsigned emulated_lane();
void emulated_undefined(void* value, unsigned size);  // what is read here from now on is an uninitialised value
void emulated_invalid(const char* what, const char* file, int line);  // does not return
// Here `line` is the line.
void* emulated_threadgroup(unsigned id, unsigned long size, unsigned element, const char* name, const char* file, int line);
void emulated_atomic(const void* address, unsigned size, int writes);
void emulated_atomic_end();
}
