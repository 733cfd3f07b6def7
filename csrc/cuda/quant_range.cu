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
#pragma unroll
    for (int e = 0; e < N; ++e) {
      Sum& sum = sums[e * kStep];
      sum.lo = qk_min(sum.lo, v[e]);
      sum.hi = qk_max(sum.hi, v[e]);
      if (mean_abs) sum.abs += double(qk_abs(v[e]));
    }
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

// The range of the elements into the head of the workspace, then the search from it.
template <class T, class C>
Error launch_minmax_mse(QuantRangeParams p, Stream stream) {
  void* range = p.range;
  p.range = p.workspace;
  p.workspace = static_cast<C*>(p.workspace) + 2 * p.layout.channels;
  const Error error = launch_minmax<T, C>({p}, stream);
  if (error) return error;
  const C* start = static_cast<const C*>(p.range);
  p.range = range;
  return launch_mse<T, C>(p, start, p.workspace, stream);
}

// The searches take tensor after tensor: each is several launches that fill the machine alone.
template <class T, class C>
Error launch_range_typed(const std::vector<QuantRangeParams>& calls, Stream stream) {
  const Method method = method_of(calls[0]);
  if (method != Method::percentile && method != Method::mse)
    return launch_minmax<T, C>(calls, stream);
  Error error = 0;
  for (size_t k = 0; k < calls.size() && !error; ++k)
    error = method == Method::mse ? launch_minmax_mse<T, C>(calls[k], stream)
                                  : launch_percentile<T, C>(calls[k], stream);
  return error;
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
  RangeResult<C> result;
  const C* range;
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    qparams_kernel(const __grid_constant__ Batch<QParamsArgs<C>> batch) {
  const Work work(batch);
  for (int64_t c = work.thread(); c < work->result.channels; c += work.threads()) {
    const QParamsArgs<C>& a = *work;
    a.result.write(c, {a.range[c], a.range[a.result.channels + c]});
  }
}

template <class C>
Error launch_qparams_typed(const std::vector<QParamsParams>& calls, Stream stream) {
  Batcher<QParamsArgs<C>> batcher(qparams_kernel<C>, stream_grid(), stream);
  for (const QParamsParams& p : calls) {
    QuantRangeParams q = {};
    q.layout = {1, p.channels, 1};
    q.qmin = p.qmin;
    q.qmax = p.qmax;
    q.symmetric = p.symmetric;
    q.scale = p.scale;
    q.zero_point = p.zero_point;
    batcher.add({RangeResult<C>(q), static_cast<const C*>(p.range)},
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
