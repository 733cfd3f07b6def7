#include "math/noise.h"

#include "cpu/channels.h"
#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "cpu/work.h"
#include "dispatch.h"

namespace qk::cpu::QK_ISA {

template <class C>
using NoiseTable = ChannelTable<C, NoiseChannel<C>>;

// Draws of a run of elements; what a kind does not use is null.
struct Draws {
  const float *value, *previous;
  const uint8_t* open;

  Draws from(int64_t i) const {
    return {value + i, previous ? previous + i : nullptr, open ? open + i : nullptr};
  }
};

template <NoiseKind kKind, bool kGated, class C>
inline C noisy(C x, const Draws& d, int64_t i, C ramp, const NoiseChannel<C>& c) {
  if constexpr (kKind == NoiseKind::differential) {
    return differential_value(x, d.value[i], d.previous[i], ramp, c);
  } else if constexpr (kKind == NoiseKind::drop_in) {
    return drop_in_value(x, d.value[i], kGated ? d.open[i] != 0 : true, ramp, c);
  } else {
    return uniform_value(x, d.value[i], kGated ? d.open[i] != 0 : true, c);
  }
}

// n elements of one channel; x and y may be the same memory.
template <NoiseKind kKind, bool kGated, class C>
inline void noise_row(const C* x, C* y, const Draws d, int64_t n, C ramp, const NoiseChannel<C> c) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = noisy<kKind, kGated>(x[i], d, i, ramp, c);
}

// n elements of n channels.
template <NoiseKind kKind, bool kGated, class C>
inline void noise_columns(const C* x, C* y, const Draws d, int64_t n, C ramp,
                          const NoiseTable<C>& table, int64_t first) {
  const C* mean = table.values.data + first;
  const C* std = mean + table.channels;
  const C* prev_mean = std + table.channels;
  const C* prev_std = prev_mean + table.channels;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const NoiseChannel<C> c = {mean[i], std[i], prev_mean[i], prev_std[i]};
    y[i] = noisy<kKind, kGated>(x[i], d, i, ramp, c);
  }
}

inline int64_t number_of(int64_t number, const int64_t* at) {
  return at ? *at & kLargestSeed : number;
}

// The streams of one call and how it uses them.
struct Source {
  explicit Source(const NoiseParams& p)
      : kind(p.kind),
        threshold(p.threshold),
        gated(p.kind != NoiseKind::differential && p.threshold < 1 << 24) {
    const uint64_t seed = uint64_t(number_of(p.counter.seed, p.counter.seed_at));
    const int64_t step = number_of(p.counter.step, p.counter.step_at);
    value = Stream(seed, uint64_t(step) | kValues);
    previous = Stream(seed, uint64_t(step - 1) & uint64_t(kLargestSeed));
    gates = Stream(seed, uint64_t(step) | kGates);
  }

  struct Memory {
    alignas(64) float value[kDrawn], previous[kDrawn];
    alignas(64) uint8_t open[kDrawn];
  };

  // Draws of elements first .. first + n - 1 of the row-major index, n <= kBlock.
  Draws draw(int64_t first, int64_t n, Memory& memory) const {
    Draws d = {};
    d.value = kind == NoiseKind::uniform ? value.uniforms(first, n, memory.value)
                                         : value.normals(first, n, memory.value);
    if (kind == NoiseKind::differential) d.previous = previous.normals(first, n, memory.previous);
    if (gated) d.open = gates.gates(first, n, threshold, memory.open);
    return d;
  }

  NoiseKind kind;
  int32_t threshold;
  bool gated;
  Stream value, previous, gates;
};

template <class T, class C>
class NoiseWork final : public Work {
 public:
  explicit NoiseWork(const NoiseParams& p)
      : p_(p), table_(p.layout), source_(p), last_(p.walk.rank - 1), run_(last_) {
    step_[last_] = 1;
    for (int d = last_; d > 0; --d) step_[d - 1] = step_[d] * size(d);
    for (int d = 0; d < p.walk.rank; ++d)
      if (p.walk.stride[d] == 1) run_ = d;
    piece_ = run_ == last_ ? kBlock : kRun;
    pieces_ = (size(run_) + piece_ - 1) / piece_;
    const int64_t numel = p.layout.numel();
    items = numel == 0 ? 0 : numel / size(last_) / (run_ == last_ ? 1 : size(run_)) * pieces_;
    cost = run_ != last_ ? size(last_) * kRun : size(run_) < kBlock ? size(run_) : kBlock;
    fill();
    expect_output(p.x, p.y, numel * int64_t(sizeof(T)));
  }

  // Where neighbours in memory are neighbours in the row-major index, an item is a piece of such a
  // run. Elsewhere it is a band of tiles: kRun elements that follow each other in the index, times
  // kAcross that do in memory, so that every word of a quad is used.
  static constexpr int64_t kRun = 128, kAcross = 64;

  void run(int64_t begin, int64_t end) override {
    Source::Memory drawn;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item % pieces_ * piece_;
      const int64_t n = size(run_) - start < piece_ ? size(run_) - start : piece_;
      Place at = place(item / pieces_);
      at.memory += start * step_[run_];
      at.index += start;
      if (run_ == last_) {
        add(at.memory, n, source_.draw(at.index, n, drawn));
        continue;
      }
      for (int64_t c = 0; c < size(last_); c += kAcross) {
        const int64_t across = size(last_) - c < kAcross ? size(last_) - c : kAcross;
        tile({at.memory + c, at.index + c * p_.walk.stride[last_]}, n, across, drawn);
      }
    }
  }

 private:
  // Where an element lies in memory, and its row-major index.
  struct Place {
    int64_t memory, index;
  };

  static C at(const void* values, int64_t i) { return static_cast<const C*>(values)[i]; }

  void fill() {
    for (int64_t i = 0; i < p_.layout.channels; ++i) {
      const C mean = p_.mean ? at(p_.mean, i) : C(0), std = at(p_.std, i);
      const C prev_mean = p_.prev_mean ? at(p_.prev_mean, i) : mean;
      const C prev_std = p_.prev_std ? at(p_.prev_std, i) : std;
      const NoiseChannel<C> c = make_noise_channel(mean, std, prev_mean, prev_std);
      table_.set(i, c);
      const C all = c.mean + c.std + c.prev_mean + c.prev_std;
      invalid = invalid || all != all;
    }
  }

  int64_t size(int d) const { return p_.walk.size[d]; }

  // The k-th start of the dims other than the run and the last.
  Place place(int64_t k) const {
    Place at = {0, p_.offset};
    for (int d = last_ - 1; d >= 0; --d) {
      if (d == run_) continue;
      const int64_t i = k % size(d);
      k /= size(d);
      at.memory += i * step_[d];
      at.index += i * p_.walk.stride[d];
    }
    return at;
  }

  void tile(Place at, int64_t lines, int64_t across, Source::Memory& drawn) const {
    float value[kRun][kAcross], previous[kRun][kAcross];
    uint8_t open[kRun][kAcross];
    for (int64_t c = 0; c < across; ++c) {
      const Draws d = source_.draw(at.index + c * p_.walk.stride[last_], lines, drawn);
      for (int64_t i = 0; i < lines; ++i) value[i][c] = d.value[i];
      for (int64_t i = 0; d.previous && i < lines; ++i) previous[i][c] = d.previous[i];
      for (int64_t i = 0; d.open && i < lines; ++i) open[i][c] = d.open[i];
    }
    for (int64_t i = 0; i < lines; ++i)
      add(at.memory + i * step_[run_], across, {value[i], previous[i], open[i]});
  }

  void add(int64_t first, int64_t n, const Draws& d) const {
    switch (source_.kind) {
      case NoiseKind::differential:
        return add_kind<NoiseKind::differential, false>(first, n, d);
      case NoiseKind::drop_in:
        return source_.gated ? add_kind<NoiseKind::drop_in, true>(first, n, d)
                             : add_kind<NoiseKind::drop_in, false>(first, n, d);
      case NoiseKind::uniform:
        return source_.gated ? add_kind<NoiseKind::uniform, true>(first, n, d)
                             : add_kind<NoiseKind::uniform, false>(first, n, d);
    }
  }

  // Elements [first, first + n) in memory, n <= kBlock.
  template <NoiseKind kKind, bool kGated>
  void add_kind(int64_t first, int64_t n, const Draws& d) const {
    C x_buffer[kBlock], y_buffer[kBlock];
    const C* x = load(static_cast<const T*>(p_.x) + first, x_buffer, n);
    T* dst = static_cast<T*>(p_.y) + first;
    C* y = stage(dst, y_buffer);
    const C ramp = C(p_.ramp);
    const int64_t cycle = table_.channels;
    if (table_.inner == 1) {
      for_rows(first, first + n, 1, cycle, [&](int64_t i, int64_t m, int64_t) {
        noise_columns<kKind, kGated>(x + i - first, y + i - first, d.from(i - first), m, ramp,
                                     table_, i % cycle);
      });
    } else {
      for_rows(first, first + n, cycle, table_.inner, [&](int64_t i, int64_t m, int64_t channel) {
        noise_row<kKind, kGated>(x + i - first, y + i - first, d.from(i - first), m, ramp,
                                 table_[channel]);
      });
    }
    store(dst, y_buffer, n);
  }

  NoiseParams p_;
  NoiseTable<C> table_;
  Source source_;
  int last_, run_;  // dims: fastest in memory, fastest in the row-major index
  int64_t piece_, pieces_;
  int64_t step_[Walk::kMostDims];  // in memory
};

int64_t noise(const NoiseParams* calls, int64_t count, int threads) {
  const auto make = [](const NoiseParams& p) {
    Work* work = nullptr;
    QK_DISPATCH(p.dtype, work = new NoiseWork<T, C>(p));
    return work;
  };
  return run_list(calls, count, threads, make, true);  // y may be x
}

}  // namespace qk::cpu::QK_ISA
