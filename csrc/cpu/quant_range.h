// Ranges of channels; fake_quant_dynamic uses them too.
#pragma once

#include <type_traits>

#include "cpu/units.h"
#include "cpu/work.h"
#include "math/fake_quant.h"
#include "math/quant_range.h"

namespace qk::cpu::QK_ISA {

// One more element. sum keeps a NaN that the comparisons pass over.
template <class C>
inline void widen_range(C v, C& lo, C& hi, C& sum) {
  lo = v < lo ? v : lo;
  hi = v > hi ? v : hi;
  sum = v == v ? sum : v;
}

// Least and greatest of n elements; NaN wins. lo = inf, hi = -inf of none.
template <class C>
Range<C> minmax(const C* __restrict x, int64_t n) {
  C lo[kLanes], hi[kLanes], sum[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    lo[l] = C(INFINITY);
    hi[l] = -C(INFINITY);
    sum[l] = C(0);
  }
  const auto see = [&](C v, int64_t l) { widen_range(v, lo[l], hi[l], sum[l]); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) see(x[i + l], l);
  for (int64_t l = 0; i < n; ++i, ++l) see(x[i], l);
  static_assert((kLanes & (kLanes - 1)) == 0, "folded by halves");
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) {
      lo[l] = lo[l + width] < lo[l] ? lo[l + width] : lo[l];
      hi[l] = hi[l + width] > hi[l] ? hi[l + width] : hi[l];
      sum[l] = sum[l] == sum[l] ? sum[l + width] : sum[l];
    }
  if (sum[0] != sum[0]) return {sum[0], sum[0]};
  return {lo[0], hi[0]};
}

// Least and greatest of n elements that lie side by side.
template <class T, class C>
Range<C> row_range(const T* x, int64_t n) {
  constexpr int64_t kStep = std::is_same<T, C>::value ? INT64_MAX : Units::kElements;
  C buffer[Units::kElements];
  Range<C> r = {C(INFINITY), -C(INFINITY)};
  for (int64_t b = 0; b < n;) {
    const int64_t m = n - b < kStep ? n - b : kStep;
    const Range<C> s = minmax(load(x + b, buffer, m), m);
    r = {qk_min(r.lo, s.lo), qk_max(r.hi, s.hi)};
    b += m;
  }
  return r;
}

// Rows that are looked at together, a lane each, and the longest for which that is faster.
constexpr int64_t kRows = 8, kShortRow = 16;

// Least and greatest of each of kRows rows of n elements; NaN wins.
template <class C>
void short_row_ranges(const C* __restrict x, int64_t n, Range<C>* ranges) {
  C lo[kRows], hi[kRows], sum[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    lo[r] = C(INFINITY);
    hi[r] = -C(INFINITY);
    sum[r] = C(0);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < kRows; ++r) widen_range(x[r * n + i], lo[r], hi[r], sum[r]);
  for (int64_t r = 0; r < kRows; ++r)
    ranges[r] = sum[r] == sum[r] ? Range<C>{lo[r], hi[r]} : Range<C>{sum[r], sum[r]};
}

// Writes and returns the parameters of channel c, of which r is the range.
template <class C>
Channel<C> range_channel(const QuantRangeParams& p, int64_t c, Range<C> r) {
  const C qmin = C(p.qmin), qmax = C(p.qmax);
  const QParams<C> q = range_to_qparams(r, qmin, qmax, p.symmetric);
  static_cast<C*>(p.scale)[c] = q.scale;
  p.zero_point[c] = q.zero_point;
  return make_channel(q.scale, C(q.zero_point), qmin, qmax);
}

// Channels are handed out whole if they are small next to what each thread gets.
inline bool by_rows(const QuantRangeParams& r, int64_t share) {
  return r.method == Method::minmax && r.layout.outer == 1 && r.layout.inner > 0 &&
         8 * r.layout.inner <= share;
}

// Finds the ranges of the channels of one call and what follows from them. `share` is the elements
// that each thread gets of the whole list.
Work* range_work(const QuantRangeParams& p, int64_t share);

// Percentile bounds of every channel, to ranges[channels].
template <class T, class C>
Work* percentile_work(const QuantRangeParams& p, int64_t share, Range<C>* ranges);

}  // namespace qk::cpu::QK_ISA
