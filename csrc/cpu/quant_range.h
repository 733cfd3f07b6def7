// Ranges of channels; fake_quant_dynamic uses them too.
#pragma once

#include "cpu/units.h"
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

// Bounds of every channel; for empty channels {0, 0}.
template <class T, class C>
void minmax_channels(const T* x, const Layout& layout, int threads, Range<C>* out) {
  const Units units(layout);
  const int64_t per_channel = units.per_channel();
  Buffer<Range<C>> partial(units.count());
  parallel_for(units.count(), threads, [&](int64_t u) {
    C buffer[Units::kElements];
    const Unit unit = units[u];
    const C* row = gather(x, unit, units.stride(), buffer);
    partial[units.slot(u)] = minmax(row, unit.rows * unit.length);
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    Range<C> r = per_channel ? partial[c * per_channel] : Range<C>{C(0), C(0)};
    for (int64_t k = 1; k < per_channel; ++k) {
      r.lo = qk_min(r.lo, partial[c * per_channel + k].lo);
      r.hi = qk_max(r.hi, partial[c * per_channel + k].hi);
    }
    out[c] = r;
  }
}

// Replaces each channel's min-max range by the best candidate of the MSE search.
template <class T, class C>
void mse_channels(const QuantRangeParams& p, int threads, Range<C>* ranges);

// Percentile bounds of every channel.
template <class T, class C>
void percentile_channels(const QuantRangeParams& p, int threads, Range<C>* ranges);

// Mean of |x| of every channel.
template <class T, class C>
void mean_abs_channels(const T* x, const Layout& layout, int threads, double* out);

// All of quant_range but the choice of dtype; p.range may be null.
template <class T, class C>
void quant_range_typed(const QuantRangeParams& p, int threads) {
  const int64_t channels = p.layout.channels;
  const T* x = static_cast<const T*>(p.x);
  Buffer<Range<C>> ranges(channels);
  if (p.method == Method::percentile) {
    percentile_channels<T, C>(p, threads, ranges.data);
  } else {
    minmax_channels(x, p.layout, threads, ranges.data);
  }
  if (p.method == Method::mse) mse_channels<T, C>(p, threads, ranges.data);
  C* scale = static_cast<C*>(p.scale);
  C* range = static_cast<C*>(p.range);
  for (int64_t c = 0; c < channels; ++c) {
    const QParams<C> q = range_to_qparams(ranges[c], C(p.qmin), C(p.qmax), p.symmetric);
    scale[c] = q.scale;
    p.zero_point[c] = q.zero_point;
    if (range) {
      range[c] = ranges[c].lo;
      range[channels + c] = ranges[c].hi;
    }
  }
  if (p.method == Method::lsq) {
    Buffer<double> mean(channels);
    mean_abs_channels<T, C>(x, p.layout, threads, mean.data);
    for (int64_t c = 0; c < channels; ++c)
      scale[c] = lsq_scale<C>(mean[c], p.zero_point[c], p.qmin, p.qmax, p.symmetric);
  }
}

}  // namespace qk::cpu::QK_ISA
