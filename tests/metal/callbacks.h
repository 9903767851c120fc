// What instrumented code and metal.h call.
#pragma once

struct Shadow {
  void *shadow, *origin;
};

static const char* where_of(u32 thread) {
  static char text[2][80];
  static int turn;
  char* to = text[turn ^= 1];
  if (thread < SEVERAL)
    snprintf(to, sizeof text[0], "thread %u", thread);
  else if (thread == SEVERAL)
    snprintf(to, sizeof text[0], "several threads");
  else
    snprintf(to, sizeof text[0], "several threads of SIMD group %u", thread - SEVERAL - 1);
  return to;
}

[[noreturn]] static void fail_race(const char* name, u64 element, const char* mine, const char* theirs, const Access& a,
                                   bool across, const void* place) {
  char text[400];
  snprintf(text, sizeof text, "%s, element %lu: %s by thread %u, %s by %s%s, %s", name, element, mine, R.current, theirs,
           across ? "another threadgroup: " : "", where_of(a.thread),
           across ? "groups are never ordered" : "no barrier for this memory between them");
  fail(across ? "race-across-threadgroups" : "race", text, place, nullptr, 0, a.place);
}

// Whether the earlier access is unordered with one of the running thread.
INLINE bool unordered(const Access& a, u32 epoch, u32 step) {
  if (a.epoch != epoch || a.thread == R.current) return false;
  const u32 simd = simd_of(R.current);
  const bool same = a.thread < SEVERAL ? simd_of(a.thread) == simd : a.thread == SEVERAL + 1 + simd;
  return !same || a.step == u16(step);
}

template <bool WRITES, bool DEVICE>
INLINE void track(Cell& c, const char* name, u64 element, const void* place) {
  const u32 epoch = DEVICE ? R.epoch_device : R.epoch_group;
  const u32 step = (DEVICE ? R.steps_device : R.steps_group)[simd_of(R.current)];
  const u32 at = u32(u64(place) - R.setup->image_low), atomic = R.atomic;
  const bool both_atomic = atomic && c.write.atomic;
  if (DEVICE && c.write.epoch && c.write.epoch < R.epoch_start && !both_atomic) {
    fail_race(name, element, WRITES ? "written" : "read", "written", c.write, true, place);
  }
  if (!both_atomic && unordered(c.write, epoch, step)) {
    fail_race(name, element, WRITES ? "written" : "read", "written", c.write, false, place);
  }
  if (WRITES) {
    const bool reads_atomic = atomic && c.read.atomic;
    if (DEVICE && !reads_atomic && (c.elsewhere || (c.read.epoch && c.read.epoch < R.epoch_start))) {
      fail_race(name, element, "written", "read", c.read, true, place);
    }
    if (!reads_atomic && unordered(c.read, epoch, step)) {
      fail_race(name, element, "written", "read", c.read, false, place);
    }
    c.write = {epoch, u16(R.current), u16(step), at, atomic};
    return;
  }
  u16 thread = u16(R.current);
  if (DEVICE && c.read.epoch && c.read.epoch < R.epoch_start) c.elsewhere = 1;
  if (c.read.epoch == epoch && c.read.thread != thread) {
    const u32 simd = simd_of(thread);
    const bool same = c.read.thread < SEVERAL ? simd_of(c.read.thread) == simd : c.read.thread == SEVERAL + 1 + simd;
    thread = !same ? u16(SEVERAL) : c.read.step == u16(step) ? u16(SEVERAL + 1 + simd) : thread;
  }
  c.read = {epoch, thread, u16(step), at, atomic && (c.read.epoch == 0 || c.read.atomic)};
}

[[noreturn]] static void fail_bounds(u64 at, u64 size, bool writes, const void* place) {
  char text[400];
  const char* verb = writes ? "written" : "read";
  if (at - u64(M.stacks) < STACK * MOST_THREADS) {
    snprintf(text, sizeof text, "%lu bytes of another thread's private memory %s by thread %u", size, verb, R.current);
    fail("out-of-bounds", text, place);
  }
  const char *name = "memory", *kind = "no";
  long off = 0;
  u64 of = 0, best = ~0ul;
  auto nearest = [&](const char* n, const char* k, u64 low, u64 bytes) {
    const u64 gap = at < low ? low - at : at >= low + bytes ? at - low - bytes : 0;
    if (gap < best) best = gap, name = n, kind = k, off = long(at - low), of = bytes;
  };
  for (u32 i = 0; i < M.buffer_count; ++i) nearest(M.buffers[i].name, "device", u64(M.buffers[i].low), M.buffers[i].size);
  for (u32 i = 0; i < M.array_count; ++i)
    nearest(M.arrays[i].name, "threadgroup", u64(M.arrays[i].low), M.arrays[i].size);
  snprintf(text, sizeof text, "%s memory %s of %lu bytes: %lu bytes at byte %ld %s by thread %u", kind, name, of, size,
           off, verb, R.current);
  fail("out-of-bounds", text, place);
}

template <bool WRITES>
INLINE Shadow in_heap(u64 at, u64 size, const void* place) {
  const u64 off = at - u64(M.heap);
  const u32 id = M.grains[off / GRAIN];
  if (!id) fail_bounds(at, size, WRITES, place);
  Buffer& b = M.buffers[id - 1];
  const u64 in = at - u64(b.low);
  if (in + size > b.size) fail_bounds(at, size, WRITES, place);
  (WRITES ? b.stored : b.loaded) += size;
  if (!b.result) {
    if (WRITES) {
      char text[200];
      snprintf(text, sizeof text, "input %s written at byte %lu by thread %u", b.name, in, R.current);
      fail("write-to-input", text, place);
    }
    u32* stamps = (u32*)M.heap_shadow;  // inputs have no other shadow
    for (u64 word = off / 4; word <= (off + size - 1) / 4; ++word) {
      if (stamps[word] != R.epoch_start) stamps[word] = R.epoch_start, b.distinct += 4;
    }
    return {M.zeros, M.zeros};
  }
  const u64 last = (in + size - 1) / b.granule;
  M.touched[u64(b.cells - M.cells + last) / BLOCK] = M.touched[u64(b.cells - M.cells + in / b.granule) / BLOCK] = 1;
  for (u64 e = in / b.granule; e <= last; ++e) track<WRITES, true>(b.cells[e], b.name, e, place);
  return {M.heap_shadow + off, M.zeros};
}

template <bool WRITES>
INLINE Shadow in_arena(u64 at, u64 size, const void* place) {
  const u64 off = at - u64(M.arena);
  const u32 id = M.arena_at[off / 16];
  if (!id) fail_bounds(at, size, WRITES, place);
  Array& a = M.arrays[id - 1];
  const u64 in = at - u64(a.low);
  if (in + size > a.size) fail_bounds(at, size, WRITES, place);
  const u64 last = (in + size - 1) / a.granule;
  for (u64 e = in / a.granule; e <= last; ++e) track<WRITES, false>(a.cells[e], a.name, e, place);
  return {M.arena_shadow + off, M.zeros};
}

template <bool WRITES>
INLINE Shadow touch(u64 at, u64 size, const void* place) {
  ++R.accesses;
  if (at - R.stack_low < STACK && at + size <= R.stack_low + STACK) {
    return {M.stacks_shadow + (at - u64(M.stacks)), M.zeros};
  }
  if (at - u64(M.heap) < DATA) return in_heap<WRITES>(at, size, place);
  if (at - u64(M.arena) < ARENA) return in_arena<WRITES>(at, size, place);
  if (at - u64(M.slots) < SLOT_BYTES) return {M.slots_shadow + (at - u64(M.slots)), M.zeros};
  if (!WRITES && at >= R.setup->image_low && at + size <= R.setup->image_high) return {M.zeros, M.zeros};
  fail_bounds(at, size, WRITES, place);
}

#define PLACE __builtin_return_address(0)
#define SIZED(N)                                                                                        \
  EXPORT Shadow __msan_metadata_ptr_for_load_##N(void* at) { return touch<false>(u64(at), N, PLACE); }  \
  EXPORT Shadow __msan_metadata_ptr_for_store_##N(void* at) { return touch<true>(u64(at), N, PLACE); }
SIZED(1) SIZED(2) SIZED(4) SIZED(8)
// Only vectors are that long, and those lie at multiples of 16 bytes.
INLINE void check_vector(u64 at, u64 n, const void* place) {
  if (n >= 16 && at % 16) fail("alignment", "a vector at an address that is no multiple of 16", place);
}
EXPORT Shadow __msan_metadata_ptr_for_load_n(void* at, u64 n) {
  check_vector(u64(at), n, PLACE);
  return touch<false>(u64(at), n, PLACE);
}
EXPORT Shadow __msan_metadata_ptr_for_store_n(void* at, u64 n) {
  check_vector(u64(at), n, PLACE);
  return touch<true>(u64(at), n, PLACE);
}
EXPORT Context* __msan_get_context_state() { return &R.context; }
EXPORT void __msan_poison_alloca(void* at, u64 size, const char*) {
  if (u64(at) < R.stack_low + 4096) fail("stack", "more private memory than 124 KB", PLACE);
  memset(M.stacks_shadow + ((u8*)at - M.stacks), 0xFF, size);
}
EXPORT void __msan_unpoison_alloca(void* at, u64 size) { memset(M.stacks_shadow + ((u8*)at - M.stacks), 0, size); }
EXPORT void __msan_warning(u32) {
  char text[120];
  snprintf(text, sizeof text, "thread %u decides by, or addresses memory with, a value that was never set", R.current);
  fail("uninitialised", text, PLACE);
}
EXPORT u32 __msan_chain_origin(u32 origin) { return origin; }
EXPORT void __msan_instrument_asm_store(void*, u64) {}
static void move(void* to, const void* from, u64 n, const void* place) {
  if (!n) return;
  const Shadow a = touch<false>(u64(from), n, place), b = touch<true>(u64(to), n, place);
  memmove(to, from, n);
  memmove(b.shadow, a.shadow, n);
}
EXPORT void* __msan_memcpy(void* to, const void* from, u64 n) { return move(to, from, n, PLACE), to; }
EXPORT void* __msan_memmove(void* to, const void* from, u64 n) { return move(to, from, n, PLACE), to; }
EXPORT void* __msan_memset(void* to, int value, u64 n) {
  if (n) {
    memset(touch<true>(u64(to), n, PLACE).shadow, 0, n);
    memset(to, value, n);
  }
  return to;
}

struct SourceLocation {
  const char* file;
  u32 line, column;
};
[[noreturn]] static void fail_at(const char* kind, const char* message, const SourceLocation* at) {
  char text[200];
  snprintf(text, sizeof text, "%s, thread %u", message, R.current);
  fail(kind, text, nullptr, at->file, at->line);
}
#define UNDEFINED(NAME, KIND, MESSAGE) \
  EXPORT void __ubsan_handle_##NAME(const SourceLocation* at) { fail_at(KIND, MESSAGE, at); }
UNDEFINED(add_overflow, "overflow", "signed sum overflows")
UNDEFINED(sub_overflow, "overflow", "signed difference overflows")
UNDEFINED(mul_overflow, "overflow", "signed product overflows")
UNDEFINED(negate_overflow, "overflow", "signed negation overflows")
UNDEFINED(divrem_overflow, "division-by-zero", "integer division by zero, or overflow of one")
UNDEFINED(shift_out_of_bounds, "shift", "shift by a negative number or by the width or more")
UNDEFINED(out_of_bounds, "out-of-bounds", "index outside of an array")
UNDEFINED(float_cast_overflow, "conversion", "float that the integer type does not hold")
UNDEFINED(type_mismatch_v1, "alignment", "address not aligned as its type is")
UNDEFINED(load_invalid_value, "conversion", "a value that its type does not have")
UNDEFINED(builtin_unreachable, "unreachable", "a place that is said to be unreachable")
UNDEFINED(missing_return, "unreachable", "a function ends without a result")

EXPORT void __ubsan_handle_local_out_of_bounds_abort() {
  char text[100];
  snprintf(text, sizeof text, "access outside of a private array by thread %u", R.current);
  fail("out-of-bounds", text, PLACE);
}

static void advance(int scope, u32 order, u32 simd) {
  if (scope == 0) {
    R.epoch_group += order & 1;
    R.epoch_device += order >> 1 & 1;
  } else {
    R.steps_group[simd] += order & 1;
    R.steps_device[simd] += order >> 1 & 1;
  }
}

// Waits until all threads of the scope wait in the same state for the same place; the last one wakes them.
static void wait(State state, u32 order, const char* file, int line) {
  const u32 thread = R.current, simd = simd_of(thread);
  Fiber& me = R.fibers[thread];
  me.state = state;
  me.file = file;
  me.line = line;
  me.order = order;
  const u32 low = state == AT_GROUP ? 0 : simd * 32, high = state == AT_GROUP ? R.threads : low + lanes_of(simd);
  u32& waiting = state == AT_GROUP ? R.in_group : R.in_simd[simd];
  if (++waiting == high - low) {
    bool all = true;
    for (u32 t = low; t < high && all; ++t) {
      const Fiber& f = R.fibers[t];
      all = f.state == state && f.line == line && f.order == order && (f.file == file || !strcmp(f.file, file));
    }
    if (all) {
      waiting = 0;
      for (u32 t = low; t < high; ++t) R.fibers[t].state = READY;
      if (state != AT_EXCHANGE) advance(state == AT_GROUP ? 0 : 1, order, simd);
      me.state = READY;
      if (state == AT_EXCHANGE) {  // what is made of all is not yet made
        u8* at = M.slots + (simd * 2 + me.parity) * 1024;
        at[EXCHANGE_DONE] = 0;
        memset(M.slots_shadow + (at - M.slots) + EXCHANGE_RESULT, 0, 32);
      }
    }
  }
  yield();
}

EXPORT void emulated_barrier(int scope, int order, const char* file, int line) {
  wait(scope == 0 ? AT_GROUP : AT_SIMD, u32(order), file, line);
}

EXPORT u8* emulated_exchange(const void* value, u32 size, const char* file, int line) {
  Fiber& me = R.fibers[R.current];
  u8* all = M.slots + (simd_of(R.current) * 2 + me.parity) * 1024;
  u8* mine = all + 16 * (R.current % 32);
  memcpy(mine, value, size);
  memcpy(M.slots_shadow + (mine - M.slots), M.stacks_shadow + ((const u8*)value - M.stacks), size);
  wait(AT_EXCHANGE, size, file, line);
  me.parity ^= 1;
  clean_result();
  return all;
}

// Lane and element of a matrix: lane l holds row (l/4 & 4) + l/2 % 4, columns (l/4 & 2) * 2 + l % 2 * 2 and the next.
static void matrix_of(const u8* all, u32 skip, float (&value)[8][8], u8 (&undefined)[8][8]) {
  for (u32 l = 0; l < 32; ++l) {
    const u32 row = (l / 4 & 4) + l / 2 % 4, column = (l / 4 & 2) * 2 + l % 2 * 2;
    memcpy(&value[row][column], all + 16 * l + skip, 8);
    const u8* shadow = M.slots_shadow + (all - M.slots) + 16 * l + skip;
    for (u32 k = 0; k < 2; ++k) {
      u32 bits;
      memcpy(&bits, shadow + 4 * k, 4);
      undefined[row][column + k] = bits != 0;
    }
  }
}

struct Product {
  float value[8][8];
  u8 undefined[8][8];
};
static Product products[32][2];  // of a SIMD group's last two multiplications

static void multiply(const u8* all, Product& to) {
  float x[8][8], y[8][8];
  u8 no_x[8][8], no_y[8][8];
  matrix_of(all, 0, x, no_x);
  matrix_of(all, 8, y, no_y);
  memset(&to, 0, sizeof to);
  for (u32 i = 0; i < 8; ++i)
    for (u32 k = 0; k < 8; ++k)
      for (u32 j = 0; j < 8; ++j) {
        to.value[i][j] += x[i][k] * y[k][j];
        to.undefined[i][j] |= no_x[i][k] | no_y[k][j];
      }
}

EXPORT void emulated_multiply(const float* a, const float* b, float* c, const char* file, int line) {
  Fiber& me = R.fibers[R.current];
  const u32 simd = simd_of(R.current), parity = me.parity, l = R.current % 32;
  if (lanes_of(simd) != 32) fail("inactive-lanes", "a matrix needs 32 lanes", nullptr, file, u32(line / 1024));
  u8 *all = M.slots + (simd * 2 + parity) * 1024, *mine = all + 16 * l, *shadow = M.slots_shadow + (mine - M.slots);
  memcpy(mine, a, 8);
  memcpy(mine + 8, b, 8);
  memcpy(shadow, M.stacks_shadow + ((const u8*)a - M.stacks), 8);
  memcpy(shadow + 8, M.stacks_shadow + ((const u8*)b - M.stacks), 8);
  wait(AT_EXCHANGE, 16, file, line);
  me.parity ^= 1;
  Product& p = products[simd][parity];
  if (!all[EXCHANGE_DONE]) multiply(all, p);
  all[EXCHANGE_DONE] = 1;
  const u32 row = (l / 4 & 4) + l / 2 % 4, column = (l / 4 & 2) * 2 + l % 2 * 2;
  for (u32 k = 0; k < 2; ++k) {
    c[k] += p.value[row][column + k];
    if (p.undefined[row][column + k]) memset(M.stacks_shadow + ((u8*)(c + k) - M.stacks), 0xFF, 4);
  }
}

EXPORT u32 emulated_lanes() { return clean_result(), lanes_of(simd_of(R.current)); }
EXPORT u32 emulated_lane() { return clean_result(), R.current % 32; }
EXPORT void emulated_undefined(void* value, u32 size) {
  memset(value, POISON, size);
  memset(M.stacks_shadow + ((u8*)value - M.stacks), 0xFF, size);
}
EXPORT void emulated_invalid(const char* what, const char* file, int line) {
  fail("undefined-lane", what, nullptr, file, u32(line / 1024));
}

EXPORT void* emulated_threadgroup(u32 id, u64 size, u32 element, const char* name, const char* file, int line) {
  clean_result();
  if (id < M.array_count) return M.arrays[id].low;
  M.threadgroup_bytes += (size + 15) & ~15ul;
  char text[200];
  if (M.threadgroup_bytes > THREADGROUP_BYTES) {
    snprintf(text, sizeof text, "with %s %lu bytes of threadgroup memory; there are %lu", name, M.threadgroup_bytes,
             THREADGROUP_BYTES);
    fail("threadgroup-memory", text, nullptr, file, u32(line));
  }
  if (id != M.array_count || id == MOST_ARRAYS) fail("compile", "threadgroup arrays out of order", nullptr, file, u32(line));
  Array& a = M.arrays[M.array_count++];
  a = {name, M.arena + M.arena_used + 1024, size, element == 1 || element == 2 ? element : 4, id,
       M.arena_cells + M.arena_cells_used};
  const u64 off = u64(a.low - M.arena), end = (off + size + 15) & ~15ul;
  memset(M.arena_at + off / 16, int(id + 1), (end - off) / 16);
  memset(a.low, POISON, size);
  memset(M.arena_shadow + off, 0xFF, size);
  M.arena_used = end;
  M.arena_cells_used += size / a.granule + 1;
  return a.low;
}

EXPORT void emulated_atomic(const void* address, u32 size, int writes) {
  R.atomic = 1;
  if (writes)
    touch<true>(u64(address), size, PLACE);
  else
    touch<false>(u64(address), size, PLACE);
}
EXPORT void emulated_atomic_end() { R.atomic = 0; }

// A conversion that clang leaves to its library.
EXPORT __bf16 __truncsfbf2(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  u16 out = value != value ? u16(bits >> 16 | 64) : u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &out, 2);
  return result;
}

extern "C" {
struct Action {
  void (*handler)(int, void*, void*);
  u64 mask[16];
  int flags;
  void* restorer;
};
int sigaction(int, const Action*, Action*);
struct AlternateStack {
  void* at;
  int flags;
  u64 size;
};
int sigaltstack(const AlternateStack*, AlternateStack*);
int sigprocmask(int, const u64*, u64*);
struct Timer {
  long again_seconds, again_microseconds, seconds, microseconds;
};
int setitimer(int, const Timer*, Timer*);
}

static bool in_kernel(u64 at) { return at > R.setup->image_low && at < R.setup->image_high; }

enum { BUS_ERROR = 7, BAD_ADDRESS = 11, VIRTUAL_ALARM = 26 };

// An address that no check had seen: a load's comes before the question where its shadow is.
static void on_signal(int number, void* info, void* context) {
  const u64 at = ((u64*)info)[2], pc = ((u64*)context)[5 + 16];
  u64 mask[16] = {};
  mask[0] = 1ul << (number - 1);
  sigprocmask(1, mask, nullptr);
  if (number == VIRTUAL_ALARM) {
    u64 place = pc + 1;  // or, within the runtime, where that was called from
    for (const u64* at = (const u64*)((u64*)context)[5 + 15]; !in_kernel(place) && u64(at + 1) < R.stack_low + STACK; ++at)
      place = *at;
    fail("endless", "the processor time that a launch may take is over", in_kernel(place) ? (void*)place : nullptr);
  }
  if (((int*)info)[2] == 128) {
    fail("alignment", "an address that is not aligned as its type is, or is none", (void*)(pc + 1));
  }
  const u64 in = at - u64(M.stacks);
  if (in < STACK * MOST_THREADS && in % STACK < 4096) fail("stack", "more private memory than 124 KB", (void*)pc);
  fail_bounds(at, 1, false, (void*)(pc + 1));
}

// Results are made of initialised values only.
static void check_results() {
  each_touched([](const Buffer& b, u64 e) {
    u32 undefined = 0;
    memcpy(&undefined, M.heap_shadow + (b.low - M.heap) + e * b.granule, b.granule);
    const Access& a = b.cells[e].write;
    if (!undefined || !a.epoch || R.failed) return;
    char text[200];
    snprintf(text, sizeof text, "%s, element %lu: thread %u writes what comes of a value that was never set", b.name, e,
             a.thread);
    record("uninitialised", text, (void*)(a.place + R.setup->image_low));
  });
}

static bool drive(const Setup& s) {
  for (u64 i = 0; i < s.group_count && !R.failed; ++i) run_group(s.groups[i]);
  if (!R.failed) check_results();
  return !R.failed;
}

EXPORT int emulated_run(const Setup* setup, Fault* fault, u64* accesses) {
  static u8 spare[1 << 16];
  if (!memory_ready()) return 2;
  R.setup = setup;
  R.failed = false;
  R.random = setup->seed * 0x9E3779B97F4A7C15ul + 1;
  R.epoch_group = R.epoch_device = R.epoch_start = 0;
  R.accesses = 0;
  M.image_low = setup->image_low;
  if (!place_buffers(setup->buffers, setup->buffer_count)) return 3;
  for (u32 i = 0; i < setup->buffer_count; ++i) R.pointers[i] = setup->buffers[i].low;
  const int signals[3] = {BAD_ADDRESS, BUS_ERROR, VIRTUAL_ALARM};
  Action old[3], mine = {on_signal, {}, 4 | 0x08000000, nullptr};
  AlternateStack before, alternate = {spare, 0, sizeof spare};
  const Timer limit = {0, 0, setup->seconds, 0}, none = {};
  sigaltstack(&alternate, &before);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &mine, &old[i]);
  setitimer(1, &limit, nullptr);
  const bool fine = drive(*setup);
  setitimer(1, &none, nullptr);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&before, nullptr);
  *accesses = R.accesses;
  if (fine) collect_results();
  else *fault = R.fault;
  clear_memory();
  memset(M.arena_cells, 0, M.arena_cells_used * sizeof(Cell));
  memset(M.arena_at, 0, M.arena_used / 16 + 1);
  M.arena_used = M.arena_cells_used = M.threadgroup_bytes = M.array_count = 0;
  return fine ? 0 : 1;
}
