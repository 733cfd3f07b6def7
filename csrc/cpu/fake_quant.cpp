#include "cpu/fake_quant.h"

#include "cpu/isa.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

template <class T, class C>
class FakeQuantWork final : public Work {
 public:
  explicit FakeQuantWork(const FakeQuantParams& p)
      : p(p),
        table(p.layout),
        range(p.clip_value ? fake_quant_range<T, C, true> : fake_quant_range<T, C, false>) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = blocks_of(p.layout.numel());
    cost = kBlock;
    expect_output(p.x, p.y, p.layout.numel() * int64_t(sizeof(T)));
  }

  void run(int64_t begin, int64_t end) override {
    const int64_t stop = block_end(end, p.layout.numel());
    range(static_cast<const T*>(p.x), static_cast<T*>(p.y), p.mask, table, begin * kBlock, stop);
  }

 private:
  const FakeQuantParams p;
  ChannelTable<C> table;
  void (*range)(const T*, T*, uint8_t*, const ChannelTable<C>&, int64_t, int64_t);
};

Work* fake_quant_work(const FakeQuantParams& p) {
  Work* work = nullptr;
  QK_DISPATCH(p.dtype, work = new FakeQuantWork<T, C>(p));
  return work;
}

int64_t fake_quant(const FakeQuantParams* calls, int64_t count, int threads) {
  bool in_place = false;  // then a bad scale must be found before x is lost
  for (int64_t i = 0; i < count; ++i) in_place = in_place || calls[i].x == calls[i].y;
  return run_list(calls, count, threads, fake_quant_work, /*only_valid=*/in_place);
}

// Bits, not values, are moved: a clipped element is +0 even where grad is NaN or infinite.
template <class Word>
void select(const Word* __restrict grad, const uint8_t* __restrict mask, Word* __restrict out,
            int64_t n) {
  int64_t i = select_vectors(grad, mask, out, n);
  for (; i + 8 <= n; i += 8) {
    const Word bits = mask[i / 8];
    for (int j = 0; j < 8; ++j) out[i + j] = bits >> j & 1 ? grad[i + j] : Word(0);
  }
  for (; i < n; ++i) out[i] = mask[i / 8] >> (i % 8) & 1 ? grad[i] : Word(0);
}

template <class Word>
class SelectWork final : public Work {
 public:
  explicit SelectWork(const FakeQuantBwdParams& p) : p(p) {
    items = blocks_of(p.numel);
    cost = kBlock;
    expect_output(p.grad, p.grad_x, p.numel * int64_t(sizeof(Word)));
  }

  void run(int64_t begin, int64_t end) override {
    const int64_t first = begin * kBlock, n = block_end(end, p.numel) - first;
    select(static_cast<const Word*>(p.grad) + first, p.mask + first / 8,
           static_cast<Word*>(p.grad_x) + first, n);
  }

 private:
  const FakeQuantBwdParams p;
};

void fake_quant_bwd(const FakeQuantBwdParams* calls, int64_t count, int threads) {
  run_list(calls, count, threads, [](const FakeQuantBwdParams& p) -> Work* {
    if (p.dtype == DType::f64) return new SelectWork<uint64_t>(p);
    if (p.dtype == DType::f32) return new SelectWork<uint32_t>(p);
    return new SelectWork<uint16_t>(p);
  });
}

}  // namespace qk::cpu::QK_ISA
