// Ranges of channels; fake_quant_dynamic uses them too.
#pragma once

#include "cpu/units.h"
#include "cpu/work.h"
#include "math/quant_range.h"

namespace qk::cpu::QK_ISA {

// Least and greatest of n elements; NaN wins. lo = inf, hi = -inf of none.
template <class C>
Range<C> minmax(const C* __restrict x, int64_t n) {
  C lo[kLanes], hi[kLanes], sum[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    lo[l] = C(INFINITY);
    hi[l] = -C(INFINITY);
    sum[l] = C(0);
  }
  const auto see = [&](C v, int64_t l) {
    lo[l] = v < lo[l] ? v : lo[l];
    hi[l] = v > hi[l] ? v : hi[l];
    sum[l] = v == v ? sum[l] : v;  // keeps a NaN that the comparisons pass over
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) see(x[i + l], l);
  for (int64_t l = 0; i < n; ++i, ++l) see(x[i], l);
  for (int64_t l = 1; l < kLanes; ++l) {
    lo[0] = qk_min(lo[0], lo[l]);
    hi[0] = qk_max(hi[0], hi[l]);
    sum[0] = sum[0] == sum[0] ? sum[l] : sum[0];
  }
  if (sum[0] != sum[0]) return {sum[0], sum[0]};
  return {lo[0], hi[0]};
}

// Finds the ranges of the channels of one call and what follows from them. `share` is the elements
// that each thread gets of the whole list.
Work* range_work(const QuantRangeParams& p, int64_t share);

// Percentile bounds of every channel, to ranges[channels].
template <class T, class C>
Work* percentile_work(const QuantRangeParams& p, int64_t share, Range<C>* ranges);

}  // namespace qk::cpu::QK_ISA
