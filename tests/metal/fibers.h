// Threads of one threadgroup at a time, as fibers; what they wait for; in which order they run.
#pragma once

enum State : u8 { READY, AT_GROUP, AT_SIMD, AT_EXCHANGE, ENDED };
enum Schedule { FIFO, LIFO, RANDOM };

struct Fiber {
  void* stack;
  State state;
  u8 parity;  // which of two exchange buffers is next
  const char* file;
  int line;
  u32 order;
  EmulatedPositions at;
};

struct Setup {  // as Python fills it
  void (*entry)(u8* const*, const EmulatedPositions*);
  u64 image_low, image_high;
  Buffer* buffers;
  u32 buffer_count, schedule;
  u64 seed;
  u32 group[3], grid[3];  // threads of a group, threads in all
  const u64* groups;      // which run, in order
  u64 group_count;
  long seconds;  // of processor time, at most
};

struct Context {  // clang's: shadows of parameters and results
  u8 parameters[800], result[800], variadic[800], variadic_origins[800];
  u64 variadic_size;
  u8 parameter_origins[800];
  u32 result_origin, unused;
};

struct Run {
  const Setup* setup;
  Fault fault;
  bool failed;
  void* main;
  Fiber* now;
  u32 current, threads, simds, live;
  u64 stack_low;  // of the running fiber
  u32 epoch_group, epoch_device, epoch_start;
  u32 steps_group[32], steps_device[32];
  u32 atomic;  // whether accesses are part of an atomic one
  u32 in_group, in_simd[32];  // how many wait
  u64 random, accesses;
  u8* pointers[MOST_BUFFERS];
  Context context;
  Fiber fibers[MOST_THREADS];
};
static Run R;

asm(R"(
.text
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulated_switch(void** from, void* to);

INLINE u32 simd_of(u32 thread) { return thread / 32; }
INLINE u32 lanes_of(u32 simd) { return R.threads - simd * 32 < 32 ? R.threads - simd * 32 : 32; }
INLINE void clean_result() { memset(R.context.result, 0, 16); }

static void copy_text(char* to, const char* from, u32 size) {
  u32 i = 0;
  for (; from[i] && i + 1 < size; ++i) to[i] = from[i];
  to[i] = 0;
}

// `place`: a return address in the kernel, or null with a file and a line; `other`: where another access was.
static void record(const char* kind, const char* message, const void* place, const char* file = nullptr, u32 line = 0,
                   u64 other = 0) {
  Fault& f = R.fault;
  copy_text(f.kind, kind, sizeof f.kind);
  copy_text(f.message, message, sizeof f.message);
  copy_text(f.file, file ? file : "", sizeof f.file);
  f.line = line;
  f.place = place ? u64(place) - R.setup->image_low : 0;
  f.other = other;
  R.failed = true;
}

// Ends the run.
[[noreturn]] static void fail(const char* kind, const char* message, const void* place, const char* file = nullptr,
                              u32 line = 0, u64 other = 0) {
  record(kind, message, place, file, line, other);
  void* unused;
  emulated_switch(&unused, R.main);
  __builtin_unreachable();
}

INLINE void yield() { emulated_switch(&R.now->stack, R.main); }

static void start() {
  memset(R.context.parameters, 0, sizeof R.context.parameters);
  R.setup->entry(R.pointers, &R.now->at);
  R.now->state = ENDED;
  --R.live;
  yield();
  __builtin_unreachable();
}

static u64 next_random() {
  R.random ^= R.random << 13;
  R.random ^= R.random >> 7;
  R.random ^= R.random << 17;
  return R.random;
}

static void begin_group(u64 group) {
  const Setup& s = *R.setup;
  u32 groups[3], where[3], size[3];
  for (int a = 0; a < 3; ++a) groups[a] = (s.grid[a] + s.group[a] - 1) / s.group[a];
  where[0] = u32(group % groups[0]);
  where[1] = u32(group / groups[0] % groups[1]);
  where[2] = u32(group / groups[0] / groups[1]);
  for (int a = 0; a < 3; ++a) {  // the last one may be smaller
    const u32 left = s.grid[a] - where[a] * s.group[a];
    size[a] = left < s.group[a] ? left : s.group[a];
  }
  R.threads = size[0] * size[1] * size[2];
  R.simds = (R.threads + 31) / 32;
  for (u32 t = 0; t < R.threads; ++t) {
    Fiber& f = R.fibers[t];
    u32 in[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    for (int a = 0; a < 3; ++a) {
      f.at.thread_position_in_threadgroup[a] = in[a];
      f.at.threadgroup_position_in_grid[a] = where[a];
      f.at.thread_position_in_grid[a] = where[a] * s.group[a] + in[a];
      f.at.threads_per_grid[a] = f.at.grid_size[a] = s.grid[a];
      f.at.threads_per_threadgroup[a] = size[a];
      f.at.dispatch_threads_per_threadgroup[a] = s.group[a];
      f.at.threadgroups_per_grid[a] = groups[a];
    }
    f.at.thread_index_in_threadgroup[0] = t;
    f.at.thread_index_in_simdgroup[0] = t % 32;
    f.at.simdgroup_index_in_threadgroup[0] = simd_of(t);
    f.at.simdgroups_per_threadgroup[0] = f.at.dispatch_simdgroups_per_threadgroup[0] = R.simds;
    f.at.threads_per_simdgroup[0] = f.at.thread_execution_width[0] = 32;
    f.state = READY;
    f.parity = 0;
    void** top = (void**)(M.stacks + (t + 1) * STACK - 64);
    *--top = nullptr;          // as if `start` had been called: the stack is 8 off 16
    *--top = (void*)&start;
    f.stack = top - 6;
  }
  R.epoch_start = R.epoch_group = R.epoch_device =
      (R.epoch_group > R.epoch_device ? R.epoch_group : R.epoch_device) + 1;
  R.live = R.threads;
  R.atomic = 0;
  R.in_group = 0;
  memset(R.in_simd, 0, sizeof R.in_simd);
  memset(R.steps_group, 0, sizeof R.steps_group);
  memset(R.steps_device, 0, sizeof R.steps_device);
  memset(M.arena, POISON, M.arena_used);
  memset(M.arena_shadow, 0xFF, M.arena_used);
}

static void describe(char* text, u64 size, const Fiber& f, u32 thread) {
  const char* what[] = {"runs", "waits at a threadgroup_barrier", "waits at a simdgroup_barrier",
                        "waits at a SIMD collective", "has ended"};
  if (f.state == ENDED)
    snprintf(text, size, "thread %u has ended", thread);
  else
    snprintf(text, size, "thread %u %s at line %d", thread, what[f.state], f.line / 1024);
}

// All who live wait, and not for the same: says who keeps whom waiting.
static void record_stuck() {
  u32 waits = 0;
  for (u32 t = 0; t < R.threads; ++t)
    if (R.fibers[t].state != ENDED && (R.fibers[waits].state == ENDED || R.fibers[t].state > R.fibers[waits].state))
      waits = t;
  Fiber& a = R.fibers[waits];
  u32 low = 0, high = R.threads, other = waits;
  if (a.state != AT_GROUP) low = simd_of(waits) * 32, high = low + lanes_of(simd_of(waits));
  for (u32 t = low; t < high; ++t)
    if (R.fibers[t].state != a.state || R.fibers[t].line != a.line || strcmp(R.fibers[t].file, a.file)) other = t;
  char one[120], two[120], both[260];
  describe(one, sizeof one, a, waits);
  describe(two, sizeof two, R.fibers[other], other);
  snprintf(both, sizeof both, "%s, %s", one, two);
  record(a.state == AT_EXCHANGE ? "inactive-lanes" : "divergent-barrier", both, nullptr, a.file, u32(a.line / 1024));
}

static u32 next_ready() {
  const u32 n = R.threads;
  const u32 first = R.setup->schedule == RANDOM ? u32(next_random() % n) : 0;
  for (u32 i = 0; i < n; ++i) {
    u32 t = R.setup->schedule == LIFO ? n - 1 - i : first + i;
    if (t >= n) t -= n;
    if (R.fibers[t].state == READY) return t;
  }
  return n;
}

static void run_group(u64 group) {
  begin_group(group);
  while (R.live && !R.failed) {
    u32 t = next_ready();
    if (t == R.threads) {
      record_stuck();
      return;
    }
    // FIFO and LIFO go through all of them in their order, so that no pass looks at each thread again.
    const bool down = R.setup->schedule == LIFO, one = R.setup->schedule == RANDOM;
    for (u32 i = 0; i < R.threads && !R.failed; ++i) {
      if (R.fibers[t].state == READY) {
        R.current = t;
        R.now = &R.fibers[t];
        R.stack_low = u64(M.stacks + t * STACK);
        emulated_switch(&R.main, R.now->stack);
      }
      if (one) break;
      if (down ? t == 0 : t + 1 == R.threads) break;
      t = down ? t - 1 : t + 1;
    }
  }
}
