#include "cuda/channels.h"
#include "dispatch.h"
#include "math/quantize.h"

namespace qk::cuda {

template <class C>
struct CodesArgs {
  const void* from;
  void* to;
  int64_t numel, packets;
  Rows rows;
  ChannelParams<C> params;
};

// Elements of T and codes of I that both fit in 16 bytes.
template <class T, class I>
constexpr int kCodes = 16 / int(sizeof(T) > sizeof(I) ? sizeof(T) : sizeof(I));

// f(element's channel, e) for the N elements from `first` on.
template <int N, class C, class F>
__device__ __forceinline__ void for_elements(const CodesArgs<C>& a, int64_t first,
                                             ChannelCursor<C>& cursor, F f) {
  int64_t row = a.rows.row(first), next_row = (row + 1) * a.rows.inner.divisor();
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (first + e >= next_row) {
      ++row;
      next_row += a.rows.inner.divisor();
    }
    f(cursor.at(row), e);
  }
}

template <int N, class T, class I, class C>
__device__ __forceinline__ void quantize_packet(const CodesArgs<C>& a, int64_t first,
                                                ChannelCursor<C>& cursor) {
  C v[N];
  I code[N];
  Packet<T, N>::load(a.from, first).unpack(v);
  for_elements<N>(a, first, cursor, [&](const Channel<C>& channel, int e) {
    code[e] = I(code_value(v[e], channel, a.params.qmin));
  });
  Packet<I, N>::of(code).store(a.to, first);
}

// Ideal bytes an element: reads 4 in fp32, writes the code's 1, 2 or 4.
template <class T, class I, class C>
__global__ void __launch_bounds__(kThreads) quantize_kernel(CodesArgs<C> a) {
  constexpr int N = kCodes<T, I>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  ChannelCursor<C> cursor(a.rows, a.params);
#pragma unroll 1
  for (int64_t k = thread; k < a.packets; k += threads) quantize_packet<N, T, I>(a, k * N, cursor);
#pragma unroll 1
  for (int64_t i = a.packets * N + thread; i < a.numel; i += threads)
    quantize_packet<1, T, I>(a, i, cursor);
}

template <int N, class T, class I, class C>
__device__ __forceinline__ void dequantize_packet(const CodesArgs<C>& a, int64_t first,
                                                  ChannelCursor<C>& cursor) {
  I code[N];
  C v[N];
  Packet<I, N>::load(a.from, first).elements(code);
  for_elements<N>(a, first, cursor, [&](const Channel<C>& channel, int e) {
    v[e] = dequantize_code(int32_t(code[e]), channel, a.params.qmin);
  });
  Packet<T, N>::pack(v).store(a.to, first);
}

// Ideal bytes an element: reads the code's 1, 2 or 4, writes 4 in fp32.
template <class T, class I, class C>
__global__ void __launch_bounds__(kThreads, 4) dequantize_kernel(CodesArgs<C> a) {
  constexpr int N = kCodes<T, I>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  ChannelCursor<C> cursor(a.rows, a.params);
#pragma unroll 1
  for (int64_t k = thread; k < a.packets; k += threads)
    dequantize_packet<N, T, I>(a, k * N, cursor);
#pragma unroll 1
  for (int64_t i = a.packets * N + thread; i < a.numel; i += threads)
    dequantize_packet<1, T, I>(a, i, cursor);
}

template <class T, class I, class C, class Kernel>
Error launch_codes(Kernel kernel, const Layout& l, const QuantParams& quant, const void* from,
                   void* to, Stream stream) {
  constexpr int N = kCodes<T, I>;
  const bool vectors = aligned(from, 16) && aligned(to, 16);
  const CodesArgs<C> args = {
      from, to, l.numel(), vectors ? l.numel() / N : 0, Rows(l), ChannelParams<C>(quant)};
  const int64_t work = vectors ? ceil_div(l.numel(), N) : l.numel();
  return launch(kernel, stream_blocks(ceil_div(work, kWarp)), kThreads, 0, stream, args);
}

// Packed codes: a thread to each 8 codes of a row, which are `pack` whole bytes, or fewer at the
// end.
template <class C>
struct PackedArgs {
  const void* from;
  void* to;
  int64_t row_size, row_bytes, row_units, units;
  int pack;
  bool is_signed;
  Rows rows;
  ChannelParams<C> params;
};

template <class C>
struct PackedUnit {
  int64_t element, byte;
  int codes, bytes;

  __device__ PackedUnit(const PackedArgs<C>& a, int64_t unit) {
    const int64_t row = unit / a.row_units, at = (unit - row * a.row_units) * 8;
    element = row * a.row_size + at;
    byte = row * a.row_bytes + at / 8 * a.pack;
    codes = a.row_size - at < 8 ? int(a.row_size - at) : 8;
    bytes = (codes * a.pack + 7) / 8;
  }
};

// Ideal bytes an element: reads 4 in fp32, writes pack / 8.
template <class T, class C>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackedArgs<C> a) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  ChannelCursor<C> cursor(a.rows, a.params);
#pragma unroll 1
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < a.units; k += threads) {
    const PackedUnit<C> unit(a, k);
    uint32_t word = 0;
    for (int e = 0; e < unit.codes; ++e) {
      const C v = widen(static_cast<const T*>(a.from)[unit.element + e]);
      const Channel<C>& channel = cursor.at(a.rows.row(unit.element + e));
      word |= pack_code(code_value(v, channel, a.params.qmin), e, a.pack);
    }
    for (int b = 0; b < unit.bytes; ++b)
      static_cast<uint8_t*>(a.to)[unit.byte + b] = uint8_t(word >> (8 * b));
  }
}

// Ideal bytes an element: reads pack / 8, writes 4 in fp32.
template <class T, class C>
__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedArgs<C> a) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  ChannelCursor<C> cursor(a.rows, a.params);
#pragma unroll 1
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < a.units; k += threads) {
    const PackedUnit<C> unit(a, k);
    uint32_t word = 0;
    for (int b = 0; b < unit.bytes; ++b)
      word |= uint32_t(static_cast<const uint8_t*>(a.from)[unit.byte + b]) << (8 * b);
    for (int e = 0; e < unit.codes; ++e) {
      const int32_t code = unpack_code(word, e, a.pack, a.is_signed);
      const Channel<C>& channel = cursor.at(a.rows.row(unit.element + e));
      static_cast<T*>(a.to)[unit.element + e] =
          Store<T>::from(dequantize_code(code, channel, a.params.qmin));
    }
  }
}

template <class C, class Params>
Error launch_packed(void (*kernel)(PackedArgs<C>), const Params& p, const void* from, void* to,
                    Stream stream) {
  const int64_t row_bytes = (p.row_size * p.pack + 7) / 8, row_units = ceil_div(p.row_size, 8);
  const int64_t units = p.layout.numel() / p.row_size * row_units;
  const PackedArgs<C> args = {
      from,  to,     p.row_size,       row_bytes,      row_units,
      units, p.pack, p.quant.qmin < 0, Rows(p.layout), ChannelParams<C>(p.quant)};
  return launch(kernel, stream_blocks(ceil_div(units, kWarp)), kThreads, 0, stream, args);
}

template <class T, class C>
Error launch_quantize_typed(const QuantizeParams& p, Stream stream) {
  if (p.pack) return launch_packed<C>(pack_kernel<T, C>, p, p.x, p.codes, stream);
  const auto run = [&](auto code) {
    using I = decltype(code);
    return launch_codes<T, I, C>(quantize_kernel<T, I, C>, p.layout, p.quant, p.x, p.codes, stream);
  };
  // the low bytes of a code are the same for signed and unsigned types
  return p.code_bytes == 1 ? run(uint8_t{}) : p.code_bytes == 2 ? run(int16_t{}) : run(int32_t{});
}

Error launch_quantize(const QuantizeParams& p, Stream stream) {
  if (p.layout.numel() == 0) return 0;
  QK_DISPATCH(p.dtype, return launch_quantize_typed<T, C>(p, stream));
  return int(cudaErrorInvalidValue);
}

template <class T, class C>
Error launch_dequantize_typed(const DequantizeParams& p, Stream stream) {
  if (p.pack) return launch_packed<C>(unpack_kernel<T, C>, p, p.codes, p.y, stream);
  const auto run = [&](auto code) {
    using I = decltype(code);
    return launch_codes<T, I, C>(dequantize_kernel<T, I, C>, p.layout, p.quant, p.codes, p.y,
                                 stream);
  };
  if (p.code_bytes == 1) return p.code_signed ? run(int8_t{}) : run(uint8_t{});
  return p.code_bytes == 2 ? run(int16_t{}) : run(int32_t{});
}

Error launch_dequantize(const DequantizeParams& p, Stream stream) {
  if (p.layout.numel() == 0) return 0;
  QK_DISPATCH(p.dtype, return launch_dequantize_typed<T, C>(p, stream));
  return int(cudaErrorInvalidValue);
}

}  // namespace qk::cuda
