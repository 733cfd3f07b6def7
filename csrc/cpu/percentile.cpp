// Exact percentiles per channel: a histogram of the leading digit finds the bins that hold the
// wanted ranks, one more read collects their keys, and the rest happens in that small set.
#include "cpu/quant_range.h"
#include "cpu/radix_select.h"

namespace qk::cpu::QK_ISA {

// The keys of one channel, read unit by unit.
template <class T, class C>
struct ChannelKeys {
  using Key = typename KeyOf<C>::Key;
  static constexpr int64_t kCached = 1 << 16;  // so many keys are kept after the first read

  ChannelKeys(const T* x, const Units& units, int64_t channel)
      : x(x),
        units(units),
        channel(channel),
        n(units.layout.outer * units.layout.inner),
        cache(n <= kCached ? n : 0) {}

  // Calls f(keys, count) for the channel's units [begin, end). The first read fills the cache and
  // looks for NaN.
  template <class F>
  void each_unit(int64_t begin, int64_t end, bool first_read, F f) {
    Key local[Units::kElements];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t o = k / units.blocks_inner, i = k % units.blocks_inner;
      const Unit unit = units[(o * units.layout.channels + channel) * units.blocks_inner + i];
      const int64_t count = unit.rows * unit.length;
      const int64_t at = o * units.rows * units.layout.inner + i * Units::kElements;
      Key* keys = n <= kCached ? cache.data + at : local;
      if (first_read || n > kCached) {
        C buffer[Units::kElements];
        if (to_keys(gather(x, unit, units.stride(), buffer), count, keys)) {
#pragma omp atomic write
          has_nan = true;
        }
      }
      f(keys, count);
    }
  }

  const T* x;
  const Units& units;
  int64_t channel, n;
  Buffer<Key> cache;
  bool has_nan = false;
};

// The keys whose top `above` bits are prefix.
template <class Key>
struct Bin {
  enum class Stage { counting, collecting, ready };
  static constexpr int kWidth = 8 * sizeof(Key);

  Bin(Key prefix, int above, int64_t size, Stage stage)
      : prefix(prefix),
        above(above),
        size(size),
        stage(stage),
        counts(stage == Stage::counting ? kBins : 0),
        keys(stage == Stage::collecting ? size : 0) {
    if (stage == Stage::counting) memset(counts.data, 0, sizeof(int64_t) * kBins);
  }

  int digit() const { return kWidth - above < kDigit ? kWidth - above : kDigit; }

  // Counts the next digit; the leading one has a loop of its own.
  void count(const Key* row, int64_t n, uint32_t* to) const {
    const int rest = kWidth - above, shift = rest - digit();
    const Key low = (Key(1) << digit()) - 1;
    for (int64_t j = 0; j < n; ++j)
      if (row[j] >> rest == prefix) ++to[(row[j] >> shift) & low];
  }

  void collect(const Key* row, int64_t n, bool shared) {
    if (above == 0) {
      memcpy(keys.data + reserve(filled, n, shared), row, sizeof(Key) * size_t(n));
      return;
    }
    const int shift = kWidth - above;
    Key found[Units::kElements];
    int64_t kept = 0;
    const auto keep = [&](int64_t j) {
      found[kept] = row[j];
      kept += row[j] >> shift == prefix;
    };
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
      // most runs of 16 hold none: one vector comparison passes over them
      Key hits = 0;
#pragma GCC unroll 1  // unrolled, it would become 16 scalar comparisons
      for (int64_t l = 0; l < 16; ++l) hits |= Key(row[j + l] >> shift == prefix);
      if (hits)
        for (int64_t l = 0; l < 16; ++l) keep(j + l);
    }
    for (; j < n; ++j) keep(j);
    memcpy(keys.data + reserve(filled, kept, shared), found, sizeof(Key) * size_t(kept));
  }

  Key prefix;
  int above;
  int64_t size;
  Stage stage;
  Buffer<int64_t> counts;
  Buffer<Key> keys;
  int64_t filled = 0;
};

// Looks for x_(k) of both bounds of one channel, and for x_(k+1) where it is needed. Passes over
// all units, with a step after each, narrow the bins; then the values are selected from their keys.
template <class T, class C>
class Search {
 public:
  static constexpr int kMost = 4;

  Search(const T* x, const Units& units, int64_t channel, const Ranks& ranks)
      : keys(x, units, channel), ranks(ranks) {
    want(ranks.lo_k, ranks.lo_w);
    want(ranks.hi_k, ranks.hi_w);
    bins[bin_count++] =
        new Bin<Key>(0, 0, keys.n, keys.n > kFew ? Stage::counting : Stage::collecting);
  }
  ~Search() {
    for (int b = 0; b < bin_count; ++b) delete bins[b];
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  // Units [begin, end) of the channel; `shared` if other threads pass over others.
  void pass(int64_t begin, int64_t end, bool shared) {
    if (done) return;
    if (bins[0]->above == 0 && bins[0]->stage == Stage::counting)
      return count_leading(begin, end, shared);
    uint32_t counts[kMost][kBins];
    for (int b = 0; b < bin_count; ++b)
      if (bins[b]->stage == Stage::counting) memset(counts[b], 0, sizeof(counts[b]));
    keys.each_unit(begin, end, bins[0]->above == 0, [&](const Key* row, int64_t n) {
      for (int b = 0; b < bin_count; ++b) {
        if (bins[b]->stage == Stage::counting) bins[b]->count(row, n, counts[b]);
        if (bins[b]->stage == Stage::collecting) bins[b]->collect(row, n, shared);
      }
    });
    for (int b = 0; b < bin_count; ++b)
      if (bins[b]->stage == Stage::counting) add_counts(counts[b], bins[b]->counts.data, shared);
  }

  // Ends a pass; says whether another is needed.
  bool step() {
    done = true;
    if (keys.has_nan) return false;
    Bin<Key>* old[kMost];
    int into[kMost];
    const int old_count = bin_count;
    for (int b = 0; b < old_count; ++b) old[b] = bins[b], into[b] = -1;
    bin_count = 0;
    for (int i = 0; i < wanted_count; ++i) {
      const int b = wanted[i].bin;
      if (old[b]->stage == Stage::counting) {
        narrow(*old[b], wanted[i]);
      } else {
        if (into[b] < 0) bins[into[b] = bin_count++] = old[b];
        old[b]->stage = Stage::ready;
        wanted[i].bin = into[b];
      }
    }
    for (int b = 0; b < old_count; ++b)
      if (into[b] < 0) delete old[b];
    for (int b = 0; b < bin_count; ++b) done &= bins[b]->stage == Stage::ready;
    return !done;
  }

  // After the passes: how many keys there are to select from, at most kMost sets of them.
  int64_t left() const {
    int64_t sum = 0;
    for (int b = 0; b < bin_count; ++b) sum += bins[b]->filled;
    return sum;
  }

  // Selects the values in the b-th set.
  void select(int b) {
    if (b >= bin_count || keys.has_nan) return;
    const Bin<Key>& bin = *bins[b];
    Buffer<Key> scratch(bin.filled);
    const Wanted* last = nullptr;
    for (int i = 0; i < wanted_count; ++i) {
      Wanted& w = wanted[i];
      if (w.bin != b) continue;
      if (bin.above == bin.kWidth) {  // one value, many times
        w.value = bin.prefix;
      } else if (last && w.rank == last->rank + 1) {
        w.value = successor(bin.keys.data, bin.size, last->value, last->rank);
      } else {
        memcpy(scratch.data, bin.keys.data, sizeof(Key) * size_t(bin.size));
        w.value = select_key(scratch.data, bin.size, bin.kWidth - bin.above, w.rank);
      }
      last = &w;
    }
  }

  Range<C> result() const {
    if (keys.has_nan) return {qk_nan<C>(), qk_nan<C>()};
    return {between(0, ranks.lo_w), between(ranks.lo_w > 0 ? 2 : 1, ranks.hi_w)};
  }

 private:
  using Key = typename KeyOf<C>::Key;
  using Stage = typename Bin<Key>::Stage;
  static constexpr int64_t kFew = 512;        // so many are not worth a histogram
  static constexpr int64_t kCollect = 65536;  // bins up to this size (or 1/16 of all) are collected

  struct Wanted {
    int64_t rank;  // among the keys of its bin
    int bin;
    Key value;
  };

  void want(int64_t k, double w) {
    wanted[wanted_count++] = {k, 0, 0};
    if (w > 0) wanted[wanted_count++] = {k + 1, 0, 0};
  }

  C between(int i, double w) const {
    const C a = from_key<C>(wanted[i].value);
    return w > 0 ? interpolate(a, from_key<C>(wanted[i + 1].value), C(w)) : a;
  }

  // Neighbours often share a bin: two counters in turn do not wait for each other.
  void count_leading(int64_t begin, int64_t end, bool shared) {
    uint32_t even[kBins] = {}, odd[kBins] = {};
    constexpr int shift = Bin<Key>::kWidth - kDigit;
    keys.each_unit(begin, end, true, [&](const Key* row, int64_t n) {
      int64_t j = 0;
      for (; j + 2 <= n; j += 2) {
        ++even[row[j] >> shift];
        ++odd[row[j + 1] >> shift];
      }
      if (j < n) ++even[row[j] >> shift];
    });
    for (int64_t b = 0; b < kBins; ++b) even[b] += odd[b];
    add_counts(even, bins[0]->counts.data, shared);
  }

  // Moves a wanted rank to the bin of its next digit, made if no other rank is there.
  void narrow(const Bin<Key>& from, Wanted& w) {
    const int64_t digit = find_bin(from.counts.data, int64_t(1) << from.digit(), w.rank);
    const Key prefix = from.above ? Key(from.prefix << from.digit()) | Key(digit) : Key(digit);
    const int above = from.above + from.digit();
    for (w.bin = 0; w.bin < bin_count; ++w.bin)
      if (bins[w.bin]->prefix == prefix && bins[w.bin]->above == above) return;
    const int64_t size = from.counts[digit];
    const bool few = size <= (keys.n / 16 > kCollect ? keys.n / 16 : kCollect);
    const Stage stage = above == Bin<Key>::kWidth ? Stage::ready
                        : few                     ? Stage::collecting
                                                  : Stage::counting;
    bins[bin_count++] = new Bin<Key>(prefix, above, size, stage);
  }

  ChannelKeys<T, C> keys;
  const Ranks ranks;
  Wanted wanted[kMost];
  Bin<Key>* bins[kMost];
  int wanted_count = 0, bin_count = 0;
  bool done = false;
};

// Small channels: each is the work of one thread.
template <class T, class C>
class WholeChannels final : public Work {
 public:
  WholeChannels(const QuantRangeParams& p, Range<C>* ranges)
      : p(p), units(p.layout), ranges(ranges) {
    items = p.layout.channels;
    cost = p.layout.outer * p.layout.inner > 0 ? p.layout.outer * p.layout.inner : 1;
  }

  void run(int64_t begin, int64_t end) override {
    for (int64_t c = begin; c < end; ++c) ranges[c] = find(c);
  }

 private:
  Range<C> find(int64_t channel) const {
    if (units.per_channel() == 0) return {C(0), C(0)};
    Search<T, C> search(static_cast<const T*>(p.x), units, channel, p.ranks);
    do search.pass(0, units.per_channel(), false);
    while (search.step());
    for (int b = 0; b < search.kMost; ++b) search.select(b);
    return search.result();
  }

  const QuantRangeParams& p;
  const Units units;
  Range<C>* ranges;
};

// Large channels, of which there are few: all threads work in each.
template <class T, class C>
class SharedChannels final : public Work {
 public:
  SharedChannels(const QuantRangeParams& p, Range<C>* ranges)
      : channels(p.layout.channels), units(p.layout), ranges(ranges), searches(channels) {
    for (int64_t c = 0; c < channels; ++c)
      searches[c] = new Search<T, C>(static_cast<const T*>(p.x), units, c, p.ranks);
    items = units.count();
    cost = units.cost();
  }
  ~SharedChannels() override {
    for (int64_t c = 0; c < channels; ++c) delete searches[c];
  }

  void run(int64_t begin, int64_t end) override {
    const int64_t each = selecting ? Search<T, C>::kMost : units.per_channel();
    for (int64_t c = begin / each; c * each < end; ++c) {
      const int64_t first = begin > c * each ? begin - c * each : 0;
      const int64_t last = end < (c + 1) * each ? end - c * each : each;
      if (!selecting) searches[c]->pass(first, last, true);
      for (int64_t b = first; selecting && b < last; ++b) searches[c]->select(int(b));
    }
  }

  bool next() override {
    if (selecting) {
      for (int64_t c = 0; c < channels; ++c) ranges[c] = searches[c]->result();
      return false;
    }
    int64_t left = 0;
    selecting = true;
    for (int64_t c = 0; c < channels; ++c) {
      selecting &= !searches[c]->step();
      left += searches[c]->left();
    }
    if (selecting) {
      items = channels * Search<T, C>::kMost;
      cost = 1 + 8 * left / items;  // several passes over each set
    }
    return true;
  }

 private:
  const int64_t channels;
  const Units units;
  Range<C>* ranges;
  Buffer<Search<T, C>*> searches;
  bool selecting = false;
};

template <class T, class C>
Work* percentile_work(const QuantRangeParams& p, int64_t share, Range<C>* ranges) {
  const int64_t elements = p.layout.outer * p.layout.inner;
  if (p.layout.channels > 0 && 4 * elements > share) return new SharedChannels<T, C>(p, ranges);
  return new WholeChannels<T, C>(p, ranges);
}

template Work* percentile_work<float, float>(const QuantRangeParams&, int64_t, Range<float>*);
template Work* percentile_work<double, double>(const QuantRangeParams&, int64_t, Range<double>*);
template Work* percentile_work<Half, float>(const QuantRangeParams&, int64_t, Range<float>*);
template Work* percentile_work<BFloat16, float>(const QuantRangeParams&, int64_t, Range<float>*);

}  // namespace qk::cpu::QK_ISA
