// Tensors whose channels interleave in memory, as those of a channels_last activation: rows of
// `width` elements, a column for every place in a row. Loops go along the rows, each column with
// sums of its own, instead of picking one channel's elements out of every row.
#pragma once

#include "cpu/channels.h"
#include "cpu/convert.h"

namespace qk::cpu::QK_ISA {

// Cut into tiles by the shape alone, so that the results of a column's tiles, combined in their
// order, are the same for any number of threads.
struct Columns {
  static constexpr int64_t kWide = 256;    // columns of a tile: what is kept for each stays in L1
  static constexpr int64_t kRows = 256;    // rows of a tile: several for each thread
  static constexpr int64_t kSumRows = 64;  // rows that are summed in C before they go to double

  struct Tile {
    int64_t row, rows, column, columns;
    int64_t slot;  // of the result of its first column
  };

  explicit Columns(const Layout& layout)
      : inner(layout.inner),
        width(layout.channels * layout.inner),
        outer(layout.outer),
        across((width + kWide - 1) / kWide),
        down((outer + kRows - 1) / kRows) {}

  // Narrower rows than a vector are better picked apart.
  static bool fit(const Layout& l) {
    using Table = ChannelTable<float>;
    const int64_t width = l.channels * l.inner;
    return l.outer > 1 && l.channels > 1 && l.inner > 0 && l.inner < Table::kShortInner &&
           width >= 16 && width <= Table::kMostFolded;
  }

  int64_t count() const { return across * down; }
  int64_t cost() const { return width * outer / count(); }
  int64_t slots() const { return width * down; }

  Tile operator[](int64_t i) const {
    const int64_t row = i / across * kRows, column = i % across * kWide;
    return {row, outer - row < kRows ? outer - row : kRows, column,
            width - column < kWide ? width - column : kWide, i / across * width + column};
  }

  // f(slot) for the results of a channel, in their order.
  template <class F>
  void each_of(int64_t channel, F f) const {
    for (int64_t part = 0; part < down; ++part)
      for (int64_t i = 0; i < inner; ++i) f(part * width + channel * inner + i);
  }

  // f(row, end) for the runs of rows that are summed in C.
  template <class F>
  static void each_sum(const Tile& tile, F f) {
    const int64_t end = tile.row + tile.rows;
    for (int64_t r = tile.row; r < end; r += kSumRows)
      f(r, r + kSumRows < end ? r + kSumRows : end);
  }

  const int64_t inner, width, outer, across, down;
};

}  // namespace qk::cpu::QK_ISA
