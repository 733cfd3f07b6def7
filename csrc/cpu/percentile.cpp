// Exact percentiles per channel: a histogram of the leading digit finds the bins that hold the
// wanted ranks, one more read collects their keys, and the rest happens in that small set.
#include "cpu/quant_range.h"
#include "cpu/radix_select.h"

namespace qk::cpu::QK_ISA {

// One channel, read unit by unit as keys.
template <class T, class C>
struct ChannelKeys {
  using Key = typename KeyOf<C>::Key;
  static constexpr int kWidth = 8 * sizeof(Key);
  static constexpr int64_t kCached = 1 << 16;  // so many keys are kept after the first read

  ChannelKeys(const T* x, const Units& units, int64_t channel, int threads)
      : x(x),
        units(units),
        channel(channel),
        threads(threads),
        n(units.layout.outer * units.layout.inner),
        cache(n <= kCached ? n : 0) {}

  const T* x;
  const Units& units;
  int64_t channel;
  int threads;
  int64_t n;
  Buffer<Key> cache;

  bool has_nan = false;

  // Calls f(keys, count) for every unit, on all threads; the order must not matter to f. The first
  // read fills the cache and looks for NaN.
  template <class F>
  void each_unit(bool first_read, F f) {
    parallel_for(units.per_channel(), threads, [&](int64_t k) {
      const int64_t o = k / units.blocks_inner, i = k % units.blocks_inner;
      const Unit unit = units[(o * units.layout.channels + channel) * units.blocks_inner + i];
      const int64_t m = unit.rows * unit.length;
      const int64_t at = (o * units.rows) * units.layout.inner + i * Units::kElements;
      Key local[Units::kElements];
      Key* keys = n <= kCached ? cache.data + at : local;
      if (first_read || n > kCached) {
        C buffer[Units::kElements];
        const C* row = gather(x, unit, units.stride(), buffer);
        if (to_keys(row, m, keys)) {
#pragma omp atomic write
          has_nan = true;
        }
      }
      f(keys, m);
    });
  }

  static int digit_after(int above) { return kWidth - above < kDigit ? kWidth - above : kDigit; }

  // Counts of the digit that follows the top `above` bits, among keys that begin with prefix.
  void histogram(Key prefix, int above, int64_t* counts) {
    const int digit = digit_after(above);
    const int shift = kWidth - above - digit;
    const Key low = (Key(1) << digit) - 1;
    memset(counts, 0, sizeof(int64_t) * kBins);
    each_unit(above == 0, [&](const Key* keys, int64_t m) {
      uint16_t even[kBins] = {}, odd[kBins] = {};  // a unit has too few keys to overflow
      if (above == 0) {
        // neighbours often share a bin: two counters in turn do not wait for each other
        int64_t j = 0;
        for (; j + 2 <= m; j += 2) {
          ++even[keys[j] >> shift];
          ++odd[keys[j + 1] >> shift];
        }
        if (j < m) ++even[keys[j] >> shift];
      } else {
        for (int64_t j = 0; j < m; ++j)
          if (keys[j] >> (kWidth - above) == prefix) ++even[(keys[j] >> shift) & low];
      }
      add_counts(even, odd, counts, threads > 1);
    });
  }

  // All keys whose top `above` bits are prefix, in any order.
  void collect(Key prefix, int above, Key* out) {
    const int shift = kWidth - above;
    int64_t filled = 0;
    each_unit(false, [&](const Key* keys, int64_t m) {
      Key found[Units::kElements];
      int64_t count = 0;
      const auto keep = [&](int64_t j) {
        found[count] = keys[j];
        count += keys[j] >> shift == prefix;
      };
      int64_t j = 0;
      for (; j + 16 <= m; j += 16) {
        // most runs of 16 hold none: one vector comparison passes over them
        Key hits = 0;
#pragma GCC unroll 1  // unrolled, it would become 16 scalar comparisons
        for (int64_t l = 0; l < 16; ++l) hits |= Key(keys[j + l] >> shift == prefix);
        if (hits)
          for (int64_t l = 0; l < 16; ++l) keep(j + l);
      }
      for (; j < m; ++j) keep(j);
      memcpy(out + reserve(filled, count, threads > 1), found, sizeof(Key) * size_t(count));
    });
  }
};

// The keys of one bin, small enough to select from.
template <class Key>
struct Bin {
  Key prefix = 0;
  int above = 0;
  int64_t size = 0, rank = 0;
};

// Narrows [all keys] to the bin of a rank until it is small; `leading` counts the leading digit.
template <class T, class C, class Key = typename KeyOf<C>::Key>
Bin<Key> narrow(ChannelKeys<T, C>& keys, const int64_t* leading, int64_t rank) {
  const int64_t few = keys.n / 16 > 65536 ? keys.n / 16 : 65536;
  Bin<Key> bin = {0, kDigit, 0, rank};
  bin.prefix = Key(find_bin(leading, kBins, bin.rank));
  bin.size = leading[bin.prefix];
  Buffer<int64_t> counts(kBins);
  while (bin.size > few && bin.above < keys.kWidth) {
    const int digit = keys.digit_after(bin.above);
    keys.histogram(bin.prefix, bin.above, counts.data);
    const int64_t b = find_bin(counts.data, int64_t(1) << digit, bin.rank);
    bin = {Key((bin.prefix << digit) | Key(b)), bin.above + digit, counts[b], bin.rank};
  }
  return bin;
}

// x_(k), or x_(k) + w (x_(k+1) - x_(k)).
template <class T, class C>
C order_statistic(ChannelKeys<T, C>& keys, const int64_t* leading, int64_t k, double w) {
  using Key = typename KeyOf<C>::Key;
  const Bin<Key> bin = narrow(keys, leading, k);
  const auto next_bin = [&](Key low) {  // the next element is the least of a later bin
    return interpolate(from_key<C>(low), order_statistic(keys, leading, k + 1, 0.0), C(w));
  };
  if (bin.above == keys.kWidth) {  // one value, many times
    if (w == 0 || bin.rank + 1 < bin.size) return from_key<C>(bin.prefix);
    return next_bin(bin.prefix);
  }
  Buffer<Key> set(bin.size), scratch(bin.size);
  keys.collect(bin.prefix, bin.above, set.data);
  memcpy(scratch.data, set.data, sizeof(Key) * size_t(bin.size));
  const Key low = select_key(scratch.data, bin.size, keys.kWidth - bin.above, bin.rank);
  if (w == 0) return from_key<C>(low);
  int64_t not_above = 0;
  Key next = ~Key(0);
  for (int64_t i = 0; i < bin.size; ++i) {
    not_above += set[i] <= low;
    next = set[i] > low && set[i] < next ? set[i] : next;
  }
  if (not_above > bin.rank + 1)
    next = low;
  else if (not_above == bin.size)
    return next_bin(low);
  return interpolate(from_key<C>(low), from_key<C>(next), C(w));
}

template <class T, class C>
Range<C> percentile_range(ChannelKeys<T, C>& keys, const Ranks& ranks) {
  if (keys.n == 0) return {C(0), C(0)};
  Buffer<int64_t> leading(kBins);
  keys.histogram(0, 0, leading.data);
  if (keys.has_nan) return {qk_nan<C>(), qk_nan<C>()};
  return {order_statistic(keys, leading.data, ranks.lo_k, ranks.lo_w),
          order_statistic(keys, leading.data, ranks.hi_k, ranks.hi_w)};
}

template <class T, class C>
void percentile_channels(const QuantRangeParams& p, int threads, Range<C>* ranges) {
  const Units units(p.layout);
  // many channels: a thread each; few: all threads in one channel
  const bool many = p.layout.channels >= 4 * threads;
  parallel_for(p.layout.channels, many ? threads : 1, [&](int64_t c) {
    ChannelKeys<T, C> keys(static_cast<const T*>(p.x), units, c, many ? 1 : threads);
    ranges[c] = percentile_range(keys, p.ranks);
  });
}

template void percentile_channels<float, float>(const QuantRangeParams&, int, Range<float>*);
template void percentile_channels<double, double>(const QuantRangeParams&, int, Range<double>*);
template void percentile_channels<Half, float>(const QuantRangeParams&, int, Range<float>*);
template void percentile_channels<BFloat16, float>(const QuantRangeParams&, int, Range<float>*);

}  // namespace qk::cpu::QK_ISA
