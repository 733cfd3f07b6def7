// Threads and scratch memory of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "math/hd.h"

namespace qk::cpu::QK_ISA {

// Below this many elements per thread, waking it costs more than it brings.
constexpr int64_t kGrain = 16384;

// Elements handled at a time: their working copies stay in the first-level cache, and a multiple of
// 8 keeps every byte of a mask within one thread.
constexpr int64_t kBlock = 512;

inline int64_t blocks_of(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

// Where the blocks before `block` end among n elements.
inline int64_t block_end(int64_t block, int64_t n) {
  return block * kBlock < n ? block * kBlock : n;
}

inline int threads_for(int64_t elements, int threads) {
  const int64_t useful = elements / kGrain;
  return int(useful < 1 ? 1 : (useful < threads ? useful : threads));
}

// f(i) for i in [0, n), in contiguous runs of i per thread.
template <class F>
void parallel_for(int64_t n, int threads, F f) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// An uninitialised array; std::vector would instantiate code that instruction sets could share.
template <class E>
struct Buffer {
  explicit Buffer(int64_t n)
      : data(n > 0 ? static_cast<E*>(malloc(sizeof(E) * size_t(n))) : nullptr) {
    if (n > 0 && !data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  E& operator[](int64_t i) { return data[i]; }
  const E& operator[](int64_t i) const { return data[i]; }
  E* data;
};

}  // namespace qk::cpu::QK_ISA
