// Statistics of the quantization error of the elements of a channel.
#pragma once

#include <type_traits>

#include "cpu/channels.h"
#include "cpu/units.h"

namespace qk::cpu::QK_ISA {

// n errors: their mean, the sum of squared distances from it, how many were clipped.
struct ErrorSums {
  double n, mean, spread, clipped;

  // Chan, Golub and LeVeque 1979; other.n > 0
  void merge(const ErrorSums& other) {
    const double total = n + other.n, distance = other.mean - mean;
    spread += other.spread + distance * distance * (n * other.n / total);
    mean += distance * (other.n / total);
    clipped += other.clipped;
    n = total;
  }
};

constexpr int64_t kErrorBlock = 1024;

// The sum of kLanes lanes, by halves.
template <class E>
inline E fold_lanes(E (&lane)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// The errors of n elements of one channel. Distances are summed from a pivot near the mean, so that
// in float the spread of errors that are far from zero and close to each other is kept. Sums are in
// a fixed order: 16 lanes in C over 1024 elements at a time, then 16 lanes in double.
template <bool kClipValue, class C>
struct ErrorSum {
  // as wide as C, so that both are counted in vectors of as many lanes
  using Count = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

  const C* __restrict x;
  int64_t n;
  Channel<C> channel;
  C pivot;

  ErrorSum(const C* x, int64_t n, const Channel<C>& channel) : x(x), n(n), channel(channel) {
    // the middle one of three: a single large error does not carry it away
    const C a = error(x[0], channel, C(0)), b = error(x[n / 2], channel, C(0));
    const C c = error(x[n - 1], channel, C(0));
    pivot = qk_max(qk_min(a, b), qk_min(qk_max(a, b), c));
  }

  static C error(C v, const Channel<C>& c, C from) {
    return dequantize_value(quantize_value<kClipValue, true>(v, c).q, c) - v - from;
  }

  ErrorSums sums() {
    ErrorSums s = sums_from_pivot();
    // far from the mean (by some large errors at the places looked at) a pivot is of no use
    const double distance = s.mean - double(pivot);
    if (s.n * distance * distance <= 8 * s.spread) return s;
    pivot = C(s.mean);
    return sums_from_pivot();
  }

  ErrorSums sums_from_pivot() const {
    double total[kLanes] = {}, squares[kLanes] = {};
    Count clipped[kLanes] = {};
    for (int64_t b = 0; b < n; b += kErrorBlock)
      add_block(b, n - b < kErrorBlock ? n : b + kErrorBlock, total, squares, clipped);
    const double s = fold_lanes(total), q = fold_lanes(squares);
    const Count k = fold_lanes(clipped);
    const double distance = s / double(n), spread = q - s * distance;
    return {double(n), double(pivot) + distance, spread < 0 ? 0 : spread, double(k)};
  }

  void add_block(int64_t begin, int64_t end, double* total, double* squares, Count* clipped) const {
    C sum[kLanes] = {}, square[kLanes] = {};
    Count outside[kLanes] = {};
    const Channel<C> c = channel;
    const C from = pivot;
    // written out: through a function of its own the loop takes 15 times as long, scalar (GCC 12)
    const auto add = [&](int64_t i, int64_t l) {
      const Quantized<C> v = quantize_value<kClipValue, true>(x[i], c);
      const C d = dequantize_value(v.q, c) - x[i] - from;
      sum[l] += d;
      square[l] += d * d;
      outside[l] += v.inside ? 0 : 1;
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) add(i + l, l);
    for (int64_t l = 0; i < end; ++i, ++l) add(i, l);
    for (int64_t l = 0; l < kLanes; ++l) {
      total[l] += double(sum[l]);
      squares[l] += double(square[l]);
      clipped[l] += outside[l];
    }
  }
};

template <bool kClipValue, class C>
ErrorSums error_sums(const C* x, int64_t n, const Channel<C> channel) {
  return ErrorSum<kClipValue, C>(x, n, channel).sums();
}

}  // namespace qk::cpu::QK_ISA
