#include "cuda/reduce.h"
#include "dispatch.h"
#include "math/error_stats.h"

namespace qk::cuda {

// In double, where the square of an fp32 number is exact: no pivot is needed for errors that are
// far from zero and close to each other.
struct ErrorSum {
  double error = 0, square = 0;
  int64_t clipped = 0;

  __device__ void merge(const ErrorSum& other) {
    error += other.error;
    square += other.square;
    clipped += other.clipped;
  }
};

// Ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16.
template <class T, class C, bool kClipValue>
struct ErrorStatsOp {
  using Type = T;
  static constexpr int kBlocks = 3;
  using Sum = ErrorSum;
  using Context = Channel<C>;
  template <int N>
  using Loaded = Packet<T, N>;

  const void* x;
  C* stats;
  C* ema;
  C rate;
  int64_t channels, n;  // n elements of a channel
  ChannelParams<C> params;

  bool aligned() const { return cuda::aligned(x, 16); }

  __device__ Channel<C> context(int64_t channel) const { return params[channel]; }

  template <int N>
  __device__ Packet<T, N> load(int64_t i) const {
    return Packet<T, N>::load(x, i);
  }

  template <int kStep, int N>
  __device__ void add(const Packet<T, N>& loaded, int64_t, const Channel<C>* contexts,
                      ErrorSum* sums) const {
    C v[N];
    loaded.unpack(v);
    int clipped[kStep * (N - 1) + 1] = {};
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const Channel<C>& c = contexts[e * kStep];
      const Quantized<C> q = quantize_value<kClipValue, true>(v[e], c);
      const double error = double(dequantize_value(q.q, c) - v[e]);
      ErrorSum& sum = sums[e * kStep];
      sum.error += error;
      sum.square += error * error;
      clipped[e * kStep] += !q.inside;
    }
#pragma unroll
    for (int e = 0; e <= kStep * (N - 1); ++e) sums[e].clipped += clipped[e];
  }

  __device__ void finish(int64_t channel, const ErrorSum& sum) const {
    const double mean = n > 0 ? sum.error / double(n) : 0.0;
    const double spread = sum.square - sum.error * mean;
    const ErrorStats<C> s =
        error_stats_of<C>(double(n), mean, spread < 0.0 ? 0.0 : spread, double(sum.clipped));
    write_error_stats(s, channel, channels, stats, ema, rate);
  }
};

size_t error_stats_workspace(DType, const Layout& layout) {
  return size_t(plan_reduction(layout).partials) * sizeof(ErrorSum);
}

template <class T, class C, bool kClipValue>
Error launch_typed(const std::vector<ErrorStatsParams>& calls, Stream stream) {
  using Op = ErrorStatsOp<T, C, kClipValue>;
  std::vector<Reduction<Op>> reductions;
  for (const ErrorStatsParams& p : calls) {
    const Op op = {p.x,
                   static_cast<C*>(p.stats),
                   static_cast<C*>(p.ema),
                   C(1.0 - p.decay),
                   p.layout.channels,
                   p.layout.outer * p.layout.inner,
                   ChannelParams<C>(p.quant)};
    reductions.push_back({op, p.layout, p.workspace});
  }
  return launch_reductions(reductions, stream);
}

Error launch_error_stats(const ErrorStatsParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const ErrorStatsParams& p) { return int(p.dtype) * 2 + p.clip_value; };
  return for_kinds(calls, count, kind_of, [&](const std::vector<ErrorStatsParams>& group) {
    QK_DISPATCH(group[0].dtype, return group[0].clip_value
                                           ? launch_typed<T, C, true>(group, stream)
                                           : launch_typed<T, C, false>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

// The ranges of all calls, then the statistics.
Error launch_error_stats_dynamic(const ErrorStatsDynamicParams* calls, int64_t count,
                                 Stream stream) {
  std::vector<QuantRangeParams> ranges;
  std::vector<ErrorStatsParams> stats;
  for (int64_t k = 0; k < count; ++k) {
    const ErrorStatsDynamicParams& p = calls[k];
    const QuantRangeParams& r = p.range;
    const QuantParams quant = {r.scale, r.zero_point, true, r.qmin, r.qmax};
    ranges.push_back(r);
    stats.push_back(
        {r.dtype, r.layout, quant, p.clip_value, r.x, p.stats, p.ema, p.decay, p.workspace});
  }
  const Error error = launch_quant_range(ranges.data(), count, stream);
  return error ? error : launch_error_stats(stats.data(), count, stream);
}

}  // namespace qk::cuda
