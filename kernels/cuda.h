// The words of Metal that kernels here use, as CUDA: with this in front their bodies are bodies of CUDA kernels too.
// A body's block is whole warps (SIMD groups); every thread of it takes part in each collective.

#define device
#define constant
#define thread
#define threadgroup __shared__

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;

enum class mem_flags { mem_none, mem_threadgroup, mem_device };

// A barrier of a block orders its shared and its device memory, whatever the flags.
inline __device__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline __device__ void simdgroup_barrier(mem_flags) { __syncwarp(); }

inline __device__ uint thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline __device__ uint3 thread_in_grid() {
  return make_uint3(
      blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z);
}
#define thread_position_in_grid thread_in_grid()
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup thread_index()
#define thread_index_in_simdgroup (thread_index() % 32u)
#define simdgroup_index_in_threadgroup (thread_index() / 32u)

template <typename V>
inline __device__ V simd_shuffle_xor(V value, uint mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <typename V>
inline __device__ V simd_shuffle_down(V value, uint by) { return __shfl_down_sync(0xffffffffu, value, by); }
template <typename V>
inline __device__ V simd_shuffle_up(V value, uint by) { return __shfl_up_sync(0xffffffffu, value, by); }
template <typename V>
inline __device__ V simd_shuffle(V value, uint lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <typename V>
inline __device__ V simd_broadcast(V value, uint lane) { return __shfl_sync(0xffffffffu, value, lane); }

template <typename V>
inline __device__ V simd_sum(V value) {
  for (uint by = 16; by > 0; by /= 2) {
    value += simd_shuffle_xor(value, by);
  }
  return value;
}
template <typename V>
inline __device__ V simd_max(V value) {
  for (uint by = 16; by > 0; by /= 2) {
    const V other = simd_shuffle_xor(value, by);
    value = value < other ? other : value;
  }
  return value;
}
template <typename V>
inline __device__ V simd_min(V value) {
  for (uint by = 16; by > 0; by /= 2) {
    const V other = simd_shuffle_xor(value, by);
    value = other < value ? other : value;
  }
  return value;
}

namespace metal {
inline __device__ float exp(float x) { return ::expf(x); }
inline __device__ float log(float x) { return ::logf(x); }
inline __device__ float tanh(float x) { return ::tanhf(x); }
inline __device__ float sqrt(float x) { return ::sqrtf(x); }
inline __device__ float rsqrt(float x) { return ::rsqrtf(x); }
inline __device__ float floor(float x) { return ::floorf(x); }
inline __device__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline __device__ float abs(float x) { return ::fabsf(x); }
inline __device__ float min(float a, float b) { return ::fminf(a, b); }
inline __device__ float max(float a, float b) { return ::fmaxf(a, b); }
inline __device__ int abs(int x) { return x < 0 ? -x : x; }
inline __device__ int min(int a, int b) { return a < b ? a : b; }
inline __device__ int max(int a, int b) { return a > b ? a : b; }
inline __device__ uint min(uint a, uint b) { return a < b ? a : b; }
inline __device__ uint max(uint a, uint b) { return a > b ? a : b; }
template <typename V>
inline __device__ V clamp(V x, V low, V high) { return min(max(x, low), high); }
template <typename V>
inline __device__ V select(V a, V b, bool second) { return second ? b : a; }
}  // namespace metal
