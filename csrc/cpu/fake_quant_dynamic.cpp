#include "cpu/fake_quant.h"
#include "cpu/isa.h"
#include "cpu/quant_range.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// Channels that lie in one piece: each is read once from memory for its range, and found in the
// cache when it is quantized. A group of channels ends on a whole byte of the mask.
template <class T, class C>
class RowsWork final : public Work {
 public:
  explicit RowsWork(const FakeQuantDynamicParams& p)
      : p(p), group(p.range.layout.inner % 8 || p.range.layout.inner <= kShortRow ? kRows : 1) {
    items = (p.range.layout.channels + group - 1) / group;
    cost = group * p.range.layout.inner;
    expect_output(p.range.x, p.y, p.range.layout.numel() * int64_t(sizeof(T)));
  }

  void run(int64_t begin, int64_t end) override {
    const auto quantize =
        p.clip_value ? fake_quant_range<T, C, true> : fake_quant_range<T, C, false>;
    const Layout& layout = p.range.layout;
    // of one group: those of a list of tensors at once would be megabytes
    ChannelTable<C> table({1, group, layout.inner});
    Range<C> ranges[kRows];
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, at = first * layout.inner;
      const int64_t rows = first + group < layout.channels ? group : layout.channels - first;
      const T* x = static_cast<const T*>(p.range.x) + at;
      find_ranges(x, rows, ranges);
      for (int64_t r = 0; r < rows; ++r) table.set(r, range_channel(p.range, first + r, ranges[r]));
      uint8_t* mask = p.mask ? p.mask + at / 8 : nullptr;
      quantize(x, static_cast<T*>(p.y) + at, mask, table, 0, rows * layout.inner);
    }
  }

 private:
  // Of some rows, kRows at most.
  void find_ranges(const T* x, int64_t rows, Range<C>* ranges) const {
    const int64_t inner = p.range.layout.inner;
    if (rows == kRows && inner <= kShortRow) {
      C buffer[kRows * kShortRow];
      short_row_ranges(load(x, buffer, kRows * inner), inner, ranges);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) ranges[r] = row_range<T, C>(x + r * inner, inner);
  }

  const FakeQuantDynamicParams p;
  const int64_t group;
};

// The range of the whole tensor, then its quantization.
class RangeThenQuantize final : public Chain {
 public:
  RangeThenQuantize(const FakeQuantDynamicParams& p, int64_t share) : p(p) {
    link = range_work(p.range, share);
    follow();
  }

 private:
  Work* following() override {
    if (quantizing) return nullptr;
    quantizing = true;
    const QuantRangeParams& r = p.range;
    const QuantParams q = {r.scale, r.zero_point, true, r.qmin, r.qmax};
    return fake_quant_work({r.dtype, r.layout, q, p.clip_value, r.x, p.y, p.mask});
  }

  const FakeQuantDynamicParams p;
  bool quantizing = false;
};

void fake_quant_dynamic(const FakeQuantDynamicParams* calls, int64_t count, int threads) {
  const int64_t share = thread_share(calls, count, threads, [](const FakeQuantDynamicParams& p) {
    return p.range.layout.numel();
  });
  run_list(calls, count, threads, [share](const FakeQuantDynamicParams& p) -> Work* {
    if (!by_rows(p.range, share)) return new RangeThenQuantize(p, share);
    Work* work = nullptr;
    QK_DISPATCH(p.range.dtype, work = new RowsWork<T, C>(p));
    return work;
  });
}

}  // namespace qk::cpu::QK_ISA
