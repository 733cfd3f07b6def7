#include "math/quantize.h"

#include <cstring>

#include "cpu/channels.h"
#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/work.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// Rows of `row_size` codes cut at multiples of kBlock within each row, so that a block of packed
// codes begins on a byte; neighbouring blocks lie side by side.
struct Blocks {
  // row_size: of the packed codes. Rows that end on a byte are one long row, as codes that are not
  // packed (pack = 0) are.
  Blocks(int64_t numel, int64_t row, int pack)
      : row_size(row * pack % 8 == 0 ? numel : row),
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

// Codes in bytes, 8 / kPack of them in a Word, to the bytes that hold them.
template <class Word, int kPack>
void pack_bytes(const uint8_t* code, uint8_t* dst, int64_t bytes) {
  for (int64_t b = 0; b < bytes; ++b) {
    Word word, byte = 0;
    memcpy(&word, code + b * sizeof(Word), sizeof(Word));
    for (int i = 0; i < 8 / kPack; ++i) byte |= Word(word >> (i * (8 - kPack)));
    dst[b] = uint8_t(byte);
  }
}

// The same as pack_code of one after the other, n <= kBlock.
void write_packed(const int32_t* code, int64_t n, uint8_t* dst, int pack) {
  const uint8_t mask = uint8_t((1 << pack) - 1);
  const int64_t bytes = packed_bytes(n, pack);
  uint8_t narrow[kBlock + 8];
  for (int64_t i = 0; i < n; ++i) narrow[i] = uint8_t(code[i]) & mask;
  memset(narrow + n, 0, 8);  // the spare bits of the last byte
  if (pack == 4) pack_bytes<uint16_t, 4>(narrow, dst, bytes);
  if (pack == 2) pack_bytes<uint32_t, 2>(narrow, dst, bytes);
  if (pack == 1) pack_bytes<uint64_t, 1>(narrow, dst, bytes);
}

template <class T, class C>
class QuantizeWork final : public Work {
 public:
  explicit QuantizeWork(const QuantizeParams& p)
      : p(p), blocks(p.layout.numel(), p.row_size, p.pack), table(p.layout) {
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

// The way back from pack_bytes.
template <class Word, int kPack>
void unpack_bytes(const uint8_t* src, int64_t bytes, uint8_t* code) {
  constexpr Word kEach = Word(~Word(0)) / 255 * ((1 << kPack) - 1);
  for (int64_t b = 0; b < bytes; ++b) {
    Word word = 0;
    for (int i = 0; i < 8 / kPack; ++i) word |= Word(Word(src[b]) << (i * (8 - kPack)));
    word &= kEach;
    memcpy(code + b * sizeof(Word), &word, sizeof(Word));
  }
}

// The same as unpack_code of one after the other, n <= kBlock.
void read_packed(const DequantizeParams& p, const uint8_t* src, int64_t n, int32_t* code) {
  const int64_t bytes = packed_bytes(n, p.pack);
  uint8_t narrow[kBlock + 8];
  if (p.pack == 4) unpack_bytes<uint16_t, 4>(src, bytes, narrow);
  if (p.pack == 2) unpack_bytes<uint32_t, 2>(src, bytes, narrow);
  if (p.pack == 1) unpack_bytes<uint64_t, 1>(src, bytes, narrow);
  const int32_t sign = p.quant.qmin < 0 ? 1 << (p.pack - 1) : 0;
  for (int64_t i = 0; i < n; ++i) code[i] = (int32_t(narrow[i]) ^ sign) - sign;
}

template <class T, class C>
class DequantizeWork final : public Work {
 public:
  explicit DequantizeWork(const DequantizeParams& p)
      : p(p), blocks(p.layout.numel(), p.row_size, p.pack), table(p.layout) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = blocks.count;
    cost = block_end(1, blocks.row_size);
    expect_output(p.codes, p.y, p.layout.numel() * int64_t(sizeof(T)));
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
