#include "math/quantize.h"

#include "cpu/channels.h"
#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/work.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// Rows of `row_size` codes cut at multiples of kBlock within each row, so that a block of packed
// codes begins on a byte; neighbouring blocks lie side by side.
struct Blocks {
  Blocks(int64_t numel, int64_t row_size)
      : row_size(row_size),
        per_row(blocks_of(row_size)),
        count(numel > 0 ? numel / row_size * per_row : 0) {}

  // f(row, begin, n) for the blocks [first, last); begin is counted from the start of the row.
  template <class F>
  void each(int64_t first, int64_t last, F f) const {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k % per_row * kBlock;
      f(k / per_row, begin, block_end(k % per_row + 1, row_size) - begin);
    }
  }

  int64_t row_size, per_row, count;
};

// f(i, its channel) for n elements from the first-th on.
template <class C, class F>
inline void each_element(const ChannelTable<C>& table, int64_t first, int64_t n, F f) {
  const int64_t cycle = table.channels;
  if (table.inner == 1) {
    for_rows(first, first + n, 1, cycle, [&](int64_t i, int64_t m, int64_t) {
      for (int64_t j = 0; j < m; ++j) f(i - first + j, table[i % cycle + j]);
    });
  } else {
    for_rows(first, first + n, cycle, table.inner, [&](int64_t i, int64_t m, int64_t channel) {
      const Channel<C> c = table[channel];
      for (int64_t j = i - first; j < i - first + m; ++j) f(j, c);
    });
  }
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

template <class T, class C>
class QuantizeWork final : public Work {
 public:
  explicit QuantizeWork(const QuantizeParams& p)
      : p(p), blocks(p.layout.numel(), p.pack ? p.row_size : p.layout.numel()), table(p.layout) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = blocks.count;
    cost = block_end(1, blocks.row_size);
  }

  void run(int64_t begin, int64_t end) override {
    blocks.each(begin, end, [this](int64_t row, int64_t b, int64_t n) { run_block(row, b, n); });
  }

 private:
  void run_block(int64_t row, int64_t b, int64_t n) {
    C buffer[kBlock];
    int32_t code[kBlock];
    const int64_t first = row * blocks.row_size + b;
    const int32_t qmin = p.quant.qmin;
    const C* x = load(static_cast<const T*>(p.x) + first, buffer, n);
    each_element(table, first, n, [&, qmin](int64_t i, const Channel<C>& c) {
      code[i] = code_value(x[i], c, qmin);
    });
    if (p.pack) {
      const int64_t at = row * packed_bytes(blocks.row_size, p.pack) + b * p.pack / 8;
      write_packed(code, n, static_cast<uint8_t*>(p.codes) + at, p.pack);
    } else {
      write_codes(code, n, p.codes, first, p.code_bytes);
    }
  }

  const QuantizeParams p;
  const Blocks blocks;
  ChannelTable<C> table;
};

int64_t quantize(const QuantizeParams* calls, int64_t count, int threads) {
  return run_list(calls, count, threads, [](const QuantizeParams& p) {
    Work* work = nullptr;
    QK_DISPATCH(p.dtype, work = new QuantizeWork<T, C>(p));
    return work;
  });
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

void read_packed(const DequantizeParams& p, const uint8_t* bytes, int64_t n, int32_t* code) {
  const int per_byte = 8 / p.pack;
  for (int64_t i = 0; i < n; ++i)
    code[i] = unpack_code(bytes[i / per_byte], int(i % per_byte), p.pack, p.quant.qmin < 0);
}

template <class T, class C>
class DequantizeWork final : public Work {
 public:
  explicit DequantizeWork(const DequantizeParams& p)
      : p(p), blocks(p.layout.numel(), p.pack ? p.row_size : p.layout.numel()), table(p.layout) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = blocks.count;
    cost = block_end(1, blocks.row_size);
  }

  void run(int64_t begin, int64_t end) override {
    blocks.each(begin, end, [this](int64_t row, int64_t b, int64_t n) { run_block(row, b, n); });
  }

 private:
  void run_block(int64_t row, int64_t b, int64_t n) {
    C buffer[kBlock];
    int32_t code[kBlock];
    const int64_t first = row * blocks.row_size + b;
    const int32_t qmin = p.quant.qmin;
    if (p.pack) {
      const int64_t at = row * packed_bytes(blocks.row_size, p.pack) + b * p.pack / 8;
      read_packed(p, static_cast<const uint8_t*>(p.codes) + at, n, code);
    } else {
      read_codes(p, first, n, code);
    }
    T* dst = static_cast<T*>(p.y) + first;
    C* y = stage(dst, buffer);
    each_element(table, first, n, [&, qmin](int64_t i, const Channel<C>& c) {
      y[i] = dequantize_code(code[i], c, qmin);
    });
    store(dst, buffer, n);
  }

  const DequantizeParams p;
  const Blocks blocks;
  ChannelTable<C> table;
};

int64_t dequantize(const DequantizeParams* calls, int64_t count, int threads) {
  return run_list(calls, count, threads, [](const DequantizeParams& p) {
    Work* work = nullptr;
    QK_DISPATCH(p.dtype, work = new DequantizeWork<T, C>(p));
    return work;
  });
}

}  // namespace qk::cpu::QK_ISA
