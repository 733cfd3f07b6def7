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

struct Product {
  uint32_t high, low;
};

QK_HD Product multiply(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * uint64_t(b);
#ifdef __CUDA_ARCH__
  return {uint32_t(product >> 32), uint32_t(product)};  // one instruction gives both
#else
  return {uint32_t(product >> 32), a * b};
#endif
}

// The keys of all rounds.
struct PhiloxSeed {
  uint32_t k0, k1;

  QK_HD explicit PhiloxSeed(uint64_t seed) : k0(uint32_t(seed)), k1(uint32_t(seed >> 32)) {}
  QK_HD uint32_t low(int round) const { return k0 + uint32_t(round) * kPhiloxWeyl0; }
  QK_HD uint32_t high(int round) const { return k1 + uint32_t(round) * kPhiloxWeyl1; }
};

// The words of elements 4 quad .. 4 quad + 3.
template <class Keys>
QK_HD PhiloxWords philox(uint64_t quad, const Keys& keys, uint64_t step) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32);
  uint32_t c2 = uint32_t(step), c3 = uint32_t(step >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Product p0 = multiply(kPhiloxMultiplier0, c0), p1 = multiply(kPhiloxMultiplier1, c2);
    c0 = p1.high ^ c1 ^ keys.low(round);
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ keys.high(round);
    c3 = p0.low;
  }
  return {{c0, c1, c2, c3}};
}

QK_HD PhiloxWords philox(uint64_t quad, uint64_t seed, uint64_t step) {
  return philox(quad, PhiloxSeed(seed), step);
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

// a b + c where a b is exact, so that one rounding or two give the same.
QK_HD float add_exact_product(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// sqrt(v) for what normal_radius asks for: -0.0, or 2^-24 and more. A GPU's sqrtf takes the same
// steps for normal numbers, and tests for others before.
QK_HD float radius_of(float v) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(v + 0x1p-80f));  // changes zero alone
  const float root = v * inverse;
  return fmaf(fmaf(-root, root, v), inverse * 0.5f, root);
#else
  return sqrtf(v);
#endif
}

// sqrt(-2 ln u), u = (k + 1) 2^-24 = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2));
// 2 ln(1 + f) = 2 f + f^2 P(f)
QK_HD float normal_radius(uint32_t word) {
  constexpr float kLog[] = {-0.9999998211860657f,  0.6666790246963501f, -0.5000351071357727f,
                            0.3992414176464081f,   -0.33141028881073f,  0.29835978150367737f,
                            -0.28614965081214905f, 0.17469501495361328f};
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const int32_t scaled = qk_bits<int32_t>(float(int32_t(word >> 8) + 1));  // 2^24 u
  const int32_t above = scaled - (kSqrtHalf + (24 << 23));
  const int32_t e = int32_t(uint32_t(above) & 0xff800000u);  // times 2^23
  const float f = qk_bits<float>(above - e + kSqrtHalf) - 1.0f;
  const float ln = float(e) * (0.69314718055994530942f * 0x1p-22f) +
                   add_exact_product(f, 2.0f, f * f * horner(kLog, f));
  return radius_of(-ln);
}

struct Turn {
  float cos, sin;
};

// cos and sin of 2 pi k 2^-24, by quarter turns from [-pi/4, pi/4]. A quarter is 2^30 of the word,
// whose last 8 bits do not count.
QK_HD Turn normal_turn(uint32_t word) {
  constexpr float kSin[] = {-0.16666655242443085f, 0.008332177996635437f, -0.00019517297914717346f};
  constexpr float kCos[] = {0.04166664555668831f, -0.001388736767694354f, 2.443845005473122e-05f};
  constexpr float kStep = 6.28318530717958647693 / 17179869184.0;
  constexpr uint32_t kQuarter = 1u << 30, kSign = 1u << 31;
  const float a = float(int32_t(word * 4 & ~0x3ffu)) * kStep;
  const float z = a * a;
  const float sin = a + a * z * horner(kSin, z);
  const float cos = add_exact_product(z, -0.5f, 1.0f) + z * z * horner(kCos, z);
  const uint32_t nearest = word + kQuarter / 2;
  const bool swap = nearest & kQuarter;
  const float x = swap ? sin : cos, y = swap ? cos : sin;
  return {qk_bits<float>(qk_bits<uint32_t>(x) ^ ((nearest + kQuarter) & kSign)),
          qk_bits<float>(qk_bits<uint32_t>(y) ^ (nearest & kSign))};
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
