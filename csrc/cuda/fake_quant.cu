#include "cuda/batch.h"
#include "cuda/channels.h"
#include "dispatch.h"

namespace qk::cuda {

// A tile is 2 KB, so that an int counts the tiles of any memory.
template <class C>
struct FakeQuantArgs {
  const void* x;
  void* y;
  uint8_t* mask;
  int64_t numel;
  Rows rows;
  ChannelParams<C> params;
  int tiles;
};

// The elements behind the tiles, or all of a tensor without, one to a lane; a ballot of the warp is
// four bytes of the mask. `begin` is the same for the lanes of a warp.
template <bool kClipValue, class T, class C, class W>
__device__ __forceinline__ void fake_quant_rest(const W& work, int64_t begin, int lane) {
#pragma unroll 1
  for (; begin < work->numel; begin += work.warps() * kWarp) {
    const FakeQuantArgs<C>& a = *work;
    const int64_t i = begin + lane;
    bool inside = false;
    if (i < a.numel) {
      const C v = widen(static_cast<const T*>(a.x)[i]);
      const Channel<C> channel = a.params[a.rows.channel(a.rows.row(i))];
      const Quantized<C> q = quantize_value<kClipValue>(v, channel);
      static_cast<T*>(a.y)[i] = Store<T>::from(dequantize_value(q.q, channel));
      inside = q.inside;
    }
    const uint32_t bits = __ballot_sync(kAllLanes, inside);
    if (a.mask && lane < 4 && begin + lane * 8 < a.numel)
      a.mask[begin / 8 + lane] = uint8_t(bits >> (lane * 8));
  }
}

// One packet; its first `left` elements belong to the first channel. Returns the mask bits.
template <bool kClipValue, bool kTwo, class T, class C, int N>
__device__ __forceinline__ uint32_t fake_quant_packet(const FakeQuantArgs<C>& a,
                                                      const Packet<T, N>& x, int64_t i,
                                                      const Channel<C>& first,
                                                      const Channel<C>& second, int left) {
  C v[N];
  x.unpack(v);
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const Channel<C> channel = kTwo && e >= left ? second : first;
    const Quantized<C> q = quantize_value<kClipValue>(v[e], channel);
    v[e] = dequantize_value(q.q, channel);
    bits |= uint32_t(q.inside) << e;
  }
  Packet<T, N>::pack(v).store(a.y, i);
  return bits;
}

template <class T>
constexpr int kSpan = ((kTilePackets - 1) * kWarp + 1) * kVector<T>;  // of a thread in a tile

// Bits of a thread's packets in a tile. Every packet, of two rows at most, finds its own channels.
template <bool kClipValue, int kInFlight, class T, class C, class W>
__device__ __forceinline__ uint32_t fake_quant_short(const W& work, int64_t first) {
  constexpr int N = kVector<T>;
  uint32_t bits = 0;
#pragma unroll 1
  for (int u = 0; u < kTilePackets; u += kInFlight) {
    const FakeQuantArgs<C>& a = *work;
    Packet<T, N> x[kInFlight];
    Channel<C> channel[kInFlight];
    int64_t row[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) x[k] = Packet<T, N>::load(a.x, first + (u + k) * kWarp * N);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      row[k] = a.rows.row(first + (u + k) * kWarp * N);
      channel[k] = a.params[a.rows.channel(row[k])];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = first + (u + k) * kWarp * N;
      const int64_t all_left = (row[k] + 1) * a.rows.inner.divisor() - i;
      const int left = all_left < N ? int(all_left) : N;
      Channel<C> next = channel[k];
      if (left < N) next = a.params[a.rows.channel(row[k] + 1)];
      bits |= fake_quant_packet<kClipValue, true>(a, x[k], i, channel[k], next, left)
              << (u + k) * N;
    }
  }
  return bits;
}

// The same where the rows are long: most often all packets belong to one.
template <bool kClipValue, class T, class C, class W>
__device__ __forceinline__ uint32_t fake_quant_long(const W& work, int64_t first) {
  constexpr int N = kVector<T>;
  const FakeQuantArgs<C>& a = *work;
  const int64_t row = a.rows.row(first), left = (row + 1) * a.rows.inner.divisor() - first;
  if (left < kSpan<T>) return fake_quant_short<kClipValue, 1, T, C>(work, first);
  Packet<T, N> x[kTilePackets];
#pragma unroll
  for (int u = 0; u < kTilePackets; ++u) x[u] = Packet<T, N>::load(a.x, first + u * kWarp * N);
  const Channel<C> channel = a.params[a.rows.channel(row)];
  uint32_t bits = 0;
#pragma unroll
  for (int u = 0; u < kTilePackets; ++u)
    bits |=
        fake_quant_packet<kClipValue, false>(a, x[u], first + u * kWarp * N, channel, channel, N)
        << u * N;
  return bits;
}

// Ideal bytes an element: reads 4, writes 4 + 1/8 in fp32; 2 and 2 + 1/8 in fp16 and bf16. In place
// (x == y) is allowed.
template <bool kOne, bool kClipValue, bool kLong, class T, class C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    fake_quant_kernel(const __grid_constant__ Batch<FakeQuantArgs<C>, kOne> batch) {
  constexpr int N = kVector<T>;
  const Work work(batch);
  const int lane = threadIdx.x % kWarp;
  int tile = work.warp();
#pragma unroll 1
  for (; tile < work->tiles; tile += work.warps()) {
    const int64_t first = int64_t(tile) * kTile<N> + lane * N;
    const uint32_t bits =
        kLong ? fake_quant_long<kClipValue, T, C>(work, first)
              : fake_quant_short<kClipValue, sizeof(T) == 8 ? 1 : 2, T, C>(work, first);
    if (uint8_t* mask = work->mask) {
      reinterpret_cast<MaskWord<N>*>(mask)[mask_word_index<N>(tile, lane)] =
          MaskWord<N>(transpose_mask<N>(bits, lane));
    }
  }
  // beyond the tiles the warps go on as they come out of the loop
  const int tiles = work->tiles;
  fake_quant_rest<kClipValue, T, C>(work, int64_t(tiles) * kTile<N> + int64_t(tile - tiles) * kWarp,
                                    lane);
}

template <class C>
struct FakeQuantColumns {
  const void* x;
  void* y;
  uint8_t* mask;
  ChannelParams<C> params;
  Columns columns;
};

// The same bytes. Neighbours belong to different channels, so a thread keeps those of its columns.
// A row has whole bytes of the mask.
template <bool kOne, bool kClipValue, class T, class C>
__global__ void __launch_bounds__(kThreads)
    fake_quant_columns(const __grid_constant__ Batch<FakeQuantColumns<C>, kOne> batch) {
  constexpr int N = kVector<T>, kInFlight = 2;
  const Work work(batch);
  const int width = work->columns.width, height = kThreads / width, wide = width * N;
  const int x = threadIdx.x % width, y = threadIdx.x / width;
  for (int64_t item = work.block;; item += work.blocks) {
    const FakeQuantColumns<C>& own = *work;
    const Columns& columns = own.columns;
    const int64_t tiles = (columns.columns + wide - 1) / wide, part = item / tiles;
    if (part >= columns.parts) break;
    const int64_t column = (item - part * tiles) * wide + x * N;
    const bool inside = column < columns.columns;
    const int64_t begin = part * columns.part_rows, next = begin + columns.part_rows;
    const int64_t end = next < columns.outer ? next : columns.outer;
    Channel<C> channels[N];
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (inside) channels[e] = own.params[columns.inner.quotient(column + e)];
    // every thread takes every turn, because lanes that share a byte of the mask exchange bits
    for (int64_t start = begin; start < end; start += kInFlight * height) {
      const FakeQuantColumns<C>& a = *work;
      const int64_t line = a.columns.columns;
      Packet<T, N> packet[kInFlight];
      const auto row = [&](int u) { return start + u * height + y; };
      const auto there = [&](int u) { return inside && row(u) < end; };
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (there(u)) packet[u] = Packet<T, N>::load(a.x, row(u) * line + column);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = row(u) * line + column;
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

enum class FakeQuantPath { long_rows, short_rows, columns };

static bool vectors(const FakeQuantParams& p) {
  return aligned(p.x, 16) && aligned(p.y, 16) && aligned(p.mask, 4);
}

// Elements of a tile of fake_quant_kernel; 0 where a packet could hold more than two rows.
static int tile_size(const FakeQuantParams& p) {
  const int n = vector_of(p.dtype);
  const bool two_rows = p.layout.channels == 1 || p.layout.inner >= n;
  return vectors(p) && two_rows ? n * kTilePackets * kWarp : 0;
}

static FakeQuantPath path_of(const FakeQuantParams& p) {
  const Layout& l = p.layout;
  if (vectors(p) && Columns::fit(l) && l.channels * l.inner % 8 == 0) return FakeQuantPath::columns;
  const int span = ((kTilePackets - 1) * kWarp + 1) * vector_of(p.dtype);
  return l.channels == 1 || l.inner >= span ? FakeQuantPath::long_rows : FakeQuantPath::short_rows;
}

template <class C>
FakeQuantArgs<C> arguments(const FakeQuantParams& p) {
  const int64_t numel = p.layout.numel();
  const int tile = tile_size(p), tiles = tile ? int(numel / tile) : 0;
  return {p.x, p.y, p.mask, numel, Rows(p.layout), ChannelParams<C>(p.quant), tiles};
}

template <bool kClipValue, class T, class C>
Error launch_columns(const std::vector<FakeQuantParams>& calls, Stream stream) {
  constexpr int N = kVector<T>;
  constexpr int64_t kLeastRows = 64;  // of a part, to be worth the reading of the channels
  BatchKernel<FakeQuantColumns<C>, true> one = nullptr;
  if constexpr (sizeof(T) <= 4) one = fake_quant_columns<true, kClipValue, T, C>;
  Batcher<FakeQuantColumns<C>> batcher(one, fake_quant_columns<false, kClipValue, T, C>, Grid(),
                                       stream);
  for (const FakeQuantParams& p : calls) {
    const Layout& l = p.layout;
    const int64_t tiles = Columns::tiles_of(l, N), most = ceil_div(l.outer, kLeastRows);
    const int64_t wanted = ceil_div(stream_grid().most_blocks, tiles);
    const int64_t parts = wanted < most ? wanted : most;
    batcher.add({p.x, p.y, p.mask, ChannelParams<C>(p.quant), Columns(l, N, parts)}, tiles * parts);
  }
  return batcher.finish();
}

template <bool kClipValue, bool kLong, class T, class C>
Error launch_rows(const std::vector<FakeQuantParams>& calls, Stream stream) {
  BatchKernel<FakeQuantArgs<C>, true> one = nullptr;
  if constexpr (sizeof(T) <= 4) one = fake_quant_kernel<true, kClipValue, kLong, T, C>;
  Batcher<FakeQuantArgs<C>> batcher(one, fake_quant_kernel<false, kClipValue, kLong, T, C>,
                                    stream_grid(), stream);
  for (const FakeQuantParams& p : calls) {
    const int tile = tile_size(p);
    batcher.add(arguments<C>(p), blocks_for(ceil_div(p.layout.numel(), tile ? tile : 8 * kWarp)));
  }
  return batcher.finish();
}

template <bool kClipValue, class T, class C>
Error launch_typed(const std::vector<FakeQuantParams>& calls, Stream stream) {
  switch (path_of(calls[0])) {
    case FakeQuantPath::columns:
      return launch_columns<kClipValue, T, C>(calls, stream);
    case FakeQuantPath::long_rows:
      return launch_rows<kClipValue, true, T, C>(calls, stream);
    default:
      return launch_rows<kClipValue, false, T, C>(calls, stream);
  }
}

Error launch_fake_quant(const FakeQuantParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const FakeQuantParams& p) {
    if (p.layout.numel() == 0) return -1;
    return (int(p.dtype) * 2 + p.clip_value) * 3 + int(path_of(p));
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<FakeQuantParams>& group) {
    QK_DISPATCH(group[0].dtype, return group[0].clip_value
                                           ? launch_typed<true, T, C>(group, stream)
                                           : launch_typed<false, T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

struct FakeQuantBwdArgs {
  const void* grad;
  const uint8_t* mask;
  void* grad_x;
  int64_t numel;
  int tiles;
};

// Ideal bytes an element: reads 4 + 1/8, writes 4 in fp32. Elements pass as bits, so T is an
// unsigned integer of the dtype's size.
template <bool kOne, class T>
__global__ void __launch_bounds__(kThreads)
    fake_quant_bwd_kernel(const __grid_constant__ Batch<FakeQuantBwdArgs, kOne> batch) {
  constexpr int N = kVector<T>;
  const Work work(batch);
  const int lane = threadIdx.x % kWarp;
  int tile = work.warp();
  for (; tile < work->tiles; tile += work.warps()) {
    const FakeQuantBwdArgs& a = *work;
    const int64_t first = int64_t(tile) * kTile<N> + lane * N;
    const uint32_t word =
        reinterpret_cast<const MaskWord<N>*>(a.mask)[mask_word_index<N>(tile, lane)];
    Packet<T, N> grad[kTilePackets];
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u)
      grad[u] = Packet<T, N>::load(a.grad, first + u * kWarp * N);
    const uint32_t bits = transpose_mask<N>(word, lane);
    void* grad_x = work->grad_x;
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u) {
      T v[N];
      grad[u].elements(v);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] &= T(0) - T(bits >> (u * N + e) & 1);
      Packet<T, N>::of(v).store(grad_x, first + u * kWarp * N);
    }
  }
  const FakeQuantBwdArgs& a = *work;
  int64_t i = int64_t(a.tiles) * kTile<N> + int64_t(tile - a.tiles) * kWarp + lane;
#pragma unroll 1
  for (; i < a.numel; i += work.warps() * kWarp) {
    const bool inside = a.mask[i / 8] >> (i % 8) & 1;
    static_cast<T*>(a.grad_x)[i] = inside ? static_cast<const T*>(a.grad)[i] : T(0);
  }
}

template <class T>
Error launch_bwd_typed(const std::vector<FakeQuantBwdParams>& calls, Stream stream) {
  constexpr int tile = kTile<kVector<T>>;
  Batcher<FakeQuantBwdArgs> batcher(fake_quant_bwd_kernel<true, T>, fake_quant_bwd_kernel<false, T>,
                                    stream_grid(), stream);
  for (const FakeQuantBwdParams& p : calls) {
    const bool vectors = aligned(p.grad, 16) && aligned(p.grad_x, 16) && aligned(p.mask, 4);
    batcher.add({p.grad, p.mask, p.grad_x, p.numel, vectors ? int(p.numel / tile) : 0},
                blocks_for(ceil_div(p.numel, vectors ? tile : kWarp)));
  }
  return batcher.finish();
}

Error launch_fake_quant_bwd(const FakeQuantBwdParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const FakeQuantBwdParams& p) {
    return p.numel == 0 ? -1 : vector_of(p.dtype);
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<FakeQuantBwdParams>& group) {
    switch (group[0].dtype) {
      case DType::f64:
        return launch_bwd_typed<uint64_t>(group, stream);
      case DType::f32:
        return launch_bwd_typed<uint32_t>(group, stream);
      default:
        return launch_bwd_typed<uint16_t>(group, stream);
    }
  });
}

}  // namespace qk::cuda
