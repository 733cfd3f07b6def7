// fp16 and bf16 as storage: bits in, float out, and back with round half to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/hd.h"

namespace qk {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline namespace QK_ISA {

template <class To, class From>
QK_HD To qk_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "qk_bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

QK_HD float to_compute(float v) { return v; }

QK_HD double to_compute(double v) { return v; }

QK_HD float to_compute(BFloat16 v) { return qk_bits<float>(uint32_t(v.bits) << 16); }

// The exponent is moved by a multiplication, which is exact and handles subnormals too.
QK_HD float to_compute(Half v) {
  const uint32_t rest = v.bits & 0x7fffu;
  const uint32_t moved = qk_bits<uint32_t>(qk_bits<float>(rest << 13) * 0x1p112f);
  const uint32_t value = rest >= 0x7c00u ? moved | 0x7f800000u : moved;
  return qk_bits<float>(value | (uint32_t(v.bits & 0x8000u) << 16));
}

template <class T>
struct Store;

template <>
struct Store<float> {
  using Compute = float;
  QK_HD static float from(float v) { return v; }
};

template <>
struct Store<double> {
  using Compute = double;
  QK_HD static double from(double v) { return v; }
};

template <>
struct Store<BFloat16> {
  static constexpr bool is_half = false;
  using Compute = float;
  QK_HD static BFloat16 from(float v) {
    const uint32_t bits = qk_bits<uint32_t>(v);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t(v == v ? rounded : 0x7fc0u)};
  }
};

template <>
struct Store<Half> {
  static constexpr bool is_half = true;
  using Compute = float;
  QK_HD static Half from(float v) {
    const uint32_t bits = qk_bits<uint32_t>(v);
    const uint32_t rest = bits & 0x7fffffffu;
    // normal: round the mantissa in place, then move the exponent by 112
    const uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    // subnormal: the addition of 0.5 rounds to a multiple of 2^-24 and leaves it in the low bits
    const uint32_t tiny = qk_bits<uint32_t>(qk_bits<float>(rest) + 0.5f) - 0x3f000000u;
    uint32_t half = rest < 0x38800000u ? tiny : normal;
    half = rest >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    half = rest > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(half | ((bits >> 16) & 0x8000u))};
  }
};

}  // namespace QK_ISA
}  // namespace qk
