// Memory as a kernel may see it: device buffers, threadgroup arrays, a thread's stack, the exchange slots of SIMD
// groups, constants of the kernel's own object. Every byte has a shadow byte, not 0 where it is uninitialised; elements
// of outputs and of threadgroup arrays also have a cell that says who read and wrote them last.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long;

extern "C" {
void* memcpy(void*, const void*, u64);
void* memmove(void*, const void*, u64);
void* memset(void*, int, u64);
int strcmp(const char*, const char*);
int snprintf(char*, u64, const char*, ...);
void* mmap(void*, u64, int, int, int, long);
int madvise(void*, u64, int);
int mprotect(void*, u64, int);
}
#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

struct Buffer {  // as Python fills it
  const char* name;
  const u8* data;  // what it holds before the launch; null: nothing
  u8* result;      // where it is copied to after the launch; null: it is an input
  u8* written;     // for each byte of the result, whether it was written
  u64 size;
  u32 granule;  // bytes of a cell
  u32 slot;     // its index, set here
  u8* low;      // where the kernel sees it, set here
  struct Cell* cells;
  u64 loaded, stored;  // bytes, by all threads, counted here
  u64 distinct;        // bytes that were loaded, once for each threadgroup; in words of 4; of inputs
};

struct Access {  // the last one of its kind to a cell
  u32 epoch;     // 0: none
  u16 thread;    // SEVERAL: of different SIMD groups; SEVERAL + 1 + simd: of that SIMD group
  u16 step;      // of its SIMD group's barriers
  u32 place : 31;  // in the kernel's object
  u32 atomic : 1;
};
struct alignas(32) Cell {
  Access write, read;
  u32 elsewhere;  // whether other threadgroups read it
};
enum { SEVERAL = 2048 };

struct Array {  // of threadgroup memory
  const char* name;
  u8* low;
  u64 size;
  u32 granule, id;
  Cell* cells;
};

struct Fault {
  char kind[32];
  char message[480];
  char file[240];
  u32 line;  // where file is given
  u64 place, other;  // in the kernel's object, else 0
};

constexpr u64 MARGIN = 128ul << 30, DATA = 64ul << 30, GRAIN = 1ul << 16;
constexpr u64 ARENA = 1ul << 20, STACK = 1ul << 17, MOST_THREADS = 1024, THREADGROUP_BYTES = 32768;
constexpr u64 SPARE_STACKS = 1ul << 20;
constexpr u32 MOST_BUFFERS = 250, MOST_ARRAYS = 120;
constexpr u8 POISON = 0xFF;

struct Memory {
  u8 *heap, *heap_shadow, *arena, *arena_shadow, *stacks, *stacks_shadow, *slots, *slots_shadow;
  u8* grains;      // which buffer a grain of the heap belongs to, + 1
  u8* arena_at;    // which array 16 bytes of the arena belong to, + 1
  Cell *cells, *arena_cells;
  u8* touched;     // blocks of cells that are not all zeros
  u64 heap_used, cells_used, arena_used, arena_cells_used, threadgroup_bytes;
  Buffer* buffers;
  u32 buffer_count, array_count;
  Array arrays[MOST_ARRAYS];
  u64 image_low, image_high;
  u8* zeros;
};
static Memory M;

constexpr u64 CELLS = 48ul << 30, BLOCK = 1024, SLOT_BYTES = 32 * 2 * 1024;

static u8* reserve(u64 bytes) {
  void* at = mmap(nullptr, bytes, 3, 0x4022, -1, 0);  // private, anonymous, without reserve
  return at == (void*)-1 ? nullptr : (u8*)at;
}

static bool memory_ready() {
  if (M.zeros) return true;
  u8* heap = reserve(2 * MARGIN + DATA);
  M.heap_shadow = reserve(DATA);
  M.cells = (Cell*)reserve(CELLS);
  M.grains = reserve(DATA / GRAIN);
  M.touched = reserve(CELLS / sizeof(Cell) / BLOCK);
  M.arena = reserve(ARENA);
  M.arena_shadow = reserve(ARENA);
  M.arena_at = reserve(ARENA / 16);
  M.arena_cells = (Cell*)reserve(ARENA * sizeof(Cell));
  u8* stacks = reserve(SPARE_STACKS + STACK * MOST_THREADS);  // below the first, for a frame too large to be told
  M.stacks_shadow = reserve(STACK * MOST_THREADS);
  M.slots = reserve(SLOT_BYTES);
  M.slots_shadow = reserve(SLOT_BYTES);
  M.zeros = reserve(1 << 16);
  if (!heap || !M.heap_shadow || !M.cells || !M.zeros || !stacks || !M.stacks_shadow) return false;
  M.heap = heap + MARGIN;
  M.stacks = stacks + SPARE_STACKS;
  for (u64 i = 0; i < MOST_THREADS; ++i) mprotect(M.stacks + i * STACK, 4096, 0);  // a stack that overflows is seen
  return true;
}

static void drop(void* at, u64 bytes) {
  if (bytes) madvise(at, (bytes + 4095) & ~4095ul, 4);  // back to zeros
}

// Places the buffers in the heap, each from a grain of its own, at least one grain apart.
static bool place_buffers(Buffer* buffers, u32 count) {
  M.buffers = buffers;
  M.buffer_count = count;
  M.heap_used = GRAIN;
  M.cells_used = 0;
  for (u32 i = 0; i < count; ++i) {
    Buffer& b = buffers[i];
    u64 grains = (b.size + GRAIN - 1) / GRAIN;
    if (M.heap_used + (grains + 1) * GRAIN > DATA) return false;
    b.slot = i;
    b.low = M.heap + M.heap_used;
    memset(M.grains + M.heap_used / GRAIN, int(i + 1), grains);
    if (b.data) {
      memcpy(b.low, b.data, b.size);
    } else {
      memset(b.low, POISON, b.size);
      memset(M.heap_shadow + M.heap_used, 0xFF, b.size);
    }
    if (b.result) {
      b.cells = M.cells + M.cells_used;
      M.cells_used += (b.size / b.granule / BLOCK + 1) * BLOCK;
      if (M.cells_used * sizeof(Cell) > CELLS) return false;
    }
    M.heap_used += (grains + 1) * GRAIN;
  }
  return true;
}

// Calls with (buffer, element) for each element of a result that was written or read.
template <typename Call>
static void each_touched(Call call) {
  for (u32 i = 0; i < M.buffer_count; ++i) {
    const Buffer& b = M.buffers[i];
    const u64 count = b.result ? b.size / b.granule : 0;
    for (u64 block = 0; block * BLOCK < count; ++block) {
      if (!M.touched[u64(b.cells - M.cells) / BLOCK + block]) continue;
      for (u64 e = block * BLOCK; e < count && e < (block + 1) * BLOCK; ++e) call(b, e);
    }
  }
}

static void collect_results() {
  for (u32 i = 0; i < M.buffer_count; ++i)
    if (M.buffers[i].result) memcpy(M.buffers[i].result, M.buffers[i].low, M.buffers[i].size);
  each_touched([](const Buffer& b, u64 e) {
    if (b.cells[e].write.epoch) memset(b.written + e * b.granule, 1, b.granule);
  });
}

static void clear_memory() {
  drop(M.heap, M.heap_used);
  drop(M.heap_shadow, M.heap_used);
  drop(M.cells, M.cells_used * sizeof(Cell));
  memset(M.touched, 0, M.cells_used / BLOCK + 1);
  memset(M.grains, 0, M.heap_used / GRAIN + 1);
  M.buffer_count = 0;
}
