// Philox4x32-10 (Salmon et al. 2011) and the draws made from its words. In words and in torch:
// reference/philox.py. Every operation is a rounding of its own, so that all backends agree to the
// bit.
#pragma once

#include "math/half.h"
#include "math/numeric.h"

namespace qk {
inline namespace QK_ISA {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// What a draw adds to the step: steps are below 2^63. Values, or the gates of a Bernoulli mask.
constexpr uint64_t kValues = 0, kGates = uint64_t(1) << 63;
constexpr int64_t kLargestSeed = INT64_MAX;

struct PhiloxWords {
  uint32_t w[4];
};

QK_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
  return uint32_t((uint64_t(a) * uint64_t(b)) >> 32);
}

// The words of elements 4 quad .. 4 quad + 3.
QK_HD PhiloxWords philox(uint64_t quad, uint64_t seed, uint64_t step) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32);
  uint32_t c2 = uint32_t(step), c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = multiply_high(kPhiloxMultiplier0, c0), low0 = kPhiloxMultiplier0 * c0;
    const uint32_t high1 = multiply_high(kPhiloxMultiplier1, c2), low1 = kPhiloxMultiplier1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// (2 k + 1 - 2^24) 2^-25 with k the upper 24 bits: in (-1/2, 1/2), symmetric, exact.
QK_HD float uniform_of(uint32_t word) {
  return float(int32_t(word >> 8) * 2 + 1 - (1 << 24)) * 0x1p-25f;
}

// True with probability threshold / 2^24.
QK_HD bool gate_of(uint32_t word, int32_t threshold) { return int32_t(word >> 8) < threshold; }

// The polynomial with N coefficients, the constant first.
template <int N>
QK_HD float horner(const float (&c)[N], float x) {
  float total = c[N - 1];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = N - 2; i >= 0; --i) total = total * x + c[i];
  return total;
}

// sqrt(-2 ln u), u = (k + 1) 2^-24 = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2));
// ln(1 + f) = f + f^2 P(f)
QK_HD float normal_radius(uint32_t word) {
  constexpr float kLog[] = {-0.49999991059303284f, 0.33333951234817505f, -0.25001755356788635f,
                            0.19962070882320404f,  -0.165705144405365f,  0.14917989075183868f,
                            -0.14307482540607452f, 0.08734750747680664f};
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const float u = float(int32_t(word >> 8) + 1) * 0x1p-24f;
  const int32_t bits = qk_bits<int32_t>(u);
  const int32_t e = (bits - kSqrtHalf) >> 23;
  const float f = qk_bits<float>(bits - int32_t(uint32_t(e) << 23)) - 1.0f;
  const float ln = float(e) * 0.69314718055994530942f + (f + f * f * horner(kLog, f));
  return sqrtf(ln * -2.0f);
}

struct Turn {
  float cos, sin;
};

// cos and sin of 2 pi k 2^-24, by quarter turns from [-pi/4, pi/4]
QK_HD Turn normal_turn(uint32_t word) {
  constexpr float kSin[] = {-0.16666655242443085f, 0.008332177996635437f, -0.00019517297914717346f};
  constexpr float kCos[] = {0.04166664555668831f, -0.001388736767694354f, 2.443845005473122e-05f};
  constexpr float kStep = 6.28318530717958647693 / 16777216.0;
  const int32_t k = int32_t(word >> 8);
  const int32_t quarter = (k + (1 << 21)) >> 22;
  const float a = float(k - quarter * (1 << 22)) * kStep;
  const float z = a * a;
  const float sin = a + a * z * horner(kSin, z);
  const float cos = 1.0f - z * 0.5f + z * z * horner(kCos, z);
  const bool swap = quarter & 1;
  const float x = swap ? sin : cos, y = swap ? cos : sin;
  return {(quarter + 1) & 2 ? -x : x, quarter & 2 ? -y : y};
}

// Elements 2 i and 2 i + 1 from words 2 i and 2 i + 1 (Box and Muller 1958).
struct NormalPair {
  float even, odd;
};

QK_HD NormalPair normal_pair(uint32_t word_even, uint32_t word_odd) {
  const float r = normal_radius(word_even);
  const Turn t = normal_turn(word_odd);
  return {r * t.cos, r * t.sin};
}

}  // namespace QK_ISA
}  // namespace qk
