// Per-channel parameters, worked out once per call.
#pragma once

#include <cstring>

#include "cpu/parallel.h"
#include "math/fake_quant.h"
#include "params.h"

namespace qk::cpu::QK_ISA {

template <class C>
C zero_point_at(const QuantParams& q, int64_t channel) {
  if (!q.zero_point) return C(0);
  return q.zero_point_is_int ? C(static_cast<const int32_t*>(q.zero_point)[channel])
                             : static_cast<const C*>(q.zero_point)[channel];
}

// A record of four C for every channel, as four arrays, so that a loop over channels can load them
// as vectors. A short inner dimension is folded into the channels: [outer, channels, inner] with
// inner = 9 becomes [outer, 9 channels, 1], each parameter repeated 9 times.
template <class C, class Record = Channel<C>>
struct ChannelTable {
  static_assert(sizeof(Record) == 4 * sizeof(C), "a record is four numbers");
  static constexpr int64_t kShortInner = 32;
  static constexpr int64_t kMostFolded = 1 << 16;

  ChannelTable(const Layout& layout)
      : repeat(layout.inner < kShortInner && layout.channels * layout.inner <= kMostFolded
                   ? layout.inner
                   : 1),
        channels(layout.channels * repeat),
        inner(layout.inner / (repeat > 0 ? repeat : 1)),
        values(4 * channels) {}

  void set(int64_t channel, const Record& record) {
    C v[4];
    memcpy(v, &record, sizeof(v));
    for (int64_t i = channel * repeat; i < (channel + 1) * repeat; ++i) {
      values[i] = v[0];
      values[channels + i] = v[1];
      values[2 * channels + i] = v[2];
      values[3 * channels + i] = v[3];
    }
  }

  Record operator[](int64_t i) const {
    return {values[i], values[channels + i], values[2 * channels + i], values[3 * channels + i]};
  }

  int64_t repeat, channels, inner;
  Buffer<C> values;
};

// Fills the table from scale and zero point; returns the first invalid channel, or -1.
template <class C>
int64_t fill(ChannelTable<C>& table, const QuantParams& q, int64_t channels) {
  const C* scale = static_cast<const C*>(q.scale);
  int64_t bad = -1;
  for (int64_t i = channels - 1; i >= 0; --i) {
    const C zp = zero_point_at<C>(q, i);
    table.set(i, make_channel(scale[i], zp, C(q.qmin), C(q.qmax)));
    bad = channel_valid(scale[i], zp) ? bad : i;
  }
  return bad;
}

// Calls f(i, n, channel) for the runs of [begin, end) that lie in one channel.
template <class F>
void for_rows(int64_t begin, int64_t end, int64_t channels, int64_t inner, F f) {
  int64_t row = begin / inner;
  int64_t channel = row % channels;
  int64_t stop = (row + 1) * inner;
  for (int64_t i = begin; i < end; stop += inner) {
    const int64_t n = (stop < end ? stop : end) - i;
    f(i, n, channel);
    i += n;
    if (++channel == channels) channel = 0;
  }
}

}  // namespace qk::cpu::QK_ISA
