// Masks of one bit per element: element i is bit i mod 8 of byte i / 8.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/hd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qk::cpu::QK_ISA {

// Eight bytes of 0 or 1 to the bits of one byte: the product moves byte i to bit 56 + i.
inline uint8_t pack8(const uint8_t* flags) {
  uint64_t v;
  memcpy(&v, flags, 8);
  return uint8_t((v * 0x0102040810204080ull) >> 56);
}

// n flags of 0 or 1 to (n + 7) / 8 bytes; the spare bits of the last byte are 0.
inline void pack_bits(const uint8_t* flags, uint8_t* mask, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(flags + i);
    const uint64_t bits = _mm512_test_epi8_mask(v, v);
    memcpy(mask + i / 8, &bits, 8);
  }
#elif defined(__SSE2__)
  for (; i + 16 <= n; i += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i));
    const uint16_t bits = uint16_t(_mm_movemask_epi8(_mm_slli_epi16(v, 7)));
    memcpy(mask + i / 8, &bits, 2);
  }
#elif defined(__aarch64__)
  const int8_t place[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
  const int8x16_t shift = vld1q_s8(place);
  for (; i + 64 <= n; i += 64) {
    // each flag to the place of its bit; three sums of neighbours bring eight of them together
    const uint8x16_t a = vshlq_u8(vld1q_u8(flags + i), shift);
    const uint8x16_t b = vshlq_u8(vld1q_u8(flags + i + 16), shift);
    const uint8x16_t c = vshlq_u8(vld1q_u8(flags + i + 32), shift);
    const uint8x16_t d = vshlq_u8(vld1q_u8(flags + i + 48), shift);
    const uint8x16_t quarters = vpaddq_u8(vpaddq_u8(a, b), vpaddq_u8(c, d));
    vst1_u8(mask + i / 8, vget_low_u8(vpaddq_u8(quarters, quarters)));
  }
#endif
  for (; i + 8 <= n; i += 8) mask[i / 8] = pack8(flags + i);
  if (i < n) {
    uint8_t rest[8] = {};
    memcpy(rest, flags + i, size_t(n - i));
    mask[i / 8] = pack8(rest);
  }
}

// out = bit ? grad : 0 for the leading whole vectors of words of 2, 4 or 8 bytes; returns how many
// words. What takes the compiler a branch for every word is a few vector instructions.
#if defined(__AVX512BW__)

// The bits of a mask are a vector mask as they lie.
template <class Word>
inline int64_t select_vectors(const Word* grad, const uint8_t* mask, Word* out, int64_t n) {
  constexpr int64_t kWords = 64 / sizeof(Word);
  int64_t i = 0;
  for (; i + kWords <= n; i += kWords) {
    const __m512i v = _mm512_loadu_si512(grad + i);
    uint32_t bits = 0;
    memcpy(&bits, mask + i / 8, kWords / 8);
    __m512i kept;
    if constexpr (sizeof(Word) == 2) {
      kept = _mm512_maskz_mov_epi16(__mmask32(bits), v);
    } else if constexpr (sizeof(Word) == 4) {
      kept = _mm512_maskz_mov_epi32(__mmask16(bits), v);
    } else {
      kept = _mm512_maskz_mov_epi64(__mmask8(bits), v);
    }
    _mm512_storeu_si512(out + i, kept);
  }
  return i;
}

#else

#if defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

// The bits go to every lane, and each lane looks at its own. A word of 8 bytes is two lanes: SSE2
// does not compare longer ones.
template <class Word>
inline int64_t select_vectors(const Word* grad, const uint8_t* mask, Word* out, int64_t n) {
  using Lane = std::conditional_t<sizeof(Word) == 2, uint16_t, uint32_t>;
  typedef Lane Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int64_t kLanesPerWord = sizeof(Word) / sizeof(Lane);
  constexpr int64_t kWords = kVectorBytes / sizeof(Word);
  constexpr int64_t kStep = kWords < 8 ? 8 : kWords;  // whole bytes of the mask
  Vector own[kStep / kWords];
  for (int64_t w = 0; w < kStep; ++w)
    for (int64_t l = 0; l < kLanesPerWord; ++l)
      own[w / kWords][w % kWords * kLanesPerWord + l] = Lane(1u << w);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Lane bits = 0;
    memcpy(&bits, mask + i / 8, kStep / 8);
    for (int64_t k = 0; k < kStep / kWords; ++k) {
      Vector v;
      memcpy(&v, grad + i + k * kWords, sizeof(v));
      v &= ~Vector((own[k] & bits) == 0);
      memcpy(out + i + k * kWords, &v, sizeof(v));
    }
  }
  return i;
}

#endif

}  // namespace qk::cpu::QK_ISA
