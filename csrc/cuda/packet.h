// Several elements in one access of up to 16 bytes, and the mask bits of a warp's packets.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "math/half.h"
#include "math/numeric.h"

namespace qk::cuda {

// elements in 16 bytes
template <class T>
constexpr int kVector = 16 / int(sizeof(T));
inline int vector_of(DType dtype) { return dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8; }

// Conversions in one instruction where the machine has one; equal to math/half.h for every value (a
// NaN stays one, with other payload bits).
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(BFloat16 v) { return to_compute(v); }
__device__ __forceinline__ float widen(Half v) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
#else
  return to_compute(v);
#endif
}

// Two values as 2-byte elements in one word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t result;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return uint32_t(Store<T>::from(low).bits) | uint32_t(Store<T>::from(high).bits) << 16;
#endif
}

// The lesser and the greater of two pairs of 2-byte elements; NaN wins.
template <class T>
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b) {
  uint32_t least = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  else
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
#endif
  return least;
}

template <class T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t most = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
#endif
  return most;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<16> {
  using Type = uint4;
};
template <>
struct WordsOf<8> {
  using Type = uint2;
};
template <>
struct WordsOf<4> {
  using Type = uint32_t;
};
template <>
struct WordsOf<2> {
  using Type = uint16_t;
};
template <>
struct WordsOf<1> {
  using Type = uint8_t;
};

// N elements of type T, as they lie in memory. The address must be a multiple of the size.
template <class T, int N>
struct Packet {
  using Words = typename WordsOf<N * sizeof(T)>::Type;

  Words words;

  __device__ static Packet load(const void* base, int64_t element) {
    return {*reinterpret_cast<const Words*>(static_cast<const T*>(base) + element)};
  }

  __device__ void store(void* base, int64_t element) const {
    T* to = static_cast<T*>(base) + element;
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Words) == 16) {
      // written out, because the compiler sometimes stores the words one by one
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                   "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Words*>(to) = words;
  }

  __device__ void elements(T (&v)[N]) const { memcpy(v, &words, sizeof(words)); }

  __device__ static Packet of(const T (&v)[N]) {
    Packet packet;
    memcpy(&packet.words, v, sizeof(packet.words));
    return packet;
  }

  template <class C>
  __device__ void unpack(C (&v)[N]) const {
    if constexpr (std::is_same_v<T, BFloat16> && N > 1) {
      uint32_t pairs[N / 2];
      memcpy(pairs, &words, sizeof(words));
#pragma unroll
      for (int e = 0; e < N; ++e)  // an instruction each, of the word that holds two
        v[e] = qk_bits<float>(e % 2 ? pairs[e / 2] & 0xffff0000u : pairs[e / 2] << 16);
    } else {
      T raw[N];
      elements(raw);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] = widen(raw[e]);
    }
  }

  template <class C>
  __device__ static Packet pack(const C (&v)[N]) {
    if constexpr (sizeof(T) == 2 && N > 1) {
      uint32_t pairs[N / 2];
#pragma unroll
      for (int e = 0; e < N / 2; ++e) pairs[e] = narrow_pair<T>(v[2 * e], v[2 * e + 1]);
      Packet packet;
      memcpy(&packet.words, pairs, sizeof(packet.words));
      return packet;
    } else {
      T raw[N];
#pragma unroll
      for (int e = 0; e < N; ++e) raw[e] = Store<T>::from(v[e]);
      return of(raw);
    }
  }
};

// The least and the greatest element, NaN if one is; halves are compared in pairs.
template <class T, int N, class C>
__device__ __forceinline__ void extremes(const Packet<T, N>& packet, C& lo, C& hi) {
  if constexpr (kHasPairs && sizeof(T) == 2 && N == 8) {
    const uint4 w = packet.words;
    const uint32_t least = min_pair<T>(min_pair<T>(w.x, w.y), min_pair<T>(w.z, w.w));
    const uint32_t most = max_pair<T>(max_pair<T>(w.x, w.y), max_pair<T>(w.z, w.w));
    lo = qk_min(widen(T{uint16_t(least)}), widen(T{uint16_t(least >> 16)}));
    hi = qk_max(widen(T{uint16_t(most)}), widen(T{uint16_t(most >> 16)}));
  } else {
    C v[N];
    packet.unpack(v);
    lo = hi = v[0];
#pragma unroll
    for (int e = 1; e < N; ++e) {
      lo = qk_min(lo, v[e]);
      hi = qk_max(hi, v[e]);
    }
  }
}

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % unsigned(bytes) == 0;
}

// A warp works on tiles of kTilePackets packets a lane. In each round its lanes read neighbouring
// packets, so that an access of the warp covers whole lines.
constexpr int kTilePackets = 4;
template <int N>
constexpr int kTile = kWarp * N * kTilePackets;

// The mask of a tile: lane l of packet u holds the N bits of elements (u kWarp + l) N ...; word has
// those of packet u at bit u N. Four neighbouring lanes exchange bits (a transpose, which undoes
// itself) until lane l has all the bits of the four lanes for packet l mod 4, 4 N of them, which
// are neighbours in memory.
template <int N>
__device__ __forceinline__ uint32_t transpose_mask(uint32_t word, int lane) {
  constexpr uint32_t one = (1u << N) - 1;
  constexpr uint32_t even = one | one << (2 * N), low = one | one << N;
  const bool odd = lane & 1, high = lane & 2;
  uint32_t other = __shfl_xor_sync(kAllLanes, odd ? word & even : (word >> N) & even, 1);
  word = odd ? (word & (even << N)) | other : (word & even) | other << N;
  other = __shfl_xor_sync(kAllLanes, high ? word & low : (word >> (2 * N)) & low, 2);
  return high ? (word & (low << (2 * N))) | other : (word & low) | other << (2 * N);
}

// 4 N bits: what a lane reads or writes of a tile's mask, of kTile / 8 bytes.
template <int N>
using MaskWord = typename WordsOf<N / 2>::Type;

template <int N>
__device__ __forceinline__ int64_t mask_word_index(int64_t tile, int lane) {
  return tile * kWarp + (lane % 4) * (kWarp / 4) + lane / 4;
}

// The N mask bits of each of 8 / N neighbouring lanes as one byte, in the first of them.
template <int N>
__device__ __forceinline__ uint32_t gather_byte(uint32_t bits, int lane) {
#pragma unroll
  for (int lanes = 1; lanes < 8 / N; lanes *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, lanes);
    bits = lane & lanes ? bits : bits | other << (N * lanes);
  }
  return bits;
}

}  // namespace qk::cuda
