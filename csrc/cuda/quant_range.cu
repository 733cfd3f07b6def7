#include "cuda/quant_range.h"
#include "dispatch.h"

namespace qk::cuda {

template <class C>
struct RangeSum {
  C lo = C(INFINITY), hi = -C(INFINITY);
  double abs = 0;

  __device__ void merge(const RangeSum& other) {
    lo = qk_min(lo, other.lo);
    hi = qk_max(hi, other.hi);
    abs += other.abs;
  }
};

// Ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16.
template <class T, class C>
struct RangeOp {
  using Type = T;
  static constexpr int kBlocks = 4;
  using Sum = RangeSum<C>;
  struct Context {};
  template <int N>
  using Loaded = Packet<T, N>;

  const void* x;
  int64_t n;      // elements of a channel
  bool mean_abs;  // LSQ's initial scale, else that of the range
  RangeResult<C> result;

  bool aligned() const { return cuda::aligned(x, 16); }

  __device__ Context context(int64_t) const { return {}; }

  template <int N>
  __device__ Packet<T, N> load(int64_t i) const {
    return Packet<T, N>::load(x, i);
  }

  template <int kStep, int N>
  __device__ void add(const Packet<T, N>& loaded, int64_t, const Context*, Sum* sums) const {
    C v[N];
    loaded.unpack(v);
    if constexpr (kStep == 0) {
      C lo, hi;
      extremes(loaded, lo, hi);
      sums->lo = qk_min(sums->lo, lo);
      sums->hi = qk_max(sums->hi, hi);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        sums[e].lo = qk_min(sums[e].lo, v[e]);
        sums[e].hi = qk_max(sums[e].hi, v[e]);
      }
    }
    if (!mean_abs) return;
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e * kStep].abs += double(qk_abs(v[e]));
  }

  __device__ void finish(int64_t channel, const Sum& sum) const {
    const Range<C> r = n > 0 ? Range<C>{sum.lo, sum.hi} : Range<C>{C(0), C(0)};
    result.write(channel, r);
    if (!mean_abs) return;
    const double mean = n > 0 ? sum.abs / double(n) : 0.0;
    result.scale[channel] =
        lsq_scale<C>(mean, result.zero_point[channel], result.qmin, result.qmax, result.symmetric);
  }
};

// Without elements every method gives the range [0, 0].
static Method method_of(const QuantRangeParams& p) {
  return p.layout.numel() > 0 ? p.method : Method::minmax;
}

size_t minmax_workspace(DType dtype, const Layout& layout) {
  const size_t sum = dtype == DType::f64 ? sizeof(RangeSum<double>) : sizeof(RangeSum<float>);
  return size_t(plan_reduction(layout).partials) * sum;
}

template <class T, class C>
Error launch_minmax(const std::vector<QuantRangeParams>& calls, Stream stream) {
  std::vector<Reduction<RangeOp<T, C>>> reductions;
  for (const QuantRangeParams& p : calls) {
    const RangeOp<T, C> op = {p.x, p.layout.outer * p.layout.inner, p.method == Method::lsq,
                              RangeResult<C>(p)};
    reductions.push_back({op, p.layout, p.workspace});
  }
  return launch_reductions(reductions, stream);
}

// The ranges of the elements into the heads of the workspaces, then the search from them.
template <class T, class C>
Error launch_minmax_mse(std::vector<QuantRangeParams> calls, Stream stream) {
  std::vector<QuantRangeParams> starts = calls;
  std::vector<const C*> ranges;
  for (size_t k = 0; k < calls.size(); ++k) {
    starts[k].range = calls[k].workspace;
    ranges.push_back(static_cast<const C*>(calls[k].workspace));
    C* rest = static_cast<C*>(calls[k].workspace) + 2 * calls[k].layout.channels;
    starts[k].workspace = calls[k].workspace = rest;
  }
  const Error error = launch_minmax<T, C>(starts, stream);
  return error ? error : launch_mse<T, C>(calls, ranges, stream);
}

template <class T, class C>
Error launch_range_typed(const std::vector<QuantRangeParams>& calls, Stream stream) {
  switch (method_of(calls[0])) {
    case Method::percentile:
      return launch_percentile<T, C>(calls, stream);
    case Method::mse:
      return launch_minmax_mse<T, C>(calls, stream);
    default:
      return launch_minmax<T, C>(calls, stream);
  }
}

Error launch_quant_range(const QuantRangeParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const QuantRangeParams& p) {
    return p.layout.channels == 0 ? -1 : int(p.dtype) * 4 + int(method_of(p));
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<QuantRangeParams>& group) {
    QK_DISPATCH(group[0].dtype, return launch_range_typed<T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

size_t quant_range_workspace(DType dtype, const Layout& layout, Method method) {
  if (layout.numel() == 0) return 0;
  const size_t range = 2 * size_t(layout.channels) * (dtype == DType::f64 ? 8 : 4);
  const size_t minmax = minmax_workspace(dtype, layout);
  switch (method) {
    case Method::percentile:
      return percentile_workspace(dtype, layout);
    case Method::mse:
      return range + (minmax > mse_workspace(layout) ? minmax : mse_workspace(layout));
    default:
      return minmax;
  }
}

template <class C>
struct QParamsArgs {
  RangeResult<C> result;  // its range is the running one, which moves, or null
  const C* range;
  C weight;
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    qparams_kernel(const __grid_constant__ Batch<QParamsArgs<C>, false> batch) {
  const Work work(batch);
  for (int64_t c = work.thread(); c < work->result.channels; c += work.threads()) {
    const QParamsArgs<C>& a = *work;
    const int64_t channels = a.result.channels;
    const C* running = a.result.range;
    Range<C> r = {a.range[c], a.range[channels + c]};
    if (running) r = moved_range({running[c], running[channels + c]}, r, a.weight);
    a.result.write(c, r);
  }
}

template <class C>
Error launch_qparams_typed(const std::vector<QParamsParams>& calls, Stream stream) {
  Batcher<QParamsArgs<C>> batcher(nullptr, qparams_kernel<C>, stream_grid(), stream);
  for (const QParamsParams& p : calls) {
    QuantRangeParams q = {};
    q.layout = {1, p.channels, 1};
    q.qmin = p.qmin;
    q.qmax = p.qmax;
    q.symmetric = p.symmetric;
    q.scale = p.scale;
    q.zero_point = p.zero_point;
    q.range = p.running;
    batcher.add({RangeResult<C>(q), static_cast<const C*>(p.range), C(p.weight)},
                blocks_for(ceil_div(p.channels, kWarp)));
  }
  return batcher.finish();
}

Error launch_qparams(const QParamsParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const QParamsParams& p) { return p.channels == 0 ? -1 : p.is_double; };
  return for_kinds(calls, count, kind_of, [&](const std::vector<QParamsParams>& group) {
    return group[0].is_double ? launch_qparams_typed<double>(group, stream)
                              : launch_qparams_typed<float>(group, stream);
  });
}

}  // namespace qk::cuda
