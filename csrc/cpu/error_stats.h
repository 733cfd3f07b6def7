// Statistics of the quantization error of the elements of a channel.
#pragma once

#include <type_traits>

#include "cpu/channels.h"
#include "cpu/columns.h"
#include "cpu/units.h"

namespace qk::cpu::QK_ISA {

// n errors: their mean, the sum of squared distances from it, how many were clipped.
struct ErrorSums {
  double n, mean, spread, clipped;

  // Whether sums from this pivot are exact enough: one far from the mean (by some large errors at
  // the places looked at) is of no use.
  bool good_pivot(double pivot) const {
    const double distance = mean - pivot;
    return n * distance * distance <= 8 * spread;
  }

  // Chan, Golub and LeVeque 1979; other.n > 0
  void merge(const ErrorSums& other) {
    if (n == 0) {  // as it is: an infinite error must not meet a zero
      *this = other;
      return;
    }
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

// Q(v) - v - from
template <bool kClipValue, class C>
inline C quantization_error(C v, const Channel<C>& c, C from) {
  return dequantize_value(quantize_value<kClipValue, true>(v, c).q, c) - v - from;
}

// A number near the mean error: the middle one of three, so that a single large error does not
// carry it away.
template <bool kClipValue, class C>
inline C error_pivot(C first, C middle, C last, const Channel<C>& channel) {
  const C a = quantization_error<kClipValue>(first, channel, C(0));
  const C b = quantization_error<kClipValue>(middle, channel, C(0));
  const C c = quantization_error<kClipValue>(last, channel, C(0));
  return qk_max(qk_min(a, b), qk_min(qk_max(a, b), c));
}

// As wide as C, so that both are counted in vectors of as many lanes.
template <class C>
using ErrorCount = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

// What sums from a pivot say.
inline ErrorSums sums_of(double n, double pivot, double sum, double squares, double clipped) {
  const double distance = sum / n, spread = squares - sum * distance;
  return {n, pivot + distance, spread < 0 ? 0 : spread, clipped};
}

// The errors of n elements of one channel. Distances are summed from a pivot near the mean, so that
// in float the spread of errors that are far from zero and close to each other is kept. Sums are in
// a fixed order: 16 lanes in C over 1024 elements at a time, then 16 lanes in double.
template <bool kClipValue, class C>
struct ErrorSum {
  using Count = ErrorCount<C>;

  const C* __restrict x;
  int64_t n;
  Channel<C> channel;
  C pivot;

  ErrorSum(const C* x, int64_t n, const Channel<C>& channel)
      : x(x),
        n(n),
        channel(channel),
        pivot(error_pivot<kClipValue>(x[0], x[n / 2], x[n - 1], channel)) {}

  ErrorSums sums() {
    ErrorSums s = sums_from_pivot();
    // far from the mean (by some large errors at the places looked at) a pivot is of no use
    if (s.good_pivot(double(pivot))) return s;
    pivot = C(s.mean);
    return sums_from_pivot();
  }

  ErrorSums sums_from_pivot() const {
    double total[kLanes] = {}, squares[kLanes] = {};
    Count clipped[kLanes] = {};
    for (int64_t b = 0; b < n; b += kErrorBlock)
      add_block(b, n - b < kErrorBlock ? n : b + kErrorBlock, total, squares, clipped);
    const double sum = fold_lanes(total), square = fold_lanes(squares);
    return sums_of(double(n), double(pivot), sum, square, double(fold_lanes(clipped)));
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

// The same sums for up to kWide columns at once, row by row.
template <class C>
struct ErrorColumns {
  static constexpr int64_t kWide = Columns::kWide;

  // Before and after the rows that are summed in C.
  void begin(int64_t n) {
    for (int64_t c = 0; c < n; ++c) sum[c] = square[c] = C(0);
  }
  void end(int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
      total[c] += double(sum[c]);
      squares[c] += double(square[c]);
    }
  }

  template <bool kClipValue>
  void add(const C* __restrict x, int64_t n, const ChannelTable<C>& table, int64_t first) {
    const C* __restrict inv = table.values.data + first;
    const C* __restrict scale = inv + table.channels;
    const C* __restrict lo = scale + table.channels;
    const C* __restrict hi = lo + table.channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) {
      const Channel<C> channel = {inv[c], scale[c], lo[c], hi[c]};
      const Quantized<C> v = quantize_value<kClipValue, true>(x[c], channel);
      const C d = dequantize_value(v.q, channel) - x[c] - pivot[c];
      sum[c] += d;
      square[c] += d * d;
      clipped[c] += v.inside ? 0 : 1;
    }
  }

  ErrorSums of(int64_t c, int64_t rows) const {
    return sums_of(double(rows), double(pivot[c]), total[c], squares[c], double(clipped[c]));
  }

  C pivot[kWide], sum[kWide], square[kWide];
  double total[kWide] = {}, squares[kWide] = {};
  ErrorCount<C> clipped[kWide] = {};
};

}  // namespace qk::cpu::QK_ISA
