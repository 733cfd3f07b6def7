// Blocks of elements between storage and compute dtype.
#pragma once

#include "math/half.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qk::cpu::QK_ISA {

// n elements at src as C: src itself if the dtypes agree, else converted into buffer.
inline const float* load(const float* src, float*, int64_t) { return src; }
inline const double* load(const double* src, double*, int64_t) { return src; }

template <class T>
inline const float* load(const T* src, float* buffer, int64_t n) {
  int64_t i = 0;
  // the compiler does not find the instruction that converts fp16 by itself
#if defined(__F16C__)
  if constexpr (sizeof(T) == 2 && Store<T>::is_half) {
    for (; i + 8 <= n; i += 8) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(h));
    }
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 2 && Store<T>::is_half) {
    for (; i + 8 <= n; i += 8) {
      const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(&src[i].bits));
      vst1q_f32(buffer + i, vcvt_f32_f16(vget_low_f16(h)));
      vst1q_f32(buffer + i + 4, vcvt_high_f32_f16(h));
    }
  }
#endif
  for (; i < n; ++i) buffer[i] = to_compute(src[i]);
  return buffer;
}

// Where to compute a block that belongs at dst: dst itself if the dtypes agree, else buffer.
inline float* stage(float* dst, float*) { return dst; }
inline double* stage(double* dst, double*) { return dst; }
template <class T>
inline float* stage(T*, float* buffer) {
  return buffer;
}

// Completes what stage began.
inline void store(float*, const float*, int64_t) {}
inline void store(double*, const double*, int64_t) {}

template <class T>
inline void store(T* dst, const float* buffer, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == 2 && Store<T>::is_half) {
    for (; i + 8 <= n; i += 8) {
      const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), h);
    }
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 2 && Store<T>::is_half) {
    for (; i + 8 <= n; i += 8) {
      const float16x4_t low = vcvt_f16_f32(vld1q_f32(buffer + i));
      const float16x8_t h = vcvt_high_f16_f32(low, vld1q_f32(buffer + i + 4));
      vst1q_u16(&dst[i].bits, vreinterpretq_u16_f16(h));
    }
  }
#endif
  for (; i < n; ++i) dst[i] = Store<T>::from(buffer[i]);
}

}  // namespace qk::cpu::QK_ISA
