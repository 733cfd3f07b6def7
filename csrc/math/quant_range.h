// From a range to scale and zero point. Formula: reference/quant_range.py.
#pragma once

#include "math/numeric.h"

namespace qk {
inline namespace QK_ISA {

// The MSE search shrinks the min-max range by k steps of 1 %; equal to numeric.MSE_* in Python.
constexpr int kMseCandidates = 80;
constexpr double kMseStep = 0.01;

template <class C>
struct Range {
  C lo, hi;
};

template <class C>
struct QParams {
  C scale;
  int32_t zero_point;
};

template <class C>
QK_HD C at_least_smallest(C scale) {
  return scale < Limits<C>::smallest ? Limits<C>::smallest : scale;
}

template <class C>
QK_HD QParams<C> range_to_qparams(Range<C> r, C qmin, C qmax, bool symmetric) {
  if (symmetric) {
    const C scale = qk_max(-r.lo, r.hi) / ((qmax - qmin) / C(2));
    return {at_least_smallest(scale), 0};
  }
  const C lo = qk_min(r.lo, C(0));
  const C hi = qk_max(r.hi, C(0));
  const C scale = at_least_smallest((hi - lo) / (qmax - qmin));
  const C zp = qk_clamp(qmin - qk_rint(lo / scale), qmin, qmax);
  return {scale, int32_t(zp == zp ? zp : qmin)};
}

// A running range moved towards an observed one; weight = 1 - decay. One that is still [0, 0] takes
// the observed as it is, and a bound observed as NaN or infinite leaves its own alone.
template <class C>
QK_HD Range<C> moved_range(Range<C> running, Range<C> observed, C weight) {
  const C by = running.lo != C(0) || running.hi != C(0) ? weight : C(1);
  const C lo = observed.lo - running.lo, hi = observed.hi - running.hi;
  // v - v is NaN for those that are not finite
  return {running.lo + by * (lo - lo == C(0) ? lo : C(0)),
          running.hi + by * (hi - hi == C(0) ? hi : C(0))};
}

// The k-th candidate of the MSE search.
template <class C>
QK_HD Range<C> mse_candidate(Range<C> r, int k) {
  const C shrink = C(1.0 - kMseStep * k);
  return {r.lo * shrink, r.hi * shrink};
}

// LSQ's initial scale from the mean of |x|, which is in double on every backend.
template <class C>
QK_HD C lsq_scale(double mean_abs, int32_t zero_point, int32_t qmin, int32_t qmax, bool symmetric) {
  int32_t qp = qmax > 1 ? qmax : 1;
  if (!symmetric) {
    const int32_t above = qmax - zero_point, below = zero_point - qmin;
    qp = above > below ? above : below;
  }
  return at_least_smallest(C(2.0 * mean_abs / sqrt(double(qp))));
}

// x_(k) + w (x_(k+1) - x_(k)), the linear interpolation between order statistics.
template <class C>
QK_HD C interpolate(C a, C b, C w) {
  return w > C(0) ? a + w * (b - a) : a;
}

}  // namespace QK_ISA
}  // namespace qk
