#include "cuda/channels.h"
#include "dispatch.h"

namespace qk::cuda {

template <class C>
struct FakeQuantArgs {
  const void* x;
  void* y;
  uint8_t* mask;
  int64_t numel, tiles;
  Rows rows;
  ChannelParams<C> params;
};

// Byte `byte` of the mask and its (up to) 8 elements, one by one.
template <bool kClipValue, class T, class C>
__device__ void fake_quant_byte(const FakeQuantArgs<C>& a, int64_t byte, ChannelCursor<C>& cursor) {
  const int64_t first = byte * 8;
  const int count = a.numel - first < 8 ? int(a.numel - first) : 8;
  T v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) v[e] = static_cast<const T*>(a.x)[first + e];
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e >= count) break;
    const Channel<C>& channel = cursor.at(a.rows.row(first + e));
    const Quantized<C> q = quantize_value<kClipValue>(widen(v[e]), channel);
    static_cast<T*>(a.y)[first + e] = Store<T>::from(dequantize_value(q.q, channel));
    bits |= uint32_t(q.inside) << e;
  }
  if (a.mask) a.mask[byte] = uint8_t(bits);
}

// One packet; row is that of its first element. Returns the mask bits.
template <bool kClipValue, bool kStraddle, class T, class C, int N>
__device__ __forceinline__ uint32_t fake_quant_packet(const FakeQuantArgs<C>& a,
                                                      const Packet<T, N>& x, int64_t first,
                                                      int64_t row, ChannelCursor<C>& cursor) {
  C v[N];
  x.unpack(v);
  Channel<C> channel = cursor.at(row);
  int64_t next_row = kStraddle ? (row + 1) * a.rows.inner.divisor() : 0;
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (kStraddle && first + e >= next_row) {
      channel = cursor.at(++row);
      next_row += a.rows.inner.divisor();
    }
    const Quantized<C> q = quantize_value<kClipValue>(v[e], channel);
    v[e] = dequantize_value(q.q, channel);
    bits |= uint32_t(q.inside) << e;
  }
  Packet<T, N>::pack(v).store(a.y, first);
  return bits;
}

// Ideal bytes an element: reads 4, writes 4 + 1/8 in fp32; 2 and 2 + 1/8 in fp16 and bf16. In place
// (x == y) is allowed. kStraddle: a packet may hold elements of several rows; then packets are read
// one at a time, to keep the code of the row change small.
template <bool kClipValue, bool kStraddle, class T, class C>
__global__ void __launch_bounds__(kThreads) fake_quant_kernel(FakeQuantArgs<C> a) {
  constexpr int N = kVector<T>, kInFlight = kStraddle ? 1 : kTilePackets;
  const int lane = threadIdx.x % kWarp;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  ChannelCursor<C> cursor(a.rows, a.params);
  for (int64_t tile = thread / kWarp; tile < a.tiles; tile += threads / kWarp) {
    const int64_t first = tile * kTile<N> + lane * N;
    const int64_t last = first + (kTilePackets - 1) * kWarp * N;
    uint32_t bits = 0;
#pragma unroll(kStraddle ? 1 : kTilePackets)
    for (int u = 0; u < kTilePackets; u += kInFlight) {
      Packet<T, N> x[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        x[k] = Packet<T, N>::load(a.x, first + (u + k) * kWarp * N);
      const int64_t first_row = a.rows.row(first);
      const bool one_row = !kStraddle && a.rows.row(last) == first_row;
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t i = first + (u + k) * kWarp * N;
        const int64_t row = one_row ? first_row : a.rows.row(i);
        bits |= fake_quant_packet<kClipValue, kStraddle>(a, x[k], i, row, cursor) << (u + k) * N;
      }
    }
    if (a.mask) {
      reinterpret_cast<MaskWord<N>*>(a.mask)[mask_word_index<N>(tile, lane)] =
          MaskWord<N>(transpose_mask<N>(bits, lane));
    }
  }
#pragma unroll 1
  for (int64_t byte = a.tiles * (kTile<N> / 8) + thread; byte * 8 < a.numel; byte += threads)
    fake_quant_byte<kClipValue, T>(a, byte, cursor);
}

// The same bytes. Neighbours belong to different channels, so a thread keeps those of its columns.
// A row has whole bytes of the mask.
template <bool kClipValue, class T, class C>
__global__ void __launch_bounds__(kThreads)
    fake_quant_columns(FakeQuantArgs<C> a, Columns columns) {
  constexpr int N = kVector<T>, kInFlight = 2;
  const int height = kThreads / columns.width, wide = columns.width * N;
  const int x = threadIdx.x % columns.width, y = threadIdx.x / columns.width;
  const int64_t tiles = (columns.columns + wide - 1) / wide;
  for (int64_t item = blockIdx.x; item < tiles * columns.parts; item += gridDim.x) {
    const int64_t part = item / tiles, column = (item - part * tiles) * wide + x * N;
    const int64_t begin = part * columns.part_rows, next = begin + columns.part_rows;
    const int64_t end = next < columns.outer ? next : columns.outer;
    Channel<C> channels[N];
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (column < columns.columns) channels[e] = a.params[columns.inner.quotient(column + e)];
    // every thread takes every turn, because lanes that share a byte of the mask exchange bits
    for (int64_t start = begin; start < end; start += kInFlight * height) {
      Packet<T, N> packet[kInFlight];
      const auto row = [&](int u) { return start + u * height + y; };
      const auto there = [&](int u) { return column < columns.columns && row(u) < end; };
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (there(u)) packet[u] = Packet<T, N>::load(a.x, row(u) * columns.columns + column);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = row(u) * columns.columns + column;
        uint32_t bits = 0;
        if (there(u)) {
          C v[N];
          packet[u].unpack(v);
#pragma unroll
          for (int e = 0; e < N; ++e) {
            const Quantized<C> q = quantize_value<kClipValue>(v[e], channels[e]);
            v[e] = dequantize_value(q.q, channels[e]);
            bits |= uint32_t(q.inside) << e;
          }
          Packet<T, N>::pack(v).store(a.y, i);
        }
        if (!a.mask) continue;
        bits = gather_byte<N>(bits, x);
        if (there(u) && x % (8 / N) == 0) a.mask[i / 8] = uint8_t(bits);
      }
    }
  }
}

template <bool kClipValue, class T, class C>
Error launch_columns(const FakeQuantArgs<C>& args, const Layout& l, Stream stream) {
  constexpr int N = kVector<T>;
  constexpr int64_t kLeastRows = 64;  // of a part, to be worth the reading of the channels
  const int64_t tiles = Columns::tiles_of(l, N), blocks = int64_t(sm_count()) * 32;
  const int64_t wanted = ceil_div(blocks, tiles), most = ceil_div(l.outer, kLeastRows);
  const Columns columns(l, N, wanted < most ? wanted : most);
  return launch(fake_quant_columns<kClipValue, T, C>, tiles * columns.parts, kThreads, 0, stream,
                args, columns);
}

template <bool kClipValue, class T, class C>
Error launch_typed(const FakeQuantParams& p, Stream stream) {
  constexpr int N = kVector<T>;
  const int64_t numel = p.layout.numel();
  const bool vectors = aligned(p.x, 16) && aligned(p.y, 16) && aligned(p.mask, 4);
  const FakeQuantArgs<C> args = {p.x,
                                 p.y,
                                 p.mask,
                                 numel,
                                 vectors ? numel / kTile<N> : 0,
                                 Rows(p.layout),
                                 ChannelParams<C>(p.quant)};
  if (vectors && Columns::fit(p.layout) && p.layout.channels * p.layout.inner % 8 == 0)
    return launch_columns<kClipValue, T>(args, p.layout, stream);
  const bool straddle = p.layout.channels > 1 && p.layout.inner % N != 0;
  const auto kernel = straddle ? fake_quant_kernel<kClipValue, true, T, C>
                               : fake_quant_kernel<kClipValue, false, T, C>;
  const int64_t warps = vectors ? ceil_div(numel, kTile<N>) : ceil_div(numel, 8 * kWarp);
  return launch(kernel, stream_blocks(warps), kThreads, 0, stream, args);
}

Error launch_fake_quant(const FakeQuantParams& p, Stream stream) {
  if (p.layout.numel() == 0) return 0;
  QK_DISPATCH(p.dtype, return p.clip_value ? launch_typed<true, T, C>(p, stream)
                                           : launch_typed<false, T, C>(p, stream));
  return int(cudaErrorInvalidValue);
}

struct FakeQuantBwdArgs {
  const void* grad;
  const uint8_t* mask;
  void* grad_x;
  int64_t numel, tiles;
};

// Ideal bytes an element: reads 4 + 1/8, writes 4 in fp32. Elements pass as bits, so T is an
// unsigned integer of the dtype's size.
template <class T>
__global__ void __launch_bounds__(kThreads) fake_quant_bwd_kernel(FakeQuantBwdArgs a) {
  constexpr int N = kVector<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t tile = thread / kWarp; tile < a.tiles; tile += threads / kWarp) {
    const int64_t first = tile * kTile<N> + lane * N;
    const uint32_t word =
        reinterpret_cast<const MaskWord<N>*>(a.mask)[mask_word_index<N>(tile, lane)];
    Packet<T, N> grad[kTilePackets];
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u)
      grad[u] = Packet<T, N>::load(a.grad, first + u * kWarp * N);
    const uint32_t bits = transpose_mask<N>(word, lane);
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u) {
      T v[N];
      grad[u].elements(v);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] &= T(0) - T(bits >> (u * N + e) & 1);
      Packet<T, N>::of(v).store(a.grad_x, first + u * kWarp * N);
    }
  }
#pragma unroll 1
  for (int64_t i = a.tiles * kTile<N> + thread; i < a.numel; i += threads) {
    const bool inside = a.mask[i / 8] >> (i % 8) & 1;
    static_cast<T*>(a.grad_x)[i] = inside ? static_cast<const T*>(a.grad)[i] : T(0);
  }
}

template <class T>
Error launch_bwd_typed(const FakeQuantBwdParams& p, Stream stream) {
  const bool vectors = aligned(p.grad, 16) && aligned(p.grad_x, 16) && aligned(p.mask, 4);
  constexpr int tile = kTile<kVector<T>>;
  const FakeQuantBwdArgs args = {p.grad, p.mask, p.grad_x, p.numel, vectors ? p.numel / tile : 0};
  const int64_t warps = ceil_div(p.numel, vectors ? tile : kWarp);
  return launch(fake_quant_bwd_kernel<T>, stream_blocks(warps), kThreads, 0, stream, args);
}

Error launch_fake_quant_bwd(const FakeQuantBwdParams& p, Stream stream) {
  if (p.numel == 0) return 0;
  switch (p.dtype) {
    case DType::f64:
      return launch_bwd_typed<uint64_t>(p, stream);
    case DType::f32:
      return launch_bwd_typed<uint32_t>(p, stream);
    default:
      return launch_bwd_typed<uint16_t>(p, stream);
  }
}

}  // namespace qk::cuda
