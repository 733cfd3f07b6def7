#include "cpu/quant_range.h"

#include <cstring>

#include "cpu/channels.h"
#include "cpu/isa.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

template <class T, class C>
void mean_abs_channels(const T* x, const Layout& layout, int threads, double* out) {
  const Units units(layout);
  const int64_t per_channel = units.per_channel();
  Buffer<double> partial(units.count());
  parallel_for(units.count(), threads, [&](int64_t u) {
    C buffer[Units::kElements];
    const Unit unit = units[u];
    const C* row = gather(x, unit, units.stride(), buffer);
    const int64_t n = unit.rows * unit.length;
    partial[units.slot(u)] =
        lane_sum<double>(n, [row](int64_t i) { return double(qk_abs(row[i])); });
  });
  const int64_t elements = layout.outer * layout.inner;
  for (int64_t c = 0; c < layout.channels; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < per_channel; ++k) sum += partial[c * per_channel + k];
    out[c] = elements ? sum / double(elements) : 0.0;
  }
}

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

template <class T, class C>
void mse_channels(const QuantRangeParams& p, int threads, Range<C>* ranges) {
  const Units units(p.layout);
  const int64_t per_channel = units.per_channel();
  // a channel in one unit is decided there and then; longer ones wait for the sums of all units
  Buffer<double> errors(per_channel > 1 ? units.count() * kMseCandidates : 0);
  parallel_for(units.count(), threads, [&](int64_t u) {
    C buffer[Units::kElements];
    double local[kMseCandidates] = {};
    const Unit unit = units[u];
    const C* row = gather(static_cast<const T*>(p.x), unit, units.stride(), buffer);
    const Candidates<C> candidates(ranges[unit.channel], p);
    candidates.add_errors(row, unit.rows * unit.length, local);
    if (per_channel == 1) {
      ranges[unit.channel] = mse_candidate(ranges[unit.channel], best_candidate(local));
    } else {
      memcpy(errors.data + units.slot(u) * kMseCandidates, local, sizeof(local));
    }
  });
  for (int64_t c = 0; per_channel > 1 && c < p.layout.channels; ++c) {
    double sum[kMseCandidates] = {};
    for (int64_t i = 0; i < per_channel; ++i)
      for (int k = 0; k < kMseCandidates; ++k)
        sum[k] += errors[(c * per_channel + i) * kMseCandidates + k];
    ranges[c] = mse_candidate(ranges[c], best_candidate(sum));
  }
}

void quant_range(const QuantRangeParams& p, int threads) {
  const int useful = threads_for(p.layout.numel(), threads);
  QK_DISPATCH(p.dtype, quant_range_typed<T, C>(p, useful));
}

void qparams(const QParamsParams& p, int) {
  const auto run = [&p](auto zero) {
    using C = decltype(zero);
    const C* range = static_cast<const C*>(p.range);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Range<C> r = {range[c], range[p.channels + c]};
      const QParams<C> q = range_to_qparams(r, C(p.qmin), C(p.qmax), p.symmetric);
      static_cast<C*>(p.scale)[c] = q.scale;
      p.zero_point[c] = q.zero_point;
    }
  };
  p.is_double ? run(0.0) : run(0.0f);
}

}  // namespace qk::cpu::QK_ISA
