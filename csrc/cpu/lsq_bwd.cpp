#include "cpu/channels.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/units.h"
#include "cpu/work.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

struct Sums {
  double scale, zero_point;
};

// One unit: gradients of x to grad_x, the sums of those of scale and zero point returned. The sums
// are in a fixed order: 16 lanes in C over 256 elements at a time, then double.
template <bool kClipValue, class C>
Sums lsq_row(const C* __restrict grad, const C* __restrict x, C* __restrict grad_x, int64_t n,
             const Channel<C> c) {
  Sums sums = {0, 0};
  for (int64_t b = 0; b < n; b += kSumBlock) {
    const int64_t end = n - b < kSumBlock ? n : b + kSumBlock;
    C scale[kLanes] = {}, zero_point[kLanes] = {};
    const auto add = [&](int64_t i, int64_t l) {
      const LsqGrad<C> g = lsq_grad<kClipValue>(grad[i], x[i], c);
      grad_x[i] = g.x;
      scale[l] += g.scale;
      zero_point[l] += g.zero_point;
    };
    int64_t i = b;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) add(i + l, l);
    for (int64_t l = 0; i < end; ++i, ++l) add(i, l);
    for (int64_t l = 0; l < kLanes; ++l) {
      sums.scale += double(scale[l]);
      sums.zero_point += double(zero_point[l]);
    }
  }
  return sums;
}

template <class T, class C>
class LsqWork final : public Work {
 public:
  explicit LsqWork(const LsqBwdParams& p)
      : p(p), units(p.layout), table(p.layout), partial(units.count()) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = units.count();
    cost = units.cost();
    expect_output(p.grad, p.grad_x, p.layout.numel() * int64_t(sizeof(T)));
  }

  void run(int64_t begin, int64_t end) override {
    for (int64_t u = begin; u < end; ++u) run_unit(u);
  }

  bool next() override {
    const int64_t per_channel = units.per_channel();
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      Sums sum = {0, 0};
      for (int64_t k = 0; k < per_channel; ++k) {
        sum.scale += partial[c * per_channel + k].scale;
        sum.zero_point += partial[c * per_channel + k].zero_point;
      }
      static_cast<C*>(p.grad_s)[c] = C(sum.scale * p.grad_scale);
      static_cast<C*>(p.grad_zp)[c] = C(sum.zero_point * p.grad_scale);
    }
    return false;
  }

 private:
  void run_unit(int64_t u) {
    C grad_buffer[Units::kElements], x_buffer[Units::kElements], out_buffer[Units::kElements];
    const Unit unit = units[u];
    const int64_t n = unit.rows * unit.length;
    const C* grad = gather(static_cast<const T*>(p.grad), unit, units.stride(), grad_buffer);
    const C* x = gather(static_cast<const T*>(p.x), unit, units.stride(), x_buffer);
    T* dst = static_cast<T*>(p.grad_x);
    C* out = unit.rows == 1 ? stage(dst + unit.first, out_buffer) : out_buffer;
    const auto row = p.clip_value ? lsq_row<true, C> : lsq_row<false, C>;
    partial[units.slot(u)] = row(grad, x, out, n, table[unit.channel * table.repeat]);
    if (unit.rows == 1) {
      store(dst + unit.first, out_buffer, n);
    } else {
      scatter(dst, unit, units.stride(), out_buffer);
    }
  }

  const LsqBwdParams p;
  const Units units;
  ChannelTable<C> table;
  Buffer<Sums> partial;
};

// The gradients of n columns in one row, added to scale[n] and zero_point[n].
template <bool kClipValue, class C>
void lsq_columns(const C* __restrict grad, const C* __restrict x, C* __restrict grad_x, int64_t n,
                 const ChannelTable<C>& table, int64_t first, C* __restrict scale,
                 C* __restrict zero_point) {
  const C* __restrict inv = table.values.data + first;
  const C* __restrict step = inv + table.channels;
  const C* __restrict lo = step + table.channels;
  const C* __restrict hi = lo + table.channels;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Channel<C> c = {inv[i], step[i], lo[i], hi[i]};
    const LsqGrad<C> g = lsq_grad<kClipValue>(grad[i], x[i], c);
    grad_x[i] = g.x;
    scale[i] += g.scale;
    zero_point[i] += g.zero_point;
  }
}

// LsqWork where channels interleave.
template <class T, class C>
class LsqColumnsWork final : public Work {
 public:
  explicit LsqColumnsWork(const LsqBwdParams& p)
      : p(p), columns(p.layout), table(p.layout), partial(columns.slots()) {
    invalid = fill(table, p.quant, p.layout.channels) >= 0;
    items = columns.count();
    cost = columns.cost();
    expect_output(p.grad, p.grad_x, p.layout.numel() * int64_t(sizeof(T)));
  }

  void run(int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i) run_tile(columns[i]);
  }

  bool next() override {
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      Sums sum = {0, 0};
      columns.each_of(c, [&](int64_t slot) {
        sum.scale += partial[slot].scale;
        sum.zero_point += partial[slot].zero_point;
      });
      static_cast<C*>(p.grad_s)[c] = C(sum.scale * p.grad_scale);
      static_cast<C*>(p.grad_zp)[c] = C(sum.zero_point * p.grad_scale);
    }
    return false;
  }

 private:
  static constexpr int64_t kWide = Columns::kWide;

  void run_tile(const Columns::Tile& tile) {
    C grad_buffer[kWide], x_buffer[kWide], out_buffer[kWide], scale[kWide], zero_point[kWide];
    const int64_t n = tile.columns;
    const auto row = p.clip_value ? lsq_columns<true, C> : lsq_columns<false, C>;
    Sums* sums = partial.data + tile.slot;
    for (int64_t c = 0; c < n; ++c) sums[c] = {0, 0};
    Columns::each_sum(tile, [&](int64_t r, int64_t end) {
      for (int64_t c = 0; c < n; ++c) scale[c] = zero_point[c] = C(0);
      for (; r < end; ++r) {
        const int64_t first = r * columns.width + tile.column;
        const C* grad = load(static_cast<const T*>(p.grad) + first, grad_buffer, n);
        const C* x = load(static_cast<const T*>(p.x) + first, x_buffer, n);
        T* dst = static_cast<T*>(p.grad_x) + first;
        row(grad, x, stage(dst, out_buffer), n, table, tile.column, scale, zero_point);
        store(dst, out_buffer, n);
      }
      for (int64_t c = 0; c < n; ++c) {
        sums[c].scale += double(scale[c]);
        sums[c].zero_point += double(zero_point[c]);
      }
    });
  }

  const LsqBwdParams p;
  const Columns columns;
  ChannelTable<C> table;
  Buffer<Sums> partial;
};

template <class T, class C>
Work* lsq_work(const LsqBwdParams& p) {
  if (Columns::fit(p.layout)) return new LsqColumnsWork<T, C>(p);
  return new LsqWork<T, C>(p);
}

int64_t lsq_bwd(const LsqBwdParams* calls, int64_t count, int threads) {
  return run_list(calls, count, threads, [](const LsqBwdParams& p) {
    Work* work = nullptr;
    QK_DISPATCH(p.dtype, work = (lsq_work<T, C>(p)));
    return work;
  });
}

}  // namespace qk::cpu::QK_ISA
