#include "math/quantize.h"

#include "cpu/channels.h"
#include "cpu/convert.h"
#include "cpu/isa.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// f(i, n, codes) for blocks of rows of `row_size` codes cut at multiples of kBlock within each row,
// so that a block of packed codes begins on a byte; blocks of a thread lie side by side.
template <class F>
void for_blocks(int64_t numel, int64_t row_size, int threads, F f) {
  if (numel == 0) return;
  const int64_t per_row = (row_size + kBlock - 1) / kBlock;
  parallel_for(numel / row_size * per_row, threads, [&](int64_t k) {
    const int64_t row = k / per_row, begin = k % per_row * kBlock;
    const int64_t n = row_size - begin < kBlock ? row_size - begin : kBlock;
    f(row, begin, n);
  });
}

template <class C, class F>
void for_channels(const ChannelTable<C>& table, int64_t first, int64_t n, F f) {
  for_rows(first, first + n, table.channels, table.inner,
           [&](int64_t i, int64_t m, int64_t channel) { f(i - first, m, table[channel]); });
}

int64_t packed_bytes(int64_t codes, int pack) { return (codes * pack + 7) / 8; }

void write_codes(const int32_t* code, int64_t n, void* dst, int64_t at, int bytes) {
  for (int64_t i = 0; i < n; ++i) {
    if (bytes == 1) static_cast<uint8_t*>(dst)[at + i] = uint8_t(code[i]);
    if (bytes == 2) static_cast<uint16_t*>(dst)[at + i] = uint16_t(code[i]);
    if (bytes == 4) static_cast<int32_t*>(dst)[at + i] = code[i];
  }
}

void write_packed(const int32_t* code, int64_t n, uint8_t* dst, int pack) {
  const int per_byte = 8 / pack;
  for (int64_t b = 0; b < packed_bytes(n, pack); ++b) {
    uint32_t byte = 0;
    for (int i = 0; i < per_byte && b * per_byte + i < n; ++i)
      byte |= pack_code(code[b * per_byte + i], i, pack);
    dst[b] = uint8_t(byte);
  }
}

int64_t quantize(const QuantizeParams& p, int threads) {
  const int64_t numel = p.layout.numel();
  int64_t bad = -1;
  QK_DISPATCH(p.dtype, {
    ChannelTable<C> table(p.layout);
    bad = fill(table, p.quant, p.layout.channels);
    const int64_t row_size = p.pack ? p.row_size : numel;
    for_blocks(numel, row_size, threads_for(numel, threads),
               [&](int64_t row, int64_t b, int64_t n) {
                 C buffer[kBlock];
                 int32_t code[kBlock];
                 const int64_t first = row * row_size + b;
                 const C* x = load(static_cast<const T*>(p.x) + first, buffer, n);
                 for_channels(table, first, n, [&](int64_t i, int64_t m, const Channel<C> c) {
                   for (int64_t j = i; j < i + m; ++j) code[j] = code_value(x[j], c, p.quant.qmin);
                 });
                 if (p.pack) {
                   const int64_t at = row * packed_bytes(row_size, p.pack) + b * p.pack / 8;
                   write_packed(code, n, static_cast<uint8_t*>(p.codes) + at, p.pack);
                 } else {
                   write_codes(code, n, p.codes, first, p.code_bytes);
                 }
               });
  });
  return bad;
}

template <class I>
void widen(const void* src, int64_t at, int64_t n, int32_t* code) {
  for (int64_t i = 0; i < n; ++i) code[i] = static_cast<const I*>(src)[at + i];
}

void read_codes(const DequantizeParams& p, int64_t at, int64_t n, int32_t* code) {
  if (p.code_bytes == 4) return widen<int32_t>(p.codes, at, n, code);
  if (p.code_bytes == 2) return widen<int16_t>(p.codes, at, n, code);
  return p.code_signed ? widen<int8_t>(p.codes, at, n, code) : widen<uint8_t>(p.codes, at, n, code);
}

int64_t dequantize(const DequantizeParams& p, int threads) {
  const int64_t numel = p.layout.numel();
  int64_t bad = -1;
  QK_DISPATCH(p.dtype, {
    ChannelTable<C> table(p.layout);
    bad = fill(table, p.quant, p.layout.channels);
    const int64_t row_size = p.pack ? p.row_size : numel;
    for_blocks(
        numel, row_size, threads_for(numel, threads), [&](int64_t row, int64_t b, int64_t n) {
          C buffer[kBlock];
          int32_t code[kBlock];
          const int64_t first = row * row_size + b;
          if (p.pack) {
            const int64_t at = row * packed_bytes(row_size, p.pack) + b * p.pack / 8;
            const uint8_t* bytes = static_cast<const uint8_t*>(p.codes) + at;
            const int per_byte = 8 / p.pack;
            for (int64_t i = 0; i < n; ++i)
              code[i] =
                  unpack_code(bytes[i / per_byte], int(i % per_byte), p.pack, p.quant.qmin < 0);
          } else {
            read_codes(p, first, n, code);
          }
          T* dst = static_cast<T*>(p.y) + first;
          C* y = stage(dst, buffer);
          for_channels(table, first, n, [&](int64_t i, int64_t m, const Channel<C> c) {
            for (int64_t j = i; j < i + m; ++j) y[j] = dequantize_code(code[j], c, p.quant.qmin);
          });
          store(dst, buffer, n);
        });
  });
  return bad;
}

}  // namespace qk::cpu::QK_ISA
