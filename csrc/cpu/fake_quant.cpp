#include "cpu/fake_quant.h"

#include "cpu/isa.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

int64_t fake_quant(const FakeQuantParams& p, int threads) {
  const int64_t numel = p.layout.numel();
  int64_t bad = -1;
  QK_DISPATCH(p.dtype, {
    ChannelTable<C> table(p.layout);
    bad = fill(table, p.quant, p.layout.channels);
    const auto range = p.clip_value ? fake_quant_range<T, C, true> : fake_quant_range<T, C, false>;
    parallel_ranges(numel, threads_for(numel, threads), [&](int64_t begin, int64_t end) {
      range(static_cast<const T*>(p.x), static_cast<T*>(p.y), p.mask, table, begin, end);
    });
  });
  return bad;
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
void fake_quant_bwd_words(const FakeQuantBwdParams& p, int threads) {
  const Word* grad = static_cast<const Word*>(p.grad);
  Word* out = static_cast<Word*>(p.grad_x);
  parallel_ranges(p.numel, threads_for(p.numel, threads), [&](int64_t begin, int64_t end) {
    select(grad + begin, p.mask + begin / 8, out + begin, end - begin);
  });
}

void fake_quant_bwd(const FakeQuantBwdParams& p, int threads) {
  if (p.dtype == DType::f64) return fake_quant_bwd_words<uint64_t>(p, threads);
  if (p.dtype == DType::f32) return fake_quant_bwd_words<uint32_t>(p, threads);
  fake_quant_bwd_words<uint16_t>(p, threads);
}

}  // namespace qk::cpu::QK_ISA
