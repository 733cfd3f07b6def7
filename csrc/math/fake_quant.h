// Quantize and dequantize one element, and its gradients. Formula: reference/fake_quant.py.
#pragma once

#include "math/numeric.h"

namespace qk {
inline namespace QK_ISA {

// What one channel needs; lo and hi bound code - zero_point.
template <class C>
struct Channel {
  C inv, scale, lo, hi;
};

// Up to here code - zero_point is exact in float for every code; numeric.LARGEST_ZERO_POINT in
// Python.
constexpr int32_t kLargestZeroPoint = 1 << 23;

// A scale that is not positive, finite and normal, or a zero point that is not finite or too large,
// makes inv and scale NaN, and with them every value of the channel.
template <class C>
QK_HD bool channel_valid(C scale, C zero_point) {
  return scale >= Limits<C>::smallest && scale <= Limits<C>::largest &&
         qk_abs(zero_point) <= C(kLargestZeroPoint);
}

template <class C>
QK_HD Channel<C> make_channel(C scale, C zero_point, C qmin, C qmax) {
  const C zp = qk_abs(zero_point) <= C(kLargestZeroPoint) ? qk_rint(zero_point) : qk_nan<C>();
  const C s = channel_valid(scale, zero_point) ? scale : qk_nan<C>();
  return {C(1) / s, s, qmin - zp, qmax - zp};
}

// t = x / scale, q = code - zero_point, inside: where the straight-through gradient passes.
template <class C>
struct Quantized {
  C t, q;
  bool inside;
};

// kAnyZero: for those that do not look at the sign of a zero, which costs an addition.
template <bool kClipValue, bool kAnyZero = false, class C>
QK_HD Quantized<C> quantize_value(C x, const Channel<C>& c) {
  const C t = x * c.inv;
  const C r = kAnyZero ? signed_rint(t) : qk_rint(t);
  const C q = qk_clamp(r, c.lo, c.hi);
  // & and not &&, here and below: a jump can leave a loop scalar (GCC 12)
  const bool inside = kClipValue ? (t >= c.lo) & (t <= c.hi) : r == q;
  return {t, q, inside};
}

// y = (code - zero_point) * scale
template <class C>
QK_HD C dequantize_value(C q, const Channel<C>& c) {
  return q * c.scale;
}

// Contributions of one element to the gradients; NaN elements give none.
template <class C>
struct LsqGrad {
  C x, scale, zero_point;
};

template <bool kClipValue, class C>
QK_HD LsqGrad<C> lsq_grad(C grad, C x, const Channel<C>& c) {
  const Quantized<C> v = quantize_value<kClipValue>(x, c);
  const bool known = v.t == v.t;
  const C slope = v.q - (v.inside ? v.t : C(0));
  return {v.inside ? grad : C(0), known ? grad * slope : C(0),
          known & !v.inside ? grad * -c.scale : C(0)};
}

}  // namespace QK_ISA
}  // namespace qk
