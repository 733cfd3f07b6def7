// A list of calls in few launches. The arguments of up to kMost calls lie side by side in the
// kernel's parameter, and every block finds the call that it works for. A list of one takes the
// same way.
#pragma once

#include <vector>

#include "cuda/launch.h"

namespace qk::cuda {

// The same value, of which the compiler knows nothing: what is read by it in a loop is read anew in
// each turn. Arguments that lie at an unknown place of the parameter would else be kept in
// registers over the loop, at the price of a block or two on each multiprocessor.
__device__ __forceinline__ int opaque(int v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Blocks first_block[k] to first_block[k + 1] work for items[k]. The 54 weights of a ResNet-50 fit
// in one launch with arguments of 71 bytes each (the backward), in two with 147 (most kernels), in
// three with 160 (noise, and the columns of lsq_bwd).
template <class Args>
struct Batch {
  static constexpr size_t kBytes = 4096;  // of parameters, on every GPU and driver
  static constexpr int kMost = int((kBytes - 16) / (sizeof(Args) + sizeof(int)));

  int count;
  int first_block[kMost + 1];
  Args items[kMost];
};

// What this block works for: block `block` of the `blocks` of an item. *work is the item's
// arguments, read anew.
template <class Args>
class Work {
 public:
  int block, blocks;

  __device__ __forceinline__ explicit Work(const Batch<Args>& batch) : batch_(batch) {
    item_ = 0;
    for (int end = batch.count; end - item_ > 1;) {
      const int middle = (item_ + end) / 2;
      if (batch.first_block[middle] <= int(blockIdx.x))
        item_ = middle;
      else
        end = middle;
    }
    const int first = batch.first_block[item_];
    block = int(blockIdx.x) - first;
    blocks = opaque(batch.first_block[item_ + 1] - first);
  }

  __device__ __forceinline__ const Args& operator*() const { return batch_.items[opaque(item_)]; }
  __device__ __forceinline__ const Args* operator->() const { return &**this; }

  __device__ int64_t thread() const { return int64_t(block) * kThreads + threadIdx.x; }
  __device__ int64_t threads() const { return int64_t(blocks) * kThreads; }
  // for blocks of kThreads; an int suffices for a stream_grid
  __device__ int warp() const { return (block * kThreads + int(threadIdx.x)) / kWarp; }
  __device__ int warps() const { return blocks * (kThreads / kWarp); }

 private:
  const Batch<Args>& batch_;
  int item_;
};

// Cuts the grid: every item gets the blocks it wants, or, where they are more than `most` together,
// as many as its part of all that is wanted.
inline void share_blocks(const int64_t* wanted, int count, int64_t most, int* first_block) {
  using Wide = __int128;
  Wide all = 0;
  for (int k = 0; k < count; ++k) all += wanted[k];
  first_block[0] = 0;
  for (int k = 0; k < count; ++k) {
    const Wide blocks = all <= most ? wanted[k] : (Wide(wanted[k]) * most + all - 1) / all;
    first_block[k + 1] = first_block[k] + int(blocks);
  }
}

struct Grid {
  int threads = kThreads;
  size_t shared_bytes = 0;
  int64_t most_blocks = INT32_MAX / 2;
};

// For kernels whose loop shares out any work: enough blocks to fill the machine several times over,
// so that its last round costs little.
inline Grid stream_grid() { return {kThreads, 0, int64_t(sm_count()) * 32}; }

// Gathers the calls of one kernel and launches them, kMost at a time.
template <class Args>
class Batcher {
 public:
  Batcher(void (*kernel)(Batch<Args>), const Grid& grid, Stream stream)
      : kernel_(kernel), grid_(grid), stream_(stream) {
    static_assert(sizeof(Batch<Args>) <= Batch<Args>::kBytes, "too large for a parameter");
    batch_.count = 0;
  }

  // blocks: as many as can work for the call at once
  void add(const Args& args, int64_t blocks) {
    if (batch_.count == Batch<Args>::kMost) flush();
    wanted_[batch_.count] = blocks;
    batch_.items[batch_.count++] = args;
  }

  // Launches what is left. Returns the first error of all launches.
  Error finish() {
    if (batch_.count > 0) flush();
    return error_;
  }

 private:
  void flush() {
    share_blocks(wanted_, batch_.count, grid_.most_blocks, batch_.first_block);
    const int64_t blocks = batch_.first_block[batch_.count];
    if (!error_)
      error_ = launch(kernel_, blocks, grid_.threads, grid_.shared_bytes, stream_, batch_);
    batch_.count = 0;
  }

  void (*kernel_)(Batch<Args>);
  Grid grid_;
  Stream stream_;
  Error error_ = 0;
  Batch<Args> batch_;
  int64_t wanted_[Batch<Args>::kMost];
};

// Runs run(calls of one kind) for each kind; kind_of gives -1 for a call without work.
template <class Call, class KindOf, class Run>
Error for_kinds(const Call* calls, int64_t count, KindOf kind_of, Run run) {
  std::vector<int> kinds;
  for (int64_t k = 0; k < count; ++k) kinds.push_back(kind_of(calls[k]));
  std::vector<Call> group;
  for (int64_t first = 0; first < count; ++first) {
    const int kind = kinds[first];
    if (kind < 0) continue;
    group.clear();
    for (int64_t k = first; k < count; ++k) {
      if (kinds[k] != kind) continue;
      group.push_back(calls[k]);
      kinds[k] = -1;
    }
    const Error error = run(std::as_const(group));
    if (error) return error;
  }
  return 0;
}

}  // namespace qk::cuda
