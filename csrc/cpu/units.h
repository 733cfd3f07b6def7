// Cuts a tensor into the units of work of a reduction over [outer, inner] for each channel.
//
// A unit is `rows` runs of `length` elements of one channel. The cut depends on the shape alone,
// and the results of a channel's units are combined in their order, so that a reduction gives the
// same bits for any number of threads.
#pragma once

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "params.h"

namespace qk::cpu::QK_ISA {

struct Unit {
  int64_t channel, first, rows, length;  // first: index of its first element
};

struct Units {
  static constexpr int64_t kElements = 4096;

  // elements: the most of a unit
  explicit Units(const Layout& layout, int64_t elements = kElements)
      : layout(layout), elements(elements) {
    if (layout.inner >= elements) {
      rows = 1;
      blocks_outer = layout.outer;
      blocks_inner = (layout.inner + elements - 1) / elements;
    } else {
      rows = elements / (layout.inner > 0 ? layout.inner : 1);
      blocks_outer = (layout.outer + rows - 1) / rows;
      blocks_inner = 1;
    }
    if (layout.numel() == 0) blocks_outer = 0;
  }

  int64_t per_channel() const { return blocks_outer * blocks_inner; }
  int64_t count() const { return per_channel() * layout.channels; }

  // Elements of a unit, on average.
  int64_t cost() const { return count() > 0 ? layout.numel() / count() : 1; }

  // Neighbours in u are neighbours in memory; slot() orders them by channel.
  Unit operator[](int64_t u) const { return Cursor(*this, u).unit(); }
  int64_t slot(int64_t u) const { return Cursor(*this, u).slot(); }

  // Goes from unit to unit without the divisions that finding one takes.
  class Cursor {
   public:
    Cursor(const Units& units, int64_t u)
        : units(units),
          inner(u % units.blocks_inner),
          channel(u / units.blocks_inner % units.layout.channels),
          outer(u / units.blocks_inner / units.layout.channels) {}

    Unit unit() const {
      const Layout& l = units.layout;
      const int64_t o = outer * units.rows, begin = inner * units.elements;
      const int64_t left = l.inner - begin;
      return {channel, (o * l.channels + channel) * l.inner + begin,
              l.outer - o < units.rows ? l.outer - o : units.rows,
              left > units.elements ? units.elements : left};
    }

    int64_t slot() const {
      return (channel * units.blocks_outer + outer) * units.blocks_inner + inner;
    }

    void next() {
      if (++inner < units.blocks_inner) return;
      inner = 0;
      if (++channel < units.layout.channels) return;
      channel = 0;
      ++outer;
    }

   private:
    const Units& units;
    int64_t inner, channel, outer;
  };

  int64_t stride() const { return layout.channels * layout.inner; }

  Layout layout;
  int64_t elements, rows, blocks_outer, blocks_inner;
};

// The elements of a unit side by side, as C; buffer holds as many as a unit may have.
template <class T, class C>
const C* gather(const T* x, const Unit& unit, int64_t stride, C* buffer) {
  const T* src = x + unit.first;
  if (unit.rows == 1) return load(src, buffer, unit.length);
  if (unit.length == 1) {
    for (int64_t r = 0; r < unit.rows; ++r) buffer[r] = to_compute(src[r * stride]);
    return buffer;
  }
  C* out = buffer;
  for (int64_t r = 0; r < unit.rows; ++r, src += stride)
    for (int64_t i = 0; i < unit.length; ++i) *out++ = to_compute(src[i]);
  return buffer;
}

// The way back: n = rows * length values to where gather found them.
template <class T, class C>
void scatter(T* y, const Unit& unit, int64_t stride, const C* buffer) {
  T* dst = y + unit.first;
  for (int64_t r = 0; r < unit.rows; ++r, dst += stride)
    for (int64_t i = 0; i < unit.length; ++i) dst[i] = Store<T>::from(*buffer++);
}

// A sum of n terms in a fixed order: 16 lanes in C over 256 terms at a time, then double.
// term(i) is the i-th.
constexpr int64_t kLanes = 16;
constexpr int64_t kSumBlock = 256;

template <class C, class F>
inline double lane_sum(int64_t n, F term) {
  double total = 0;
  for (int64_t b = 0; b < n; b += kSumBlock) {
    const int64_t end = n - b < kSumBlock ? n : b + kSumBlock;
    C lane[kLanes] = {};
    int64_t i = b;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lane[l] += term(i + l);
    for (int64_t l = 0; i < end; ++i, ++l) lane[l] += term(i);
    for (int64_t l = 0; l < kLanes; ++l) total += double(lane[l]);
  }
  return total;
}

}  // namespace qk::cpu::QK_ISA
