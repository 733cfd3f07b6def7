#include "cpu/quant_range.h"

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
    partial[units.slot(u)] = lane_sum<C>(n, [row](int64_t i) { return qk_abs(row[i]); });
  });
  const int64_t elements = layout.outer * layout.inner;
  for (int64_t c = 0; c < layout.channels; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < per_channel; ++k) sum += partial[c * per_channel + k];
    out[c] = elements ? sum / double(elements) : 0.0;
  }
}

// Squared errors of all candidates over n elements, added to error[kMseCandidates]; a block of x
// stays in the first-level cache while all candidates pass over it.
template <class C>
void mse_row(const C* x, int64_t n, const Channel<C>* candidates, double* error) {
  for (int64_t b = 0; b < n; b += kSumBlock) {
    const C* block = x + b;
    for (int k = 0; k < kMseCandidates; ++k) {
      const Channel<C> c = candidates[k];
      error[k] += lane_sum<C>(n - b < kSumBlock ? n - b : kSumBlock, [block, c](int64_t i) {
        const C e = dequantize_value(quantize_value<false>(block[i], c).q, c) - block[i];
        return e * e;
      });
    }
  }
}

template <class T, class C>
void mse_channels(const QuantRangeParams& p, int threads, Range<C>* ranges) {
  const Units units(p.layout);
  const int64_t per_channel = units.per_channel();
  Buffer<Channel<C>> candidates(p.layout.channels * kMseCandidates);
  parallel_for(p.layout.channels * kMseCandidates, threads, [&](int64_t i) {
    const Range<C> r = mse_candidate(ranges[i / kMseCandidates], int(i % kMseCandidates));
    const QParams<C> q = range_to_qparams(r, C(p.qmin), C(p.qmax), p.symmetric);
    candidates[i] = make_channel(q.scale, C(q.zero_point), C(p.qmin), C(p.qmax));
  });
  Buffer<double> errors(units.count() * kMseCandidates);
  parallel_for(units.count(), threads, [&](int64_t u) {
    C buffer[Units::kElements];
    const Unit unit = units[u];
    const C* row = gather(static_cast<const T*>(p.x), unit, units.stride(), buffer);
    double* error = errors.data + units.slot(u) * kMseCandidates;
    for (int k = 0; k < kMseCandidates; ++k) error[k] = 0;
    mse_row(row, unit.rows * unit.length, candidates.data + unit.channel * kMseCandidates, error);
  });
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    double least = INFINITY;
    int best = 0;
    for (int k = 0; k < kMseCandidates; ++k) {
      double error = 0;
      for (int64_t i = 0; i < per_channel; ++i)
        error += errors[(c * per_channel + i) * kMseCandidates + k];
      best = error < least ? k : best;
      least = error < least ? error : least;
    }
    ranges[c] = mse_candidate(ranges[c], best);
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
