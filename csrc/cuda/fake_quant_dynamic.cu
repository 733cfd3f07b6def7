#include "cuda/quant_range.h"
#include "dispatch.h"

namespace qk::cuda {

// Packets that a thread keeps in registers between the range and the quantization.
constexpr int kHeld = 4, kMostThreads = 1024;

template <class C>
struct MinMax {
  C lo = C(INFINITY), hi = -C(INFINITY);

  __device__ void add(C v) {
    lo = qk_min(lo, v);
    hi = qk_max(hi, v);
  }
  __device__ void merge(const MinMax& other) {
    lo = qk_min(lo, other.lo);
    hi = qk_max(hi, other.hi);
  }
};

template <class C>
struct DynamicArgs {
  const void* x;
  void* y;
  uint8_t* mask;
  RangeResult<C> result;
  int inner;  // elements of a channel, side by side; they fit in a block's registers
  int width;  // threads to a channel: some lanes of a warp, or the block
};

// Elements [first, first + count) of x, the rest of the packet 0.
template <class T, int N>
__device__ __forceinline__ Packet<T, N> load_part(const void* x, int64_t first, int count) {
  if (count == N) return Packet<T, N>::load(x, first);
  T v[N];
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] = e < count ? static_cast<const T*>(x)[first + e] : T{};
  return Packet<T, N>::of(v);
}

template <class T, int N>
__device__ __forceinline__ void store_part(const Packet<T, N>& packet, void* y, int64_t first,
                                           int count) {
  if (count == N) return packet.store(y, first);
  T v[N];
  packet.elements(v);
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < count) static_cast<T*>(y)[first + e] = v[e];
}

// Ideal bytes an element: reads 4, writes 4 + 1/8 in fp32: x is read once, its range found and its
// values quantized from registers.
template <bool kOne, class T, class C, bool kClipValue>
__global__ void __launch_bounds__(kMostThreads)
    dynamic_kernel(const __grid_constant__ Batch<DynamicArgs<C>, kOne> batch) {
  constexpr int N = kVector<T>;
  struct Shared {
    MinMax<C> scratch[kWarp];
  };
  const Work work(batch);
  const int width = work->width, lane = threadIdx.x % width, per_block = blockDim.x / width;
  const bool whole_block = width > kWarp;
  for (int64_t start = int64_t(work.block) * per_block; start < work->result.channels;
       start += int64_t(work.blocks) * per_block) {
    const int64_t channel = start + threadIdx.x / width;
    const bool there = channel < work->result.channels;
    const int64_t origin = channel * work->inner + lane * N;
    const int left = there ? work->inner - lane * N : 0;
    const auto first = [&](int u) { return origin + u * width * N; };
    const auto count = [&](int u) {  // of the elements of packet u that are there
      const int n = left - u * width * N;
      return n > N ? N : n > 0 ? n : 0;
    };
    Packet<T, N> x[kHeld];
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (count(u) > 0) x[u] = load_part<T, N>(work->x, first(u), count(u));
    MinMax<C> range;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (count(u) == 0) continue;
      C v[N];
      x[u].unpack(v);
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (e < count(u)) range.add(v[e]);
    }
    if (whole_block)
      reduce_block(range, shared<Shared>().scratch);
    else
      reduce_lanes(range, width);
    const RangeResult<C>& result = work->result;
    if (lane == 0 && there) result.write(channel, {range.lo, range.hi});
    const QParams<C> q = result.qparams({range.lo, range.hi});
    const Channel<C> c = make_channel(q.scale, C(q.zero_point), C(result.qmin), C(result.qmax));
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int n = count(u);
      uint32_t bits = 0;
      if (n > 0) {
        C v[N];
        x[u].unpack(v);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const Quantized<C> w = quantize_value<kClipValue>(v[e], c);
          v[e] = dequantize_value(w.q, c);
          bits |= uint32_t(w.inside && e < n) << e;
        }
        store_part(Packet<T, N>::pack(v), work->y, first(u), n);
      }
      uint8_t* mask = work->mask;
      if (!mask) continue;
      bits = gather_byte<N>(bits, lane);
      if (n > 0 && lane % (8 / N) == 0) mask[(first(u)) / 8] = uint8_t(bits);
    }
    if (whole_block) __syncthreads();
  }
}

// Threads to a channel, or 0 where one launch cannot do it: the channel is too long, in several
// pieces, or begins inside a byte of the mask.
static int dynamic_width(const FakeQuantDynamicParams& p) {
  const int n = vector_of(p.range.dtype);
  const Layout l = simplest(p.range.layout);
  if (p.range.method != Method::minmax || l.numel() == 0 || l.outer > 1) return 0;
  if (l.channels > 1 && l.inner % 8 != 0) return 0;
  if (!aligned(p.range.x, 16) || !aligned(p.y, 16)) return 0;
  const int64_t packets = ceil_div(l.inner, n), wanted = ceil_div(packets, kHeld);
  if (wanted > kMostThreads) return 0;
  if (wanted > kWarp) return int(ceil_div(wanted, kWarp)) * kWarp;
  int width = 8 / n;
  // eight lanes read a whole line together
  while (width < wanted || (width < 8 && width < packets)) width *= 2;
  return width;
}

// Calls of one launch: 0 for several kernels; else blocks of kThreads, or blocks of one channel
// each, whose widths differ by a third at most, since the widest sets the threads of all.
static int dynamic_kind(const FakeQuantDynamicParams& p) {
  const int width = dynamic_width(p);
  if (width == 0) return 0;
  int kind = 1, most = kWarp;
  for (; most < width; ++kind) most += kind % 2 ? most / 2 : most / 3;
  return kind;
}

template <bool kClipValue, class T, class C>
Error launch_typed(const std::vector<FakeQuantDynamicParams>& calls, Stream stream) {
  int widest = 0;
  for (const FakeQuantDynamicParams& p : calls) {
    const int width = dynamic_width(p);
    widest = width > widest ? width : widest;
  }
  const Grid grid = {widest > kWarp ? widest : kThreads, kWarp * sizeof(MinMax<C>)};
  BatchKernel<DynamicArgs<C>, true> one = nullptr;
  if constexpr (sizeof(T) <= 4) one = dynamic_kernel<true, T, C, kClipValue>;
  Batcher<DynamicArgs<C>> batcher(one, dynamic_kernel<false, T, C, kClipValue>, grid, stream);
  for (const FakeQuantDynamicParams& p : calls) {
    const Layout l = simplest(p.range.layout);
    const int width = widest > kWarp ? widest : dynamic_width(p);
    batcher.add({p.range.x, p.y, p.mask, RangeResult<C>(p.range), int(l.inner), width},
                ceil_div(l.channels, grid.threads / width));
  }
  return batcher.finish();
}

// All ranges, then all quantizations.
static Error launch_apart(const std::vector<FakeQuantDynamicParams>& calls, Stream stream) {
  std::vector<QuantRangeParams> ranges;
  std::vector<FakeQuantParams> quantizations;
  for (const FakeQuantDynamicParams& p : calls) {
    const QuantRangeParams& r = p.range;
    ranges.push_back(r);
    quantizations.push_back({r.dtype,
                             r.layout,
                             {r.scale, r.zero_point, true, r.qmin, r.qmax},
                             p.clip_value,
                             r.x,
                             p.y,
                             p.mask});
  }
  const Error error = launch_quant_range(ranges.data(), int64_t(ranges.size()), stream);
  if (error) return error;
  return launch_fake_quant(quantizations.data(), int64_t(quantizations.size()), stream);
}

Error launch_fake_quant_dynamic(const FakeQuantDynamicParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const FakeQuantDynamicParams& p) {
    const int kind = dynamic_kind(p);  // launch_apart takes every dtype
    return kind == 0 ? 0 : (kind * 4 + int(p.range.dtype)) * 2 + p.clip_value;
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<FakeQuantDynamicParams>& group) {
    if (dynamic_width(group[0]) == 0) return launch_apart(group, stream);
    QK_DISPATCH(group[0].range.dtype, return group[0].clip_value
                                                 ? launch_typed<true, T, C>(group, stream)
                                                 : launch_typed<false, T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

}  // namespace qk::cuda
