#include "cpu/error_stats.h"

#include "cpu/isa.h"
#include "cpu/quant_range.h"
#include "dispatch.h"
#include "math/error_stats.h"

namespace qk::cpu::QK_ISA {

template <class T, class C>
class ErrorStatsWork final : public Work {
 public:
  explicit ErrorStatsWork(const ErrorStatsParams& p)
      : p(p), units(p.layout, kUnit), table(p.layout), partial(units.per_channel() == 1 ? 0 : units.count()) {
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
        write(unit.channel, of_unit);
      else
        partial[cursor.slot()] = of_unit;
    }
  }

  bool next() override {
    const int64_t per_channel = units.per_channel();
    for (int64_t c = 0; per_channel != 1 && c < p.layout.channels; ++c) {
      ErrorSums all = {0, 0, 0, 0};
      if (per_channel > 0) all = partial[c * per_channel];
      for (int64_t k = 1; k < per_channel; ++k) all.merge(partial[c * per_channel + k]);
      write(c, all);
    }
    return false;
  }

 private:
  static constexpr int64_t kUnit = 8192;  // the work of beginning and ending one is some 300 elements'

  void write(int64_t channel, const ErrorSums& s) {
    write_error_stats(error_stats_of<C>(s.n, s.mean, s.spread, s.clipped), channel,
                      p.layout.channels, static_cast<C*>(p.stats), static_cast<C*>(p.ema),
                      C(1.0 - p.decay));
  }

  const ErrorStatsParams p;
  const Units units;
  ChannelTable<C> table;
  Buffer<ErrorSums> partial;
};

static Work* error_stats_work(const ErrorStatsParams& p) {
  Work* work = nullptr;
  QK_DISPATCH(p.dtype, work = new ErrorStatsWork<T, C>(p));
  return work;
}

int64_t error_stats(const ErrorStatsParams* calls, int64_t count, int threads) {
  // an average that a bad scale has spoilt could not be mended
  return run_list(calls, count, threads, error_stats_work, true);
}

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
    const QuantRangeParams& r = p.range;
    const QuantParams q = {r.scale, r.zero_point, true, r.qmin, r.qmax};
    return error_stats_work(
        {r.dtype, r.layout, q, p.clip_value, r.x, p.stats, p.ema, p.decay, nullptr});
  }

  const ErrorStatsDynamicParams p;
  bool counting = false;
};

void error_stats_dynamic(const ErrorStatsDynamicParams* calls, int64_t count, int threads) {
  const int64_t share = thread_share(calls, count, threads, [](const ErrorStatsDynamicParams& p) {
    return p.range.layout.numel();
  });
  run_list(calls, count, threads,
           [share](const ErrorStatsDynamicParams& p) { return new RangeThenStats(p, share); });
}

}  // namespace qk::cpu::QK_ISA
