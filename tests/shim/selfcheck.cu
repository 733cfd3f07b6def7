// Kernels that use every part of the shim, rightly and wrongly, for tests/test_shim_selfcheck.py.
#include "cuda/batch.h"
#include "cuda/channels.h"

namespace qk::cuda {

struct Scratch {
  uint32_t words[kThreads];
};

// out[t]: the sum of t' < 256 by shared memory and barriers
__global__ void barrier_sum(uint32_t* out) {
  Scratch& s = shared<Scratch>();
  s.words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) s.words[threadIdx.x] += s.words[threadIdx.x + half];
    __syncthreads();
  }
  out[threadIdx.x] = s.words[0];
}

// out[t]: lane ^ 1, lane - 1, lane 5, and the ballot of odd lanes, a byte each
__global__ void shuffles(uint32_t* out) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t pair = __shfl_xor_sync(kAllLanes, lane, 1);
  const uint32_t before = __shfl_up_sync(kAllLanes, lane, 1);
  const uint32_t five = __shfl_sync(kAllLanes, lane, 5);
  const uint32_t odd = __ballot_sync(kAllLanes, lane % 2);
  __syncwarp();
  out[threadIdx.x] = pair | before << 8 | five << 16 | (odd & 0xff) << 24;
}

__global__ void atomics(uint32_t* out) {
  atomicAdd(&out[0], threadIdx.x);
  atomicOr(&out[1], 1u << (threadIdx.x % 32));
}

// out[t]: shared memory that nobody wrote
__global__ void uninitialised(uint32_t* out) {
  out[threadIdx.x] = shared<Scratch>().words[threadIdx.x];
}

__global__ void barrier_in_a_branch(uint32_t*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(uint32_t*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_in_a_branch(uint32_t* out) {
  if (threadIdx.x % kWarp < 5) out[0] = __shfl_xor_sync(kAllLanes, 1u, 1);
}

__global__ void beyond_shared(uint32_t*) { shared<Scratch>().words[threadIdx.x] = 0; }

__global__ void misaligned(uint32_t* out) { *reinterpret_cast<uint4*>(out + 1) = {1, 2, 3, 4}; }

__global__ void out_of_bounds(uint32_t* out) { shared<Scratch>().words[threadIdx.x + out[0]] = 1; }

using Kernel = void (*)(uint32_t*);
constexpr Kernel kernels[] = {barrier_sum,
                              shuffles,
                              atomics,
                              uninitialised,
                              barrier_in_a_branch,
                              two_barriers,
                              shuffle_in_a_branch,
                              beyond_shared,
                              misaligned,
                              out_of_bounds};

}  // namespace qk::cuda

extern "C" int shim_selfcheck(int kernel, uint32_t* out, size_t shared_bytes) {
  using namespace qk::cuda;
  return launch(kernels[kernel], 1, kThreads, shared_bytes, nullptr, out);
}

// How a batch cuts its grid
extern "C" void shim_share_blocks(const int64_t* wanted, int count, int64_t most, int* first) {
  qk::cuda::share_blocks(wanted, count, most, first);
}

// n / d by FastDivision, to compare with the machine's division
extern "C" int64_t shim_fast_quotient(int64_t n, int64_t d) {
  return qk::cuda::FastDivision(d).quotient(n);
}

// The mask words of a warp's tile after the exchange: words[lane] holds 4 N bits.
template <int N>
__global__ void transpose_kernel(uint32_t* words) {
  words[threadIdx.x] = qk::cuda::transpose_mask<N>(words[threadIdx.x], int(threadIdx.x));
}

extern "C" int shim_transpose(int n, uint32_t* words) {
  const auto kernel = n == 2   ? transpose_kernel<2>
                      : n == 4 ? transpose_kernel<4>
                               : transpose_kernel<8>;
  return qk::cuda::launch(kernel, 1, 32, 0, nullptr, words);
}
