// A list of calls in few launches. The arguments of up to kMost calls lie side by side in the
// kernel's parameter, and every block finds the call that it works for. One call has a kernel of
// its own: its parameter is a hundred bytes instead of four thousand, which the driver copies at
// each launch, and its arguments have fixed addresses, from which instructions read them directly.
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
template <class Args, bool kOne>
struct Batch {
  static constexpr size_t kBytes = 4096;  // of parameters, on every GPU and driver
  static constexpr int kMost = int((kBytes - 16) / (sizeof(Args) + sizeof(int)));

  int count;
  int first_block[kMost + 1];
  Args items[kMost];
};

template <class Args>
struct Batch<Args, true> {
  Args item;
};

template <class Args, bool kOne>
using BatchKernel = void (*)(Batch<Args, kOne>);

// What this block works for: block `block` of the `blocks` of an item. *work is the item's
// arguments, read anew.
template <class Args, bool kOne>
class Work {
 public:
  int block, blocks;

  __device__ __forceinline__ explicit Work(const Batch<Args, kOne>& batch) : batch_(batch) {
    if constexpr (kOne) {
      block = int(blockIdx.x);
      blocks = int(gridDim.x);
    } else {
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
  }

  __device__ __forceinline__ const Args& operator*() const {
    if constexpr (kOne)
      return batch_.item;
    else
      return batch_.items[opaque(item_)];
  }
  __device__ __forceinline__ const Args* operator->() const { return &**this; }

  __device__ int64_t thread() const { return int64_t(block) * kThreads + threadIdx.x; }
  __device__ int64_t threads() const { return int64_t(blocks) * kThreads; }
  // for blocks of kThreads; an int suffices for a stream_grid
  __device__ int warp() const { return (block * kThreads + int(threadIdx.x)) / kWarp; }
  __device__ int warps() const { return blocks * (kThreads / kWarp); }

 private:
  const Batch<Args, kOne>& batch_;
  int item_ = 0;
};

// Cuts the grid: where more blocks are wanted than `most` together, every block does the work of
// the same number of them, so that all end together.
inline void share_blocks(const int64_t* wanted, int count, int64_t most, int* first_block) {
  int64_t all = 0;
  for (int k = 0; k < count; ++k) all += wanted[k];
  const int64_t rounds = all > most ? ceil_div(all, most) : 1;
  first_block[0] = 0;
  for (int k = 0; k < count; ++k)
    first_block[k + 1] = first_block[k] + int(ceil_div(wanted[k], rounds));
}

struct Grid {
  int threads = kThreads;
  size_t shared_bytes = 0;
  int64_t most_blocks = INT32_MAX / 2;
};

// For kernels whose loop shares out any work: enough blocks to fill the machine several times over,
// whatever their registers, so that its last round costs little.
inline Grid stream_grid() { return {kThreads, 0, int64_t(sm_count()) * 32}; }

// Gathers the calls of one kernel and launches them, kMost at a time.
template <class Args>
class Batcher {
  using Many = Batch<Args, false>;
  using One = Batch<Args, true>;

 public:
  // one: null where it is not worth its code; then `many` takes a single call too
  Batcher(BatchKernel<Args, true> one, BatchKernel<Args, false> many, const Grid& grid,
          Stream stream)
      : one_(one), many_(many), grid_(grid), stream_(stream) {
    static_assert(sizeof(Many) <= Many::kBytes, "too large for a parameter");
    batch_.count = 0;
  }

  // blocks: as many as can work for the call at once
  void add(const Args& args, int64_t blocks) {
    if (batch_.count == Many::kMost) flush();
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
    const bool single = one_ && batch_.count == 1;
    if (!error_)
      error_ = single ? launch(one_, blocks, grid_.threads, grid_.shared_bytes, stream_,
                               One{batch_.items[0]})
                      : launch(many_, blocks, grid_.threads, grid_.shared_bytes, stream_, batch_);
    batch_.count = 0;
  }

  BatchKernel<Args, true> one_;
  BatchKernel<Args, false> many_;
  Grid grid_;
  Stream stream_;
  Error error_ = 0;
  Many batch_;
  int64_t wanted_[Many::kMost];
};

// Runs run(calls of one kind) for each kind; kind_of gives -1 for a call without work.
template <class Call, class KindOf, class Run>
Error for_kinds(const Call* calls, int64_t count, KindOf kind_of, Run run) {
  if (count == 1) return kind_of(calls[0]) < 0 ? 0 : run(std::vector<Call>{calls[0]});
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
