// Integer codes and back. Formula: reference/quantize.py.
#pragma once

#include "math/fake_quant.h"

namespace qk {
inline namespace QK_ISA {

// code = q + zero_point; lo = qmin - zero_point, so q - lo counts from qmin. What has no code (NaN,
// an invalid channel) gets the code of zero.
template <class C>
QK_HD int32_t code_value(C x, const Channel<C>& c, int32_t qmin) {
  const Quantized<C> v = quantize_value<false>(x, c);
  const C q = v.q == v.q ? v.q : qk_clamp(C(0), c.lo, c.hi);
  const C from_qmin = q - c.lo;
  // without a valid zero point: 0, or the nearest code to it (unsigned narrow_range starts at 1)
  const C zero = C(qmin > 0 ? 0 : -qmin);
  return int32_t(from_qmin == from_qmin ? from_qmin : zero) + qmin;
}

// y = (code - zero_point) * scale
template <class C>
QK_HD C dequantize_code(int32_t code, const Channel<C>& c, int32_t qmin) {
  return dequantize_value(C(code - qmin) + c.lo, c);
}

// The low `bits` bits of a packed byte's i-th code, sign-extended if is_signed.
QK_HD int32_t unpack_code(uint32_t byte, int i, int bits, bool is_signed) {
  const int32_t code = int32_t((byte >> (i * bits)) & ((1u << bits) - 1u));
  return is_signed ? code - ((code >> (bits - 1)) << bits) : code;
}

QK_HD uint32_t pack_code(int32_t code, int i, int bits) {
  return (uint32_t(code) & ((1u << bits) - 1u)) << (i * bits);
}

}  // namespace QK_ISA
}  // namespace qk
