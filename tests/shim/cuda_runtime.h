// Stands in for CUDA's header of this name, so that a host compiler builds csrc/cuda/*.cu for tests
// without a GPU: one block at a time, its threads as fibers that take turns at barriers and
// shuffles. Only what csrc/cuda uses is here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum : int { cudaErrorLaunchFailure = 719, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace shim {

// where in the source a thread waits
struct Site {
  const char* file;
  int line;
};

cudaError_t run(const cudaLaunchConfig_t& config, void (*thread)(void*), void* kernel);
void barrier(Site site);
// The words that the lanes of this thread's warp gave, once all have come.
const uint64_t* exchange(unsigned mask, int width, uint64_t word, Site site);
int lane();

template <class V>
uint64_t to_word(V value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "shuffles move 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(V));
  return word;
}

template <class V>
V shuffle(unsigned mask, V value, int from, int width, Site site) {
  const uint64_t word = exchange(mask, width, to_word(value), site)[from & 31];
  memcpy(&value, &word, sizeof(V));
  return value;
}

}  // namespace shim

#define SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_SITE) { shim::barrier({file, line}); }

inline void __syncwarp(unsigned mask = ~0u, SHIM_SITE) {
  shim::exchange(mask, 32, 0, {file, line});
}

template <class V>
V __shfl_sync(unsigned mask, V value, int from, int width = 32, SHIM_SITE) {
  return shim::shuffle(mask, value, from, width, {file, line});
}

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lanes, int width = 32, SHIM_SITE) {
  return shim::shuffle(mask, value, shim::lane() ^ lanes, width, {file, line});
}

template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32, SHIM_SITE) {
  const int from = shim::lane() - int(delta);
  return shim::shuffle(mask, value, from < 0 ? shim::lane() : from, width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int vote, SHIM_SITE) {
  const uint64_t* votes = shim::exchange(mask, 32, vote != 0, {file, line});
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= unsigned(votes[l]) << l;
  return bits;
}

#undef SHIM_SITE

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return uint64_t((unsigned __int128)(a)*b >> 64);
}

// One fiber runs at a time, so these are atomic as they stand.
template <class V>
V atomicAdd(V* to, V value) {
  const V before = *to;
  *to += value;
  return before;
}
template <class V>
V atomicOr(V* to, V value) {
  const V before = *to;
  *to |= value;
  return before;
}

template <class... Expected, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Args&&... args) {
  const std::tuple<Expected...> coerced(args...);  // as they are at the launch
  const auto thread = [&] { std::apply(kernel, coerced); };
  using Thread = decltype(thread);
  return shim::run(
      *config, [](void* t) { (*static_cast<Thread*>(t))(); },
      const_cast<void*>(static_cast<const void*>(&thread)));
}
