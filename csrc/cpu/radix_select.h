// Exact order statistics by radix: keys that order as the values do, and selection by digits.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "math/half.h"

namespace qk::cpu::QK_ISA {

template <class C>
struct KeyOf;

template <>
struct KeyOf<float> {
  using Key = uint32_t;
  using Signed = int32_t;
};

template <>
struct KeyOf<double> {
  using Key = uint64_t;
  using Signed = int64_t;
};

// Negative numbers with all bits turned, the others with the sign turned: unsigned order is the
// order of the values. Returns whether a NaN is among them.
template <class C>
inline bool to_keys(const C* values, int64_t n, typename KeyOf<C>::Key* keys) {
  using Key = typename KeyOf<C>::Key;
  using Signed = typename KeyOf<C>::Signed;
  // read as integers: a bit cast of each value keeps the loop from becoming vector instructions
  typedef Signed __attribute__((may_alias)) Bits;
  const Bits* bits = reinterpret_cast<const Bits*>(values);
  constexpr int top = 8 * sizeof(Key) - 1;
  constexpr Key sign = Key(1) << top;
  const Key infinity = qk_bits<Key>(C(INFINITY));
  Key nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key b = Key(bits[i]);
    keys[i] = b ^ (Key(bits[i] >> top) | sign);
    nan |= Key((b & ~sign) > infinity);
  }
  return nan != 0;
}

template <class C>
inline C from_key(typename KeyOf<C>::Key key) {
  using Key = typename KeyOf<C>::Key;
  constexpr int top = 8 * sizeof(Key) - 1;
  return qk_bits<C>(Key(key >> top ? key ^ (Key(1) << top) : ~key));
}

// The leading digits that a histogram counts.
constexpr int kDigit = 11;
constexpr int64_t kBins = int64_t(1) << kDigit;

// The bin that holds the rank-th element; rank becomes the rank within it. Sums of 32 bins, which
// are vector additions, are passed over first.
template <class Count>
inline int64_t find_bin(const Count* histogram, int64_t bins, int64_t& rank) {
  int64_t b = 0;
  for (; b + 32 < bins; b += 32) {
    int64_t sum = 0;
    for (int64_t i = 0; i < 32; ++i) sum += histogram[b + i];
    if (rank < sum) break;
    rank -= sum;
  }
  for (; b + 1 < bins && rank >= int64_t(histogram[b]); ++b) rank -= histogram[b];
  return b;
}

// Adds counts to those of all threads, if `shared`.
inline void add_counts(const uint32_t* from, int64_t* counts, bool shared) {
  const auto add = [=] {
    for (int64_t b = 0; b < kBins; ++b) counts[b] += from[b];
  };
  if (!shared) return add();
#pragma omp critical(qk_add_counts)
  add();
}

// Takes `count` places of a list that threads fill together; returns the first.
inline int64_t reserve(int64_t& filled, int64_t count, bool shared) {
  int64_t at;
  if (!shared) {
    at = filled;
    filled += count;
    return at;
  }
#pragma omp atomic capture
  {
    at = filled;
    filled += count;
  }
  return at;
}

// The rank-th least of n keys that agree above bit `bits`; reorders keys.
template <class Key>
Key select_key(Key* keys, int64_t n, int bits, int64_t rank) {
  constexpr int kByte = 8;
  while (n > 32 && bits > 0) {
    const int digit = bits < kByte ? bits : kByte;
    const int shift = bits - digit;
    const Key mask = (Key(1) << digit) - 1;
    uint32_t histogram[1 << kByte] = {};
    for (int64_t i = 0; i < n; ++i) ++histogram[(keys[i] >> shift) & mask];
    const Key bin = Key(find_bin(histogram, 1 << kByte, rank));
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      keys[kept] = keys[i];
      kept += ((keys[i] >> shift) & mask) == bin;
    }
    n = kept;
    bits = shift;
  }
  for (int64_t i = 1; i < n; ++i) {  // few are left: insertion sort
    const Key key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
  return keys[rank];
}

// The key that follows `low`, the rank-th of n in any order and not the last: `low` itself if it is
// there again.
template <class Key>
Key successor(const Key* keys, int64_t n, Key low, int64_t rank) {
  int64_t not_above = 0;
  Key next = ~Key(0);
  for (int64_t i = 0; i < n; ++i) {
    not_above += keys[i] <= low;
    next = keys[i] > low && keys[i] < next ? keys[i] : next;
  }
  return not_above > rank + 1 ? low : next;
}

}  // namespace qk::cpu::QK_ISA
