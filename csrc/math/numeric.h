// Rounding, clamping and limits: the one place for the numerics contract on the C++ side.
// The Python side is qkernels/numeric.py; docs/numerics.md states both in words.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "math/hd.h"

namespace qk {
inline namespace QK_ISA {

template <class C>
struct Limits;

// smallest: below it 1 / scale is not finite. exact: from here on every value is an integer.
template <>
struct Limits<float> {
  static constexpr float smallest = 1.17549435082228750797e-38f;
  static constexpr float largest = 3.40282346638528859812e+38f;
  static constexpr float exact = 8388608.0f;
};

template <>
struct Limits<double> {
  static constexpr double smallest = 2.22507385850720138309e-308;
  static constexpr double largest = 1.79769313486231570815e+308;
  static constexpr double exact = 4503599627370496.0;
};

template <class C>
QK_HD C qk_abs(C v) {
#ifdef __CUDA_ARCH__
  return std::is_same_v<C, float> ? C(fabsf(float(v))) : C(fabs(v));
#else
  return v < C(0) ? -v : v;
#endif
}

// Adding and taking away 2^23 (2^52) leaves an integer rounded by the addition: the same values as
// rint, which without an instruction of its own would be a function call for every element.
template <class C>
QK_HD C rint_by_shift(C v) {
  const C shift = v < C(0) ? -Limits<C>::exact : Limits<C>::exact;
  const C r = (v + shift) - shift;
  return qk_abs(v) < Limits<C>::exact ? r : v;
}

// Half to even; the zero of a negative number may be -0.0. NaN and infinities come back as they
// are.
QK_HD float signed_rint(float v) {
#if QK_HAS_RINT
  return rintf(v);
#else
  return rint_by_shift(v);
#endif
}

QK_HD double signed_rint(double v) {
#if QK_HAS_RINT
  return rint(v);
#else
  return rint_by_shift(v);
#endif
}

// The same, never -0.0.
template <class C>
QK_HD C qk_rint(C v) {
  return signed_rint(v) + C(0);
}

// Whether GPUs have minimum and maximum as one instruction that keeps NaN. It takes -0.0 for less
// than 0.0, where the comparisons below take what comes last: no result depends on it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define QK_HAS_MIN_NAN 1
#else
#define QK_HAS_MIN_NAN 0
#endif

// NaN in either wins.
template <class C>
QK_HD C qk_min(C a, C b) {
#if QK_HAS_MIN_NAN
  if constexpr (std::is_same_v<C, float>) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
  }
#endif
  return (a < b || a != a) ? a : b;
}

template <class C>
QK_HD C qk_max(C a, C b) {
#if QK_HAS_MIN_NAN
  if constexpr (std::is_same_v<C, float>) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
  }
#endif
  return (a > b || a != a) ? a : b;
}

// NaN in v wins; the order of the comparisons is that of minps / maxps.
template <class C>
QK_HD C qk_clamp(C v, C lo, C hi) {
#if QK_HAS_MIN_NAN
  if constexpr (std::is_same_v<C, float>) return qk_min(qk_max(v, lo), hi);
#endif
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class C>
QK_HD C qk_nan() {
  return C(NAN);
}

}  // namespace QK_ISA
}  // namespace qk
