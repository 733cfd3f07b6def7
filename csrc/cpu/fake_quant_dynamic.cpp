#include <type_traits>

#include "cpu/fake_quant.h"
#include "cpu/isa.h"
#include "cpu/quant_range.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

// Least and greatest of n elements that lie side by side.
template <class T, class C>
Range<C> row_range(const T* x, int64_t n) {
  constexpr int64_t kStep = std::is_same<T, C>::value ? INT64_MAX : Units::kElements;
  C buffer[Units::kElements];
  Range<C> r = {C(INFINITY), -C(INFINITY)};
  for (int64_t b = 0; b < n;) {
    const int64_t m = n - b < kStep ? n - b : kStep;
    const Range<C> s = minmax(load(x + b, buffer, m), m);
    r = {qk_min(r.lo, s.lo), qk_max(r.hi, s.hi)};
    b += m;
  }
  return r;
}

// Channels that lie in one piece: each is read once from memory for its range, and found in the
// cache when it is quantized. A group of channels ends on a whole byte of the mask.
template <class T, class C>
void dynamic_rows(const FakeQuantDynamicParams& p, int threads) {
  const Layout& layout = p.range.layout;
  const T* x = static_cast<const T*>(p.range.x);
  const int64_t group = layout.inner % 8 ? 8 : 1;
  const int64_t groups = (layout.channels + group - 1) / group;
  ChannelTable<C> table(layout);
  const auto quantize = p.clip_value ? fake_quant_range<T, C, true> : fake_quant_range<T, C, false>;
  parallel_for(groups, threads, [&](int64_t g) {
    const int64_t end = (g + 1) * group < layout.channels ? (g + 1) * group : layout.channels;
    for (int64_t c = g * group; c < end; ++c) {
      const Range<C> r = row_range<T, C>(x + c * layout.inner, layout.inner);
      const C qmin = C(p.range.qmin), qmax = C(p.range.qmax);
      const QParams<C> q = range_to_qparams(r, qmin, qmax, p.range.symmetric);
      static_cast<C*>(p.range.scale)[c] = q.scale;
      p.range.zero_point[c] = q.zero_point;
      table.set(c, make_channel(q.scale, C(q.zero_point), qmin, qmax));
    }
    quantize(x, static_cast<T*>(p.y), p.mask, table, g * group * layout.inner, end * layout.inner);
  });
}

template <class T, class C>
void dynamic_typed(const FakeQuantDynamicParams& p, int threads) {
  const QuantRangeParams& r = p.range;
  const int useful = threads_for(r.layout.numel(), threads);
  if (r.method == Method::minmax && r.layout.outer == 1 && r.layout.inner > 0 &&
      r.layout.channels >= 8 * useful) {
    return dynamic_rows<T, C>(p, useful);
  }
  quant_range(r, threads);
  const QuantParams q = {r.scale, r.zero_point, true, r.qmin, r.qmax};
  fake_quant({r.dtype, r.layout, q, p.clip_value, r.x, p.y, p.mask}, threads);
}

void fake_quant_dynamic(const FakeQuantDynamicParams& p, int threads) {
  QK_DISPATCH(p.range.dtype, dynamic_typed<T, C>(p, threads));
}

}  // namespace qk::cpu::QK_ISA
