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
  int64_t inner;  // elements of a channel, side by side
  int width;      // threads to a channel: some lanes of a warp, or the block
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
template <class T, class C, bool kClipValue>
__global__ void __launch_bounds__(kMostThreads) dynamic_kernel(DynamicArgs<C> a) {
  constexpr int N = kVector<T>;
  struct Shared {
    MinMax<C> scratch[kWarp];
  };
  const bool whole_block = a.width > kWarp;
  const int lane = threadIdx.x % a.width, per_block = blockDim.x / a.width;
  const int64_t channels = a.result.channels;
  for (int64_t start = int64_t(blockIdx.x) * per_block; start < channels;
       start += int64_t(gridDim.x) * per_block) {
    const int64_t channel = start + threadIdx.x / a.width;
    const auto first = [&](int u) { return channel * a.inner + int64_t(u * a.width + lane) * N; };
    const auto count = [&](int u) {  // of the elements of packet u that are there
      const int64_t left = channel < channels ? a.inner - int64_t(u * a.width + lane) * N : 0;
      return left > N ? N : left > 0 ? int(left) : 0;
    };
    Packet<T, N> x[kHeld];
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (count(u) > 0) x[u] = load_part<T, N>(a.x, first(u), count(u));
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
      reduce_lanes(range, a.width);
    if (lane == 0 && channel < channels) a.result.write(channel, {range.lo, range.hi});
    const QParams<C> q = a.result.qparams({range.lo, range.hi});
    const Channel<C> c = make_channel(q.scale, C(q.zero_point), C(a.result.qmin), C(a.result.qmax));
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
        store_part(Packet<T, N>::pack(v), a.y, first(u), n);
      }
      if (!a.mask) continue;
      bits = gather_byte<N>(bits, lane);
      if (n > 0 && lane % (8 / N) == 0) a.mask[first(u) / 8] = uint8_t(bits);
    }
    if (whole_block) __syncthreads();
  }
}

// Threads to a channel, or 0 where one launch cannot do it: the channel is too long, in several
// pieces, or begins inside a byte of the mask.
template <class T>
int dynamic_width(const FakeQuantDynamicParams& p, const Layout& l) {
  constexpr int N = kVector<T>;
  if (p.range.method != Method::minmax || l.outer > 1) return 0;
  if (l.channels > 1 && l.inner % 8 != 0) return 0;
  if (!aligned(p.range.x, 16) || !aligned(p.y, 16)) return 0;
  const int64_t packets = ceil_div(l.inner, N), wanted = ceil_div(packets, kHeld);
  if (wanted > kMostThreads) return 0;
  if (wanted > kWarp) return int(ceil_div(wanted, kWarp)) * kWarp;
  int width = 8 / N;
  // eight lanes read a whole line together
  while (width < wanted || (width < 8 && width < packets)) width *= 2;
  return width;
}

template <bool kClipValue, class T, class C>
Error launch_typed(const FakeQuantDynamicParams& p, Stream stream) {
  const Layout l = simplest(p.range.layout);
  const int width = dynamic_width<T>(p, l);
  if (l.numel() > 0 && width > 0) {
    const DynamicArgs<C> args = {p.range.x, p.y, p.mask, RangeResult<C>(p.range), l.inner, width};
    const int threads = width > kWarp ? width : kThreads;
    return launch(dynamic_kernel<T, C, kClipValue>, ceil_div(l.channels, threads / width), threads,
                  kWarp * sizeof(MinMax<C>), stream, args);
  }
  const Error error = launch_quant_range(p.range, stream);
  if (error) return error;
  const QuantParams quant = {p.range.scale, p.range.zero_point, true, p.range.qmin, p.range.qmax};
  return launch_fake_quant(
      {p.range.dtype, p.range.layout, quant, p.clip_value, p.range.x, p.y, p.mask}, stream);
}

Error launch_fake_quant_dynamic(const FakeQuantDynamicParams& p, Stream stream) {
  QK_DISPATCH(p.range.dtype, return p.clip_value ? launch_typed<true, T, C>(p, stream)
                                                 : launch_typed<false, T, C>(p, stream));
  return int(cudaErrorInvalidValue);
}

}  // namespace qk::cuda
