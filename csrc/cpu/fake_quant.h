// The loop of fake_quant over a range of elements; fake_quant_dynamic runs it too.
#pragma once

#include "cpu/bits.h"
#include "cpu/channels.h"
#include "cpu/convert.h"
#include "cpu/work.h"

namespace qk::cpu::QK_ISA {

// n elements of one channel; x and y may be the same memory.
template <bool kClipValue, class C>
inline void quantize_row(const C* x, C* y, uint8_t* __restrict inside, int64_t n,
                         const Channel<C> c) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Quantized<C> v = quantize_value<kClipValue>(x[i], c);
    y[i] = dequantize_value(v.q, c);
    inside[i] = v.inside;
  }
}

// n elements of n channels.
template <bool kClipValue, class C>
inline void quantize_columns(const C* x, C* y, uint8_t* __restrict inside, int64_t n,
                             const ChannelTable<C>& table, int64_t first) {
  const C* __restrict inv = table.values.data + first;
  const C* __restrict scale = inv + table.channels;
  const C* __restrict lo = scale + table.channels;
  const C* __restrict hi = lo + table.channels;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Channel<C> c = {inv[i], scale[i], lo[i], hi[i]};
    const Quantized<C> v = quantize_value<kClipValue>(x[i], c);
    y[i] = dequantize_value(v.q, c);
    inside[i] = v.inside;
  }
}

// Elements [begin, end) of the tensor; begin is a multiple of 8. mask may be null, y may be x.
template <class T, class C, bool kClipValue>
void fake_quant_range(const T* x, T* y, uint8_t* mask, const ChannelTable<C>& table, int64_t begin,
                      int64_t end) {
  C x_buffer[kBlock], y_buffer[kBlock];
  uint8_t inside[kBlock];
  const int64_t cycle = table.channels;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = end - b < kBlock ? end - b : kBlock;
    const C* xs = load(x + b, x_buffer, n);
    C* ys = stage(y + b, y_buffer);
    if (table.inner == 1) {
      for_rows(b, b + n, 1, cycle, [&](int64_t i, int64_t m, int64_t) {
        quantize_columns<kClipValue>(xs + i - b, ys + i - b, inside + i - b, m, table, i % cycle);
      });
    } else {
      for_rows(b, b + n, cycle, table.inner, [&](int64_t i, int64_t m, int64_t channel) {
        quantize_row<kClipValue>(xs + i - b, ys + i - b, inside + i - b, m, table[channel]);
      });
    }
    store(y + b, y_buffer, n);
    if (mask) pack_bits(inside, mask + b / 8, n);
  }
}

// The work of one call.
Work* fake_quant_work(const FakeQuantParams& p);

}  // namespace qk::cpu::QK_ISA
