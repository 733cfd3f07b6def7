#include "cuda/batch.h"
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
    f(cursor.at(a, row), e);
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
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ Batch<CodesArgs<C>> batch) {
  constexpr int N = kCodes<T, I>;
  const Work work(batch);
  ChannelCursor<C> cursor;
  int64_t k = work.thread();
#pragma unroll 1
  for (; k < work->packets; k += work.threads()) quantize_packet<N, T, I>(*work, k * N, cursor);
  // beyond the packets the threads go on as they come out of the loop
  int64_t i = work->packets * N + (k - work->packets);
#pragma unroll 1
  for (; i < work->numel; i += work.threads()) quantize_packet<1, T, I>(*work, i, cursor);
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
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_kernel(const __grid_constant__ Batch<CodesArgs<C>> batch) {
  constexpr int N = kCodes<T, I>;
  const Work work(batch);
  ChannelCursor<C> cursor;
  int64_t k = work.thread();
#pragma unroll 1
  for (; k < work->packets; k += work.threads()) dequantize_packet<N, T, I>(*work, k * N, cursor);
  // beyond the packets the threads go on as they come out of the loop
  int64_t i = work->packets * N + (k - work->packets);
#pragma unroll 1
  for (; i < work->numel; i += work.threads()) dequantize_packet<1, T, I>(*work, i, cursor);
}

// from(call) and to(call): where the kernel reads and writes
template <class T, class I, class C, class Call, class From, class To>
Error launch_codes(void (*kernel)(Batch<CodesArgs<C>>), const std::vector<Call>& calls, From from,
                   To to, Stream stream) {
  constexpr int N = kCodes<T, I>;
  Batcher<CodesArgs<C>> batcher(kernel, stream_grid(), stream);
  for (const Call& p : calls) {
    const int64_t numel = p.layout.numel();
    const bool vectors = aligned(from(p), 16) && aligned(to(p), 16);
    batcher.add(
        {from(p), to(p), numel, vectors ? numel / N : 0, Rows(p.layout), ChannelParams<C>(p.quant)},
        blocks_for(ceil_div(numel, vectors ? N * kWarp : kWarp)));
  }
  return batcher.finish();
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
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Batch<PackedArgs<C>> batch) {
  const Work work(batch);
  ChannelCursor<C> cursor;
#pragma unroll 1
  for (int64_t k = work.thread(); k < work->units; k += work.threads()) {
    const PackedUnit<C> unit(*work, k);
    uint32_t word = 0;
    for (int e = 0; e < unit.codes; ++e) {
      const PackedArgs<C>& a = *work;
      const C v = widen(static_cast<const T*>(a.from)[unit.element + e]);
      const Channel<C>& channel = cursor.at(a, a.rows.row(unit.element + e));
      word |= pack_code(code_value(v, channel, a.params.qmin), e, a.pack);
    }
    for (int b = 0; b < unit.bytes; ++b)
      static_cast<uint8_t*>(work->to)[unit.byte + b] = uint8_t(word >> (8 * b));
  }
}

// Ideal bytes an element: reads pack / 8, writes 4 in fp32.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ Batch<PackedArgs<C>> batch) {
  const Work work(batch);
  ChannelCursor<C> cursor;
#pragma unroll 1
  for (int64_t k = work.thread(); k < work->units; k += work.threads()) {
    const PackedArgs<C>& a = *work;
    const PackedUnit<C> unit(a, k);
    uint32_t word = 0;
    for (int b = 0; b < unit.bytes; ++b)
      word |= uint32_t(static_cast<const uint8_t*>(a.from)[unit.byte + b]) << (8 * b);
    for (int e = 0; e < unit.codes; ++e) {
      const int32_t code = unpack_code(word, e, a.pack, a.is_signed);
      const Channel<C>& channel = cursor.at(a, a.rows.row(unit.element + e));
      static_cast<T*>(a.to)[unit.element + e] =
          Store<T>::from(dequantize_code(code, channel, a.params.qmin));
    }
  }
}

template <class C, class Call, class From, class To>
Error launch_packed(void (*kernel)(Batch<PackedArgs<C>>), const std::vector<Call>& calls, From from,
                    To to, Stream stream) {
  Batcher<PackedArgs<C>> batcher(kernel, stream_grid(), stream);
  for (const Call& p : calls) {
    const int64_t row_bytes = (p.row_size * p.pack + 7) / 8, row_units = ceil_div(p.row_size, 8);
    const int64_t units = p.layout.numel() / p.row_size * row_units;
    batcher.add({from(p), to(p), p.row_size, row_bytes, row_units, units, p.pack, p.quant.qmin < 0,
                 Rows(p.layout), ChannelParams<C>(p.quant)},
                blocks_for(ceil_div(units, kWarp)));
  }
  return batcher.finish();
}

template <class T, class C>
Error launch_quantize_typed(const std::vector<QuantizeParams>& calls, Stream stream) {
  const auto from = [](const QuantizeParams& p) { return p.x; };
  const auto to = [](const QuantizeParams& p) { return p.codes; };
  if (calls[0].pack) return launch_packed<C>(pack_kernel<T, C>, calls, from, to, stream);
  const auto run = [&](auto code) {
    using I = decltype(code);
    return launch_codes<T, I, C>(quantize_kernel<T, I, C>, calls, from, to, stream);
  };
  // the low bytes of a code are the same for signed and unsigned types
  const int bytes = calls[0].code_bytes;
  return bytes == 1 ? run(uint8_t{}) : bytes == 2 ? run(int16_t{}) : run(int32_t{});
}

template <class T, class C>
Error launch_dequantize_typed(const std::vector<DequantizeParams>& calls, Stream stream) {
  const auto from = [](const DequantizeParams& p) { return p.codes; };
  const auto to = [](const DequantizeParams& p) { return p.y; };
  if (calls[0].pack) return launch_packed<C>(unpack_kernel<T, C>, calls, from, to, stream);
  const auto run = [&](auto code) {
    using I = decltype(code);
    return launch_codes<T, I, C>(dequantize_kernel<T, I, C>, calls, from, to, stream);
  };
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
