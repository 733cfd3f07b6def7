#include "cpu/quant_range.h"

#include <cstring>

#include "cpu/channels.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// What the passes over the units of one call share.
template <class T, class C>
class UnitWork : public Work {
 public:
  explicit UnitWork(const QuantRangeParams& p) : p(p), units(p.layout) {
    items = units.count();
    cost = units.cost();
  }

  void run(int64_t begin, int64_t end) override {
    C buffer[Units::kElements];
    for (int64_t u = begin; u < end; ++u) {
      const Unit unit = units[u];
      const C* row = gather(static_cast<const T*>(p.x), unit, units.stride(), buffer);
      see(row, unit.rows * unit.length, unit.channel, units.slot(u));
    }
  }

 protected:
  // n elements of a channel; `slot` is the place of their result among those of all units.
  virtual void see(const C* row, int64_t n, int64_t channel, int64_t slot) = 0;

  const QuantRangeParams& p;
  const Units units;
};

// Bounds of every channel; for empty channels {0, 0}.
template <class T, class C>
class MinMaxWork final : public UnitWork<T, C> {
 public:
  MinMaxWork(const QuantRangeParams& p, Range<C>* ranges)
      : UnitWork<T, C>(p), ranges(ranges), partial(this->units.count()) {}

  bool next() override {
    const int64_t per_channel = this->units.per_channel();
    for (int64_t c = 0; c < this->p.layout.channels; ++c) {
      Range<C> r = per_channel ? partial[c * per_channel] : Range<C>{C(0), C(0)};
      for (int64_t k = 1; k < per_channel; ++k) {
        r.lo = qk_min(r.lo, partial[c * per_channel + k].lo);
        r.hi = qk_max(r.hi, partial[c * per_channel + k].hi);
      }
      ranges[c] = r;
    }
    return false;
  }

 private:
  void see(const C* row, int64_t n, int64_t, int64_t slot) override {
    partial[slot] = minmax(row, n);
  }

  Range<C>* ranges;
  Buffer<Range<C>> partial;
};

// The same where channels interleave.
template <class T, class C>
class ColumnMinMaxWork final : public Work {
 public:
  ColumnMinMaxWork(const QuantRangeParams& p, Range<C>* ranges)
      : p(p), columns(p.layout), ranges(ranges), partial(columns.slots()) {
    items = columns.count();
    cost = columns.cost();
  }

  void run(int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i) see(columns[i]);
  }

  bool next() override {
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      Range<C> r = {C(INFINITY), -C(INFINITY)};
      columns.each_of(c, [&](int64_t slot) {
        r.lo = qk_min(r.lo, partial[slot].lo);
        r.hi = qk_max(r.hi, partial[slot].hi);
      });
      ranges[c] = r;
    }
    return false;
  }

 private:
  void see(const Columns::Tile& tile) {
    C lo[Columns::kWide], hi[Columns::kWide], sum[Columns::kWide], buffer[Columns::kWide];
    const int64_t n = tile.columns;
    for (int64_t c = 0; c < n; ++c) {
      lo[c] = C(INFINITY);
      hi[c] = -C(INFINITY);
      sum[c] = C(0);
    }
    for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
      const T* src = static_cast<const T*>(p.x) + r * columns.width + tile.column;
      const C* row = load(src, buffer, n);
      for (int64_t c = 0; c < n; ++c) widen_range(row[c], lo[c], hi[c], sum[c]);
    }
    for (int64_t c = 0; c < n; ++c)
      partial[tile.slot + c] = sum[c] == sum[c] ? Range<C>{lo[c], hi[c]} : Range<C>{sum[c], sum[c]};
  }

  const QuantRangeParams& p;
  const Columns columns;
  Range<C>* ranges;
  Buffer<Range<C>> partial;
};

// LSQ's scale from the mean of |x| of every channel and its zero point.
template <class T, class C>
class LsqScaleWork final : public UnitWork<T, C> {
 public:
  explicit LsqScaleWork(const QuantRangeParams& p)
      : UnitWork<T, C>(p), partial(this->units.count()) {}

  bool next() override {
    const QuantRangeParams& p = this->p;
    const int64_t per_channel = this->units.per_channel();
    const int64_t elements = p.layout.outer * p.layout.inner;
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < per_channel; ++k) sum += partial[c * per_channel + k];
      const double mean = elements ? sum / double(elements) : 0.0;
      static_cast<C*>(p.scale)[c] =
          lsq_scale<C>(mean, p.zero_point[c], p.qmin, p.qmax, p.symmetric);
    }
    return false;
  }

 private:
  void see(const C* row, int64_t n, int64_t, int64_t slot) override {
    partial[slot] = lane_sum<double>(n, [row](int64_t i) { return double(qk_abs(row[i])); });
  }

  Buffer<double> partial;
};

// The candidates of one channel. Errors are measured in steps of the min-max scale, so that their
// squares stay far from the ends of the range of C.
template <class C>
struct Candidates {
  Candidates(Range<C> range, const QuantRangeParams& p) {
    for (int k = 0; k < kMseCandidates; ++k) {
      const QParams<C> q =
          range_to_qparams(mse_candidate(range, k), C(p.qmin), C(p.qmax), p.symmetric);
      channel[k] = make_channel(q.scale, C(q.zero_point), C(p.qmin), C(p.qmax));
    }
    unit = channel[0].inv;
  }

  // Squared errors over n elements, added to error[kMseCandidates]; a block of x stays in the
  // first-level cache while all candidates pass over it.
  void add_errors(const C* x, int64_t n, double* error) const {
    for (int64_t b = 0; b < n; b += kSumBlock) {
      const C* block = x + b;
      const C per_step = unit;
      for (int k = 0; k < kMseCandidates; ++k) {
        const Channel<C> c = channel[k];
        error[k] += lane_sum<C>(n - b < kSumBlock ? n - b : kSumBlock, [=](int64_t i) {
          const C y = dequantize_value(quantize_value<false>(block[i], c).q, c);
          const C e = (y - block[i]) * per_step;
          return e * e;
        });
      }
    }
  }

  Channel<C> channel[kMseCandidates];
  C unit;
};

// The first of the least; of NaN and infinities, the first.
inline int best_candidate(const double* error) {
  double least = INFINITY;
  int best = 0;
  for (int k = 0; k < kMseCandidates; ++k) {
    best = error[k] < least ? k : best;
    least = error[k] < least ? error[k] : least;
  }
  return best;
}

// Replaces each channel's min-max range by the best candidate of the MSE search.
template <class T, class C>
class MseWork final : public UnitWork<T, C> {
 public:
  MseWork(const QuantRangeParams& p, Range<C>* ranges)
      : UnitWork<T, C>(p),
        ranges(ranges),
        errors(this->units.per_channel() > 1 ? this->units.count() * kMseCandidates : 0) {
    this->cost *= kMseCandidates / 8;  // a candidate is vector arithmetic without memory
  }

  bool next() override {
    const int64_t per_channel = this->units.per_channel();
    for (int64_t c = 0; per_channel > 1 && c < this->p.layout.channels; ++c) {
      double sum[kMseCandidates] = {};
      for (int64_t i = 0; i < per_channel; ++i)
        for (int k = 0; k < kMseCandidates; ++k)
          sum[k] += errors[(c * per_channel + i) * kMseCandidates + k];
      ranges[c] = mse_candidate(ranges[c], best_candidate(sum));
    }
    return false;
  }

 private:
  void see(const C* row, int64_t n, int64_t channel, int64_t slot) override {
    double local[kMseCandidates] = {};
    const Candidates<C> candidates(ranges[channel], this->p);
    candidates.add_errors(row, n, local);
    // a channel in one unit is decided there and then; longer ones wait for the sums of all units
    if (this->units.per_channel() == 1) {
      ranges[channel] = mse_candidate(ranges[channel], best_candidate(local));
    } else {
      memcpy(errors.data + slot * kMseCandidates, local, sizeof(local));
    }
  }

  Range<C>* ranges;
  Buffer<double> errors;
};

// Range, then search if asked for, then scale and zero point; p.range may be null.
template <class T, class C>
class RangeWork final : public Chain {
 public:
  RangeWork(const QuantRangeParams& p, int64_t share) : p(p), ranges(p.layout.channels) {
    if (p.method == Method::percentile) {
      link = percentile_work<T, C>(this->p, share, ranges.data);
    } else if (Columns::fit(p.layout)) {
      link = new ColumnMinMaxWork<T, C>(this->p, ranges.data);
    } else {
      link = new MinMaxWork<T, C>(this->p, ranges.data);
    }
    follow();
  }

 private:
  Work* following() override {
    ++done;
    if (p.method == Method::mse && done == 1) return new MseWork<T, C>(p, ranges.data);
    if (p.method == Method::lsq && done == 2) return nullptr;
    write();
    return p.method == Method::lsq ? new LsqScaleWork<T, C>(p) : nullptr;
  }

  void write() {
    const int64_t channels = p.layout.channels;
    C* range = static_cast<C*>(p.range);
    for (int64_t c = 0; c < channels; ++c) {
      const QParams<C> q = range_to_qparams(ranges[c], C(p.qmin), C(p.qmax), p.symmetric);
      static_cast<C*>(p.scale)[c] = q.scale;
      p.zero_point[c] = q.zero_point;
      if (range) {
        range[c] = ranges[c].lo;
        range[channels + c] = ranges[c].hi;
      }
    }
  }

  const QuantRangeParams p;
  Buffer<Range<C>> ranges;
  int done = 0;
};

Work* range_work(const QuantRangeParams& p, int64_t share) {
  Work* work = nullptr;
  QK_DISPATCH(p.dtype, work = new RangeWork<T, C>(p, share));
  return work;
}

void quant_range(const QuantRangeParams* calls, int64_t count, int threads) {
  const int64_t share = thread_share(calls, count, threads,
                                     [](const QuantRangeParams& p) { return p.layout.numel(); });
  run_list(calls, count, threads,
           [share](const QuantRangeParams& p) { return range_work(p, share); });
}

template <class C>
void qparams_typed(const QParamsParams& p) {
  const C* range = static_cast<const C*>(p.range);
  C* running = static_cast<C*>(p.running);
  for (int64_t c = 0; c < p.channels; ++c) {
    Range<C> r = {range[c], range[p.channels + c]};
    if (running) {
      r = moved_range({running[c], running[p.channels + c]}, r, C(p.weight));
      running[c] = r.lo;
      running[p.channels + c] = r.hi;
    }
    const QParams<C> q = range_to_qparams(r, C(p.qmin), C(p.qmax), p.symmetric);
    static_cast<C*>(p.scale)[c] = q.scale;
    p.zero_point[c] = q.zero_point;
  }
}

void qparams(const QParamsParams* calls, int64_t count, int) {
  for (int64_t i = 0; i < count; ++i)
    calls[i].is_double ? qparams_typed<double>(calls[i]) : qparams_typed<float>(calls[i]);
}

}  // namespace qk::cpu::QK_ISA
