// The one way to launch a kernel, and how its threads talk to each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/kernels.h"

namespace qk::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;

int sm_count();  // of the current device

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for that many warps of work.
inline int64_t blocks_for(int64_t warps) { return ceil_div(warps, kThreads / kWarp); }

template <class... Expected, class... Args>
Error launch(void (*kernel)(Expected...), int64_t blocks, int threads, size_t shared_bytes,
             Stream stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks < INT32_MAX ? blocks : INT32_MAX));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // reported here, so not again by others
  return int(error);
}

// A block's shared memory as one struct; the launch gives sizeof(S) bytes.
template <class S>
__device__ __forceinline__ S& shared() {
  extern __shared__ uint4 shared_memory[];
  return *reinterpret_cast<S*>(shared_memory);
}

// Any struct of whole words from the lane whose index differs by the bits of `lanes`.
template <class V>
__device__ __forceinline__ V shuffle_xor(const V& value, int lanes) {
  static_assert(sizeof(V) % 4 == 0, "shuffles move words of 4 bytes");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, lanes);
  V result;
  memcpy(&result, words, sizeof(V));
  return result;
}

// Sums of each group of `width` lanes (a power of two), in a fixed order, in every lane.
template <class Sum>
__device__ __forceinline__ void reduce_lanes(Sum& sum, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) sum.merge(shuffle_xor(sum, lanes));
}

// The block's sum in every thread. scratch: kWarp sums in shared memory, free again after the next
// barrier.
template <class Sum>
__device__ __forceinline__ void reduce_block(Sum& sum, Sum* scratch) {
  reduce_lanes(sum, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) scratch[warp] = sum;
  __syncthreads();
  sum = lane < int(blockDim.x) / kWarp ? scratch[lane] : Sum();
  reduce_lanes(sum, kWarp);
}

}  // namespace qk::cuda
