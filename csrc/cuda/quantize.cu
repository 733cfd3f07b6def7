#include "cuda/batch.h"
#include "cuda/channels.h"
#include "dispatch.h"
#include "math/quantize.h"

namespace qk::cuda {

// Stands for codes of 1, 2 or 4 bits, where an integer type is asked for.
struct Packed {};

// Rows of packed codes, each of which ends with a whole byte.
struct PackedRows {
  int64_t size, bytes;
  FastDivision units;  // of 8 codes, the last one of a row may have fewer
  int64_t all_units;
  int bits;
  bool is_signed;
};

template <class C>
struct CodesArgs {
  const void* from;
  void* to;
  int64_t numel;
  int tiles;
  Rows rows;
  ChannelParams<C> params;
  PackedRows packed;
};

// Eight codes of a row, or what is left of them.
struct PackedUnit {
  int64_t element, byte;
  int codes, bytes;

  __device__ PackedUnit(const PackedRows& p, int64_t unit) {
    const int64_t row = p.units.quotient(unit), at = (unit - row * p.units.divisor()) * 8;
    element = row * p.size + at;
    byte = row * p.bytes + at / 8 * p.bits;
    codes = p.size - at < 8 ? int(p.size - at) : 8;
    bytes = (codes * p.bits + 7) / 8;
  }
};

// N values of one type, in accesses of up to 16 bytes.
template <class V, int N>
struct Run {
  static constexpr int M = N < kVector<V> ? N : kVector<V>;
  Packet<V, M> packets[N / M];

  __device__ static Run load(const void* from, int64_t i) {
    Run run;
#pragma unroll
    for (int k = 0; k < N / M; ++k) run.packets[k] = Packet<V, M>::load(from, i + k * M);
    return run;
  }
  __device__ void store(void* to, int64_t i) const {
#pragma unroll
    for (int k = 0; k < N / M; ++k) packets[k].store(to, i + k * M);
  }
  __device__ void elements(V (&v)[N]) const { memcpy(v, packets, sizeof(v)); }
  __device__ static Run of(const V (&v)[N]) {
    Run run;
    memcpy(run.packets, v, sizeof(v));
    return run;
  }
};

// N packed codes from the i-th on, in the low bits; they may be a part of a byte.
template <int N>
__device__ __forceinline__ uint32_t load_codes(const void* from, int64_t i, int bits) {
  const uint8_t* at = static_cast<const uint8_t*>(from) + i * bits / 8;
  if (N * bits == 32) return *reinterpret_cast<const uint32_t*>(at);
  if (N * bits == 16) return *reinterpret_cast<const uint16_t*>(at);
  return uint32_t(*at) >> (i * bits % 8);
}

// Back to where they were. Lanes with parts of a byte put them together: for whole warps.
template <int N>
__device__ __forceinline__ void store_codes(uint32_t word, void* to, int64_t i, int bits) {
  const int lane = threadIdx.x % kWarp;
  uint8_t* at = static_cast<uint8_t*>(to) + i * bits / 8;
  int width = N * bits, lanes = 1;
#pragma unroll 1
  for (; width < 8; width *= 2, lanes *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, word, lanes);
    word = lane & lanes ? word : word | other << width;
  }
  if (width == 32)
    *reinterpret_cast<uint32_t*>(at) = word;
  else if (width == 16)
    *reinterpret_cast<uint16_t*>(at) = uint16_t(word);
  else if ((lane & (lanes - 1)) == 0)
    *at = uint8_t(word);
}

// Ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16, and writes the code's 1, 2 or 4, or
// an eighth of its bits.
template <class T, class I, class C>
struct Quantize {
  static constexpr int N = kVector<T>;
  static constexpr bool kPacked = std::is_same_v<I, Packed>;
  using Args = CodesArgs<C>;
  using Code = std::conditional_t<kPacked, int32_t, I>;
  using Loaded = Packet<T, N>;

  __device__ static Loaded load(const Args& a, int64_t i) { return Loaded::load(a.from, i); }

  // channel(e) is that of element e
  template <class F>
  __device__ static void store(const Args& a, const Loaded& x, int64_t i, F channel) {
    C v[N];
    Code code[N];
    x.unpack(v);
#pragma unroll
    for (int e = 0; e < N; ++e) code[e] = Code(code_value(v[e], channel(e), a.params.qmin));
    if constexpr (kPacked) {
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < N; ++e) word |= pack_code(code[e], e, a.packed.bits);
      store_codes<N>(word, a.to, i, a.packed.bits);
    } else {
      Run<Code, N>::of(code).store(a.to, i);
    }
  }

  __device__ static Code one(const Args& a, int64_t i) {
    const C v = widen(static_cast<const T*>(a.from)[i]);
    return Code(code_value(v, a.params[a.rows.channel(a.rows.row(i))], a.params.qmin));
  }

  __device__ static void rest(const Args& a, int64_t i) { static_cast<Code*>(a.to)[i] = one(a, i); }

  __device__ static void rest(const Args& a, const PackedUnit& unit) {
    uint32_t word = 0;
#pragma unroll 1
    for (int e = 0; e < unit.codes; ++e)
      word |= pack_code(one(a, unit.element + e), e, a.packed.bits);
#pragma unroll 1
    for (int b = 0; b < unit.bytes; ++b)
      static_cast<uint8_t*>(a.to)[unit.byte + b] = uint8_t(word >> (8 * b));
  }
};

// Ideal bytes an element: reads the code's 1, 2 or 4, or an eighth of its bits, and writes 4 in
// fp32, 2 in fp16 and bf16.
template <class T, class I, class C>
struct Dequantize {
  static constexpr int N = kVector<T>;
  static constexpr bool kPacked = std::is_same_v<I, Packed>;
  using Args = CodesArgs<C>;
  using Code = std::conditional_t<kPacked, int32_t, I>;
  using Loaded = std::conditional_t<kPacked, uint32_t, Run<Code, N>>;

  __device__ static Loaded load(const Args& a, int64_t i) {
    if constexpr (kPacked)
      return load_codes<N>(a.from, i, a.packed.bits);
    else
      return Loaded::load(a.from, i);
  }

  template <class F>
  __device__ static void store(const Args& a, const Loaded& loaded, int64_t i, F channel) {
    Code code[N];
    C v[N];
    if constexpr (kPacked) {
#pragma unroll
      for (int e = 0; e < N; ++e)
        code[e] = unpack_code(loaded, e, a.packed.bits, a.packed.is_signed);
    } else {
      loaded.elements(code);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = dequantize_code(int32_t(code[e]), channel(e), a.params.qmin);
    Packet<T, N>::pack(v).store(a.to, i);
  }

  __device__ static void one(const Args& a, int64_t i, int32_t code) {
    const Channel<C> channel = a.params[a.rows.channel(a.rows.row(i))];
    static_cast<T*>(a.to)[i] = Store<T>::from(dequantize_code(code, channel, a.params.qmin));
  }

  __device__ static void rest(const Args& a, int64_t i) {
    one(a, i, int32_t(static_cast<const Code*>(a.from)[i]));
  }

  __device__ static void rest(const Args& a, const PackedUnit& unit) {
    uint32_t word = 0;
#pragma unroll 1
    for (int b = 0; b < unit.bytes; ++b)
      word |= uint32_t(static_cast<const uint8_t*>(a.from)[unit.byte + b]) << (8 * b);
#pragma unroll 1
    for (int e = 0; e < unit.codes; ++e)
      one(a, unit.element + e, unpack_code(word, e, a.packed.bits, a.packed.is_signed));
  }
};

// A tile: kTilePackets in flight where they belong to one channel for the whole warp; else they are
// taken one by one, each of two channels at most.
template <class Op, class W>
__device__ __forceinline__ void convert_tile(const W& work, int64_t first) {
  constexpr int N = Op::N, kStep = kWarp * N, kSpan = (kTilePackets - 1) * kStep + N;
  const auto& a = *work;
  const int64_t row = a.rows.row(first), left = (row + 1) * a.rows.inner.divisor() - first;
  if (__ballot_sync(kAllLanes, left >= kSpan) == kAllLanes) {
    typename Op::Loaded loaded[kTilePackets];
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u) loaded[u] = Op::load(a, first + u * kStep);
    const auto channel = a.params[a.rows.channel(row)];
#pragma unroll
    for (int u = 0; u < kTilePackets; ++u)
      Op::store(a, loaded[u], first + u * kStep, [&](int) { return channel; });
    return;
  }
#pragma unroll 1
  for (int u = 0; u < kTilePackets; ++u) {
    const auto& b = *work;
    const int64_t i = first + u * kStep, row = b.rows.row(i);
    const typename Op::Loaded loaded = Op::load(b, i);
    const int64_t left = (row + 1) * b.rows.inner.divisor() - i;
    const auto channel = b.params[b.rows.channel(row)];
    const auto next = left < N ? b.params[b.rows.channel(row + 1)] : channel;
    Op::store(b, loaded, i, [&](int e) { return e < left ? channel : next; });
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 4)
    codes_kernel(const __grid_constant__ Batch<typename Op::Args, false> batch) {
  const Work work(batch);
  const int lane = threadIdx.x % kWarp;
  int tile = work.warp();
#pragma unroll 1
  for (; tile < work->tiles; tile += work.warps())
    convert_tile<Op>(work, int64_t(tile) * kTile<Op::N> + lane * Op::N);
  // beyond the tiles the warps go on as they come out of the loop
  const int tiles = work->tiles;
  int64_t k = int64_t(tiles) * kTile<Op::N>;
  if constexpr (Op::kPacked) {
    k = k / 8 + int64_t(tile - tiles) * kWarp + lane;
#pragma unroll 1
    for (; k < work->packed.all_units; k += work.warps() * kWarp)
      Op::rest(*work, PackedUnit(work->packed, k));
  } else {
    k += int64_t(tile - tiles) * kWarp + lane;
#pragma unroll 1
    for (; k < work->numel; k += work.warps() * kWarp) Op::rest(*work, k);
  }
}

// from(call) and to(call): where the kernel reads and writes
template <class Op, class Call, class From, class To>
Error launch_codes(const std::vector<Call>& calls, From from, To to, Stream stream) {
  using Args = typename Op::Args;
  // not a part of training: a kernel for single calls would not be worth its code
  Batcher<Args> batcher(nullptr, codes_kernel<Op>, stream_grid(), stream);
  for (const Call& p : calls) {
    const Layout& l = p.layout;
    const int64_t numel = l.numel(), size = p.pack ? p.row_size : 1;
    const int64_t row_units = ceil_div(size, 8), units = numel / size * row_units;
    const PackedRows packed = {size,   (size * p.pack + 7) / 8, FastDivision(row_units), units,
                               p.pack, p.quant.qmin < 0};
    const bool two_rows = l.channels == 1 || l.inner >= Op::N;
    const bool whole_units = p.pack == 0 || size % 8 == 0;
    const bool vectors = aligned(from(p), 16) && aligned(to(p), 16) && two_rows && whole_units;
    const int tiles = vectors ? int(numel / kTile<Op::N>) : 0;
    batcher.add({from(p), to(p), numel, tiles, Rows(l), decltype(Args::params)(p.quant), packed},
                blocks_for(tiles ? tiles : ceil_div(p.pack ? units : numel, kWarp)));
  }
  return batcher.finish();
}

template <class T, class C>
Error launch_quantize_typed(const std::vector<QuantizeParams>& calls, Stream stream) {
  const auto run = [&](auto code) {
    return launch_codes<Quantize<T, decltype(code), C>>(
        calls, [](const QuantizeParams& p) { return p.x; },
        [](const QuantizeParams& p) { return p.codes; }, stream);
  };
  if (calls[0].pack) return run(Packed{});
  // the low bytes of a code are the same for signed and unsigned types
  const int bytes = calls[0].code_bytes;
  return bytes == 1 ? run(uint8_t{}) : bytes == 2 ? run(int16_t{}) : run(int32_t{});
}

template <class T, class C>
Error launch_dequantize_typed(const std::vector<DequantizeParams>& calls, Stream stream) {
  const auto run = [&](auto code) {
    return launch_codes<Dequantize<T, decltype(code), C>>(
        calls, [](const DequantizeParams& p) { return p.codes; },
        [](const DequantizeParams& p) { return p.y; }, stream);
  };
  if (calls[0].pack) return run(Packed{});
  const int bytes = calls[0].code_bytes;
  if (bytes == 1) return calls[0].code_signed ? run(int8_t{}) : run(uint8_t{});
  return bytes == 2 ? run(int16_t{}) : run(int32_t{});
}

// Calls of one kernel: codes of 1, 2 or 4 bytes, or packed (0).
template <class Call>
int codes_kind(const Call& p, bool is_signed) {
  if (p.layout.numel() == 0) return -1;
  return (int(p.dtype) * 5 + (p.pack ? 0 : p.code_bytes)) * 2 + (is_signed && !p.pack);
}

Error launch_quantize(const QuantizeParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const QuantizeParams& p) { return codes_kind(p, false); };
  return for_kinds(calls, count, kind_of, [&](const std::vector<QuantizeParams>& group) {
    QK_DISPATCH(group[0].dtype, return launch_quantize_typed<T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

Error launch_dequantize(const DequantizeParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const DequantizeParams& p) { return codes_kind(p, p.code_signed); };
  return for_kinds(calls, count, kind_of, [&](const std::vector<DequantizeParams>& group) {
    QK_DISPATCH(group[0].dtype, return launch_dequantize_typed<T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

}  // namespace qk::cuda
