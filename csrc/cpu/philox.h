// Philox words and draws for runs of elements, in vector registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/parallel.h"
#include "math/philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qk::cpu::QK_ISA {

// One 32-bit word in the low half of each 64-bit lane; what is in the high half is not looked at,
// because the multiplication 32 x 32 -> 64 does not.
#if defined(__AVX512F__)
struct Wide {
  static constexpr int kLanes = 8, kTogether = 4;
  __m512i v;
  static Wide all(uint64_t x) { return {_mm512_set1_epi64(int64_t(x))}; }
  static Wide count() { return {_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)}; }
  Wide plus(Wide o) const { return {_mm512_add_epi64(v, o.v)}; }
  Wide times(Wide o) const { return {_mm512_mul_epu32(v, o.v)}; }
  Wide high() const { return {_mm512_srli_epi64(v, 32)}; }
  Wide exclusive_or(Wide o, Wide p) const { return {_mm512_ternarylogic_epi64(v, o.v, p.v, 0x96)}; }
  // low words of this and of o in turn
  void store_pairs(Wide o, uint32_t* out) const {
    _mm512_storeu_si512(out, _mm512_mask_blend_epi32(0xAAAA, v, _mm512_slli_epi64(o.v, 32)));
  }
};
#elif defined(__AVX2__)
struct Wide {
  static constexpr int kLanes = 4, kTogether = 2;
  __m256i v;
  static Wide all(uint64_t x) { return {_mm256_set1_epi64x(int64_t(x))}; }
  static Wide count() { return {_mm256_set_epi64x(3, 2, 1, 0)}; }
  Wide plus(Wide o) const { return {_mm256_add_epi64(v, o.v)}; }
  Wide times(Wide o) const { return {_mm256_mul_epu32(v, o.v)}; }
  Wide high() const { return {_mm256_srli_epi64(v, 32)}; }
  Wide exclusive_or(Wide o, Wide p) const {
    return {_mm256_xor_si256(_mm256_xor_si256(v, o.v), p.v)};
  }
  void store_pairs(Wide o, uint32_t* out) const {
    const __m256i pairs = _mm256_blend_epi32(v, _mm256_slli_epi64(o.v, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pairs);
  }
};
#elif defined(__SSE2__)
struct Wide {
  static constexpr int kLanes = 2, kTogether = 2;
  __m128i v;
  static Wide all(uint64_t x) { return {_mm_set1_epi64x(int64_t(x))}; }
  static Wide count() { return {_mm_set_epi64x(1, 0)}; }
  Wide plus(Wide o) const { return {_mm_add_epi64(v, o.v)}; }
  Wide times(Wide o) const { return {_mm_mul_epu32(v, o.v)}; }
  Wide high() const { return {_mm_srli_epi64(v, 32)}; }
  Wide exclusive_or(Wide o, Wide p) const { return {_mm_xor_si128(_mm_xor_si128(v, o.v), p.v)}; }
  void store_pairs(Wide o, uint32_t* out) const {
    const __m128i low = _mm_and_si128(v, _mm_set1_epi64x(0xFFFFFFFF));
    const __m128i pairs = _mm_or_si128(low, _mm_slli_epi64(o.v, 32));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), pairs);
  }
};
#elif defined(__aarch64__)
struct Wide {
  static constexpr int kLanes = 2, kTogether = 4;
  uint64x2_t v;
  static Wide all(uint64_t x) { return {vdupq_n_u64(x)}; }
  static Wide count() { return {vcombine_u64(vcreate_u64(0), vcreate_u64(1))}; }
  Wide plus(Wide o) const { return {vaddq_u64(v, o.v)}; }
  Wide times(Wide o) const { return {vmull_u32(vmovn_u64(v), vmovn_u64(o.v))}; }
  Wide high() const { return {vshrq_n_u64(v, 32)}; }
  Wide exclusive_or(Wide o, Wide p) const { return {veorq_u64(veorq_u64(v, o.v), p.v)}; }
  void store_pairs(Wide o, uint32_t* out) const {
    vst1q_u32(out, vreinterpretq_u32_u64(vsliq_n_u64(v, o.v, 32)));
  }
};
#else
struct Wide {
  static constexpr int kLanes = 1, kTogether = 2;
  uint64_t v;
  static Wide all(uint64_t x) { return {x}; }
  static Wide count() { return {0}; }
  Wide plus(Wide o) const { return {v + o.v}; }
  Wide times(Wide o) const { return {uint64_t(uint32_t(v)) * uint32_t(o.v)}; }
  Wide high() const { return {v >> 32}; }
  Wide exclusive_or(Wide o, Wide p) const { return {v ^ o.v ^ p.v}; }
  void store_pairs(Wide o, uint32_t* out) const {
    out[0] = uint32_t(v);
    out[1] = uint32_t(o.v);
  }
};
#endif

// Elements whose draws are made at a time: a block that begins inside a quad, whole vectors of
// quads.
constexpr int64_t kDrawn = kBlock + 128;

// Draws of one kind for one (seed, step).
class Stream {
 public:
  Stream() = default;

  Stream(uint64_t seed, uint64_t step) : step_(step) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      keys_[r][0] = k0;
      keys_[r][1] = k1;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
  }

  // The draws of elements first .. first + n - 1, n <= kBlock; buffer holds kDrawn.
  const float* normals(int64_t first, int64_t n, float* buffer) const {
    alignas(64) uint32_t even[kDrawn / 2], odd[kDrawn / 2];
    const int64_t pairs = words(first, n, even, odd);
    for (int64_t i = 0; i < pairs; ++i) {
      const NormalPair z = normal_pair(even[i], odd[i]);
      buffer[2 * i] = z.even;
      buffer[2 * i + 1] = z.odd;
    }
    return buffer + first % 4;
  }

  const float* uniforms(int64_t first, int64_t n, float* buffer) const {
    alignas(64) uint32_t even[kDrawn / 2], odd[kDrawn / 2];
    const int64_t pairs = words(first, n, even, odd);
    for (int64_t i = 0; i < pairs; ++i) {
      buffer[2 * i] = uniform_of(even[i]);
      buffer[2 * i + 1] = uniform_of(odd[i]);
    }
    return buffer + first % 4;
  }

  const uint8_t* gates(int64_t first, int64_t n, int32_t threshold, uint8_t* buffer) const {
    alignas(64) uint32_t even[kDrawn / 2], odd[kDrawn / 2];
    const int64_t pairs = words(first, n, even, odd);
    for (int64_t i = 0; i < pairs; ++i) {
      buffer[2 * i] = gate_of(even[i], threshold);
      buffer[2 * i + 1] = gate_of(odd[i], threshold);
    }
    return buffer + first % 4;
  }

 private:
  // Words 0 and 2 of each quad in turn to even, 1 and 3 to odd; returns the pairs that n elements
  // take up.
  int64_t words(int64_t first, int64_t n, uint32_t* even, uint32_t* odd) const {
    const int64_t quads = (first % 4 + n + 3) / 4;
    const Wide step_low = Wide::all(step_), step_high = Wide::all(step_ >> 32);
    const Wide m0 = Wide::all(kPhiloxMultiplier0), m1 = Wide::all(kPhiloxMultiplier1);
    // a round waits for its own multiplications: several counters in step fill the time
    constexpr int kStride = Wide::kLanes * Wide::kTogether;
    for (int64_t q = 0; q < quads; q += kStride) {
      Wide c0[Wide::kTogether], c1[Wide::kTogether], c2[Wide::kTogether], c3[Wide::kTogether];
      for (int u = 0; u < Wide::kTogether; ++u) {
        c0[u] = Wide::all(uint64_t(first / 4 + q + u * Wide::kLanes)).plus(Wide::count());
        c1[u] = c0[u].high();
        c2[u] = step_low;
        c3[u] = step_high;
      }
      for (int r = 0; r < kPhiloxRounds; ++r) {
        const Wide k0 = Wide::all(keys_[r][0]), k1 = Wide::all(keys_[r][1]);
        for (int u = 0; u < Wide::kTogether; ++u) {
          const Wide p0 = c0[u].times(m0), p1 = c2[u].times(m1);
          c0[u] = p1.high().exclusive_or(c1[u], k0);
          c2[u] = p0.high().exclusive_or(c3[u], k1);
          c1[u] = p1;
          c3[u] = p0;
        }
      }
      for (int u = 0; u < Wide::kTogether; ++u) {
        c0[u].store_pairs(c2[u], even + 2 * (q + u * Wide::kLanes));
        c1[u].store_pairs(c3[u], odd + 2 * (q + u * Wide::kLanes));
      }
    }
    return 2 * quads;
  }

  uint64_t step_ = 0;
  uint64_t keys_[kPhiloxRounds][2] = {};
};

}  // namespace qk::cpu::QK_ISA
