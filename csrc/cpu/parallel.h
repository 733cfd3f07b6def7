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

// f(begin, end) over [0, n), cut at multiples of kBlock, one range per thread.
template <class F>
void parallel_ranges(int64_t n, int threads, F f) {
  if (threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  parallel_for(threads, threads, [&](int64_t t) {
    const int64_t begin = blocks * t / threads * kBlock;
    const int64_t end = blocks * (t + 1) / threads * kBlock;
    if (begin < n) f(begin, end < n ? end : n);
  });
}

// An uninitialised array; std::vector would instantiate code that instruction sets could share.
template <class E>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<E*>(malloc(sizeof(E) * size_t(n > 0 ? n : 1)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  E& operator[](int64_t i) { return data[i]; }
  const E& operator[](int64_t i) const { return data[i]; }
  E* data;
};

}  // namespace qk::cpu::QK_ISA
