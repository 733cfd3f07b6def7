#include "cuda/reduce.h"
#include "dispatch.h"

namespace qk::cuda {

struct LsqSum {
  double scale = 0, zero_point = 0;

  __device__ void merge(const LsqSum& other) {
    scale += other.scale;
    zero_point += other.zero_point;
  }
};

// Ideal bytes an element: reads 8, writes 4 in fp32; 4 and 2 in fp16 and bf16. grad of x in the
// same pass as the sums for scale and zero point.
template <class T, class C, bool kClipValue>
struct LsqOp {
  using Type = T;
  static constexpr int kBlocks = 2;
  using Sum = LsqSum;
  using Context = Channel<C>;
  template <int N>
  struct Loaded {
    Packet<T, N> grad, x;
  };

  const void* grad;
  const void* x;
  void* grad_x;
  C* grad_s;
  C* grad_zp;
  double grad_scale;
  ChannelParams<C> params;

  bool aligned() const {
    return cuda::aligned(grad, 16) && cuda::aligned(x, 16) && cuda::aligned(grad_x, 16);
  }

  __device__ Channel<C> context(int64_t channel) const { return params[channel]; }

  template <int N>
  __device__ Loaded<N> load(int64_t i) const {
    return {Packet<T, N>::load(grad, i), Packet<T, N>::load(x, i)};
  }

  template <int kStep, int N>
  __device__ void add(const Loaded<N>& loaded, int64_t i, const Channel<C>* channels,
                      LsqSum* sums) const {
    C g[N], v[N], out[N];
    loaded.grad.unpack(g);
    loaded.x.unpack(v);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const LsqGrad<C> d = lsq_grad<kClipValue>(g[e], v[e], channels[e * kStep]);
      out[e] = d.x;
      sums[e * kStep].scale += double(d.scale);
      sums[e * kStep].zero_point += double(d.zero_point);
    }
    Packet<T, N>::pack(out).store(grad_x, i);
  }

  __device__ void finish(int64_t channel, const LsqSum& sum) const {
    grad_s[channel] = C(sum.scale * grad_scale);
    grad_zp[channel] = C(sum.zero_point * grad_scale);
  }
};

template <class T, class C, bool kClipValue>
Error launch_typed(const std::vector<LsqBwdParams>& calls, Stream stream) {
  using Op = LsqOp<T, C, kClipValue>;
  std::vector<Reduction<Op>> reductions;
  for (const LsqBwdParams& p : calls) {
    const Op op = {p.grad,
                   p.x,
                   p.grad_x,
                   static_cast<C*>(p.grad_s),
                   static_cast<C*>(p.grad_zp),
                   p.grad_scale,
                   ChannelParams<C>(p.quant)};
    reductions.push_back({op, p.layout, p.workspace});
  }
  return launch_reductions(reductions, stream);
}

Error launch_lsq_bwd(const LsqBwdParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const LsqBwdParams& p) { return int(p.dtype) * 2 + p.clip_value; };
  return for_kinds(calls, count, kind_of, [&](const std::vector<LsqBwdParams>& group) {
    QK_DISPATCH(group[0].dtype, return group[0].clip_value
                                           ? launch_typed<T, C, true>(group, stream)
                                           : launch_typed<T, C, false>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

size_t lsq_bwd_workspace(DType, const Layout& layout) {
  return size_t(plan_reduction(layout).partials) * sizeof(LsqSum);
}

}  // namespace qk::cuda
