#include "cpu/error_stats.h"

#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/quant_range.h"
#include "dispatch.h"
#include "math/error_stats.h"

namespace qk::cpu::QK_ISA {

template <class C>
void write_stats(const ErrorStatsParams& p, int64_t channel, const ErrorSums& s) {
  write_error_stats(error_stats_of<C>(s.n, s.mean, s.spread, s.clipped), channel, p.layout.channels,
                    static_cast<C*>(p.stats), static_cast<C*>(p.ema), C(1.0 - p.decay));
}

template <class T, class C>
class ErrorStatsWork : public Work {
 public:
  explicit ErrorStatsWork(const ErrorStatsParams& p) : ErrorStatsWork(p, Later()) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = units.count();
    cost = units.cost();
  }

  void run(int64_t begin, int64_t end) override {
    const auto sums = p.clip_value ? error_sums<true, C> : error_sums<false, C>;
    C buffer[kUnit];
    Units::Cursor cursor(units, begin);
    for (int64_t u = begin; u < end; ++u, cursor.next()) {
      const Unit unit = cursor.unit();
      const C* x = gather(static_cast<const T*>(p.x), unit, units.stride(), buffer);
      const Channel<C> c = table[unit.channel * table.repeat];
      const ErrorSums of_unit = sums(x, unit.rows * unit.length, c);
      if (units.per_channel() == 1)
        write_stats<C>(p, unit.channel, of_unit);
      else
        partial[cursor.slot()] = of_unit;
    }
  }

  bool next() override {
    const int64_t per_channel = units.per_channel();
    for (int64_t c = 0; per_channel != 1 && c < p.layout.channels; ++c) {
      ErrorSums all = {0, 0, 0, 0};
      for (int64_t k = 0; k < per_channel; ++k) all.merge(partial[c * per_channel + k]);
      write_stats<C>(p, c, all);
    }
    return false;
  }

 protected:
  static constexpr int64_t kUnit = 8192;  // to begin and end one costs as much as 300 elements

  struct Later {};  // whoever derives from this finds the channels
  ErrorStatsWork(const ErrorStatsParams& p, Later)
      : p(p),
        units(p.layout, kUnit),
        table(p.layout),
        partial(units.per_channel() == 1 ? 0 : units.count()) {}

  const ErrorStatsParams p;
  const Units units;
  ChannelTable<C> table;
  Buffer<ErrorSums> partial;
};

// The same where channels interleave.
template <class T, class C>
class ErrorColumnsWork final : public Work {
 public:
  explicit ErrorColumnsWork(const ErrorStatsParams& p)
      : p(p), columns(p.layout), table(p.layout), partial(columns.slots()) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = columns.count();
    cost = columns.cost();
  }

  void run(int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i)
      p.clip_value ? run_tile<true>(columns[i]) : run_tile<false>(columns[i]);
  }

  bool next() override {
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      ErrorSums all = {0, 0, 0, 0};
      columns.each_of(c, [&](int64_t slot) { all.merge(partial[slot]); });
      write_stats<C>(p, c, all);
    }
    return false;
  }

 private:
  template <bool kClipValue>
  void run_tile(const Columns::Tile& tile) {
    ErrorColumns<C> sums;
    C buffer[Columns::kWide];
    const int64_t n = tile.columns;
    const auto row = [&](int64_t r) {
      const T* src = static_cast<const T*>(p.x) + r * columns.width + tile.column;
      return load(src, buffer, n);
    };
    const auto value = [&](int64_t r, int64_t c) {
      return to_compute(static_cast<const T*>(p.x)[r * columns.width + tile.column + c]);
    };
    const int64_t last = tile.row + tile.rows - 1, middle = tile.row + tile.rows / 2;
    for (int64_t c = 0; c < n; ++c)
      sums.pivot[c] = error_pivot<kClipValue>(value(tile.row, c), value(middle, c), value(last, c),
                                              table[tile.column + c]);
    Columns::each_sum(tile, [&](int64_t r, int64_t end) {
      sums.begin(n);
      for (; r < end; ++r) sums.template add<kClipValue>(row(r), n, table, tile.column);
      sums.end(n);
    });
    for (int64_t c = 0; c < n; ++c) {
      ErrorSums& of_column = partial[tile.slot + c];
      of_column = sums.of(c, tile.rows);
      if (of_column.good_pivot(sums.pivot[c])) continue;
      C x[Columns::kRows];
      for (int64_t r = 0; r < tile.rows; ++r) x[r] = value(tile.row + r, c);
      of_column = error_sums<kClipValue>(x, tile.rows, table[tile.column + c]);
    }
  }

  const ErrorStatsParams p;
  const Columns columns;
  ChannelTable<C> table;
  Buffer<ErrorSums> partial;
};

template <class T, class C>
Work* typed_stats_work(const ErrorStatsParams& p) {
  if (Columns::fit(p.layout)) return new ErrorColumnsWork<T, C>(p);
  return new ErrorStatsWork<T, C>(p);
}

static Work* error_stats_work(const ErrorStatsParams& p) {
  Work* work = nullptr;
  QK_DISPATCH(p.dtype, work = (typed_stats_work<T, C>(p)));
  return work;
}

int64_t error_stats(const ErrorStatsParams* calls, int64_t count, int threads) {
  // an average that a bad scale has spoilt could not be mended
  return run_list(calls, count, threads, error_stats_work, true);
}

static ErrorStatsParams stats_params(const ErrorStatsDynamicParams& p) {
  const QuantRangeParams& r = p.range;
  const QuantParams q = {r.scale, r.zero_point, true, r.qmin, r.qmax};
  return {r.dtype, r.layout, q, p.clip_value, r.x, p.stats, p.ema, p.decay, nullptr};
}

// Channels that lie in one piece: each is read once from memory for its range, and found in the
// cache when its errors are summed.
template <class T, class C>
class RowStatsWork final : public ErrorStatsWork<T, C> {
  using Base = ErrorStatsWork<T, C>;

 public:
  explicit RowStatsWork(const ErrorStatsDynamicParams& p)
      : Base(stats_params(p), typename Base::Later()), range(p.range) {
    this->items = range.layout.channels;
    this->cost = range.layout.inner;
  }

  void run(int64_t begin, int64_t end) override {
    const int64_t per_channel = this->units.per_channel();
    for (int64_t c = begin; c < end; ++c) {
      const T* row = static_cast<const T*>(range.x) + c * range.layout.inner;
      this->table.set(c, range_channel(range, c, row_range<T, C>(row, range.layout.inner)));
      Base::run(c * per_channel, (c + 1) * per_channel);
    }
  }

 private:
  const QuantRangeParams range;
};

// The range of the whole tensor, then the statistics of its errors.
class RangeThenStats final : public Chain {
 public:
  RangeThenStats(const ErrorStatsDynamicParams& p, int64_t share) : p(p) {
    link = range_work(p.range, share);
    follow();
  }

 private:
  Work* following() override {
    if (counting) return nullptr;
    counting = true;
    return error_stats_work(stats_params(p));
  }

  const ErrorStatsDynamicParams p;
  bool counting = false;
};

void error_stats_dynamic(const ErrorStatsDynamicParams* calls, int64_t count, int threads) {
  const int64_t share = thread_share(calls, count, threads, [](const ErrorStatsDynamicParams& p) {
    return p.range.layout.numel();
  });
  run_list(calls, count, threads, [share](const ErrorStatsDynamicParams& p) -> Work* {
    if (!by_rows(p.range, share)) return new RangeThenStats(p, share);
    Work* work = nullptr;
    QK_DISPATCH(p.range.dtype, work = new RowStatsWork<T, C>(p));
    return work;
  });
}

}  // namespace qk::cpu::QK_ISA
