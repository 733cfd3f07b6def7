// From an element's index to its channel, without a division.
#pragma once

#include "cuda/packet.h"
#include "math/fake_quant.h"

namespace qk::cuda {

// n / divisor for 0 <= n < 2^63 by the high half of a product (Granlund and Montgomery 1994): with
// 2^(bits-1) < d <= 2^bits, multiplier = floor(2^(63+bits) / d) + 1 errs by less than n can show.
class FastDivision {
 public:
  FastDivision() = default;
  explicit FastDivision(int64_t divisor)
      : divisor_(divisor > 0 ? divisor : 1), multiplier_(0), shift_(0) {
    int bits = 0;
    while (bits < 63 && (int64_t(1) << bits) < divisor_) ++bits;
    if (bits == 0) return;
    multiplier_ = uint64_t(((unsigned __int128)(1) << (63 + bits)) / uint64_t(divisor_)) + 1;
    shift_ = bits - 1;
  }

  __device__ int64_t quotient(int64_t n) const {
    return divisor_ == 1 ? n : int64_t(__umul64hi(uint64_t(n), multiplier_) >> shift_);
  }
  __device__ int64_t remainder(int64_t n) const { return n - quotient(n) * divisor_; }
  __device__ int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_;
  uint64_t multiplier_;
  int shift_;
};

// [outer, channels, inner] as rows of `inner` elements; a row belongs to one channel.
struct Rows {
  FastDivision inner, channels;

  Rows() = default;
  // per tensor there is one row, however long
  explicit Rows(const Layout& l)
      : inner(l.channels == 1 ? l.numel() : l.inner), channels(l.channels) {}

  __device__ int64_t row(int64_t element) const { return inner.quotient(element); }
  __device__ int64_t channel(int64_t row) const { return channels.remainder(row); }
};

// [outer, channels x inner] with a short inner: a block takes `width` packets side by side of a
// part of the rows, and each of its threads stays in its columns.
struct Columns {
  int64_t outer, columns;
  FastDivision inner;
  int width;
  int64_t parts, part_rows;

  Columns() = default;
  Columns(const Layout& l, int packet, int64_t parts)
      : outer(l.outer),
        columns(l.channels * l.inner),
        inner(l.inner),
        width(width_of(l, packet)),
        parts(parts),
        part_rows((l.outer + parts - 1) / parts) {}

  static bool fit(const Layout& l) { return l.channels > 1 && l.outer > 1 && l.inner < kWarp; }

  static int width_of(const Layout& l, int packet) {
    const int64_t packets = l.channels * l.inner / packet;
    return packets >= 32 ? 32 : packets >= 16 ? 16 : 8;
  }

  static int64_t tiles_of(const Layout& l, int packet) {
    return ceil_div(l.channels * l.inner, int64_t(packet) * width_of(l, packet));
  }
};

// scale and zero point in device memory, as what a channel's formula needs
template <class C>
struct ChannelParams {
  const C* scale;
  const void* zero_point;
  bool zero_point_is_int;
  int32_t qmin, qmax;

  ChannelParams() = default;
  explicit ChannelParams(const QuantParams& q)
      : scale(static_cast<const C*>(q.scale)),
        zero_point(q.zero_point),
        zero_point_is_int(q.zero_point_is_int),
        qmin(q.qmin),
        qmax(q.qmax) {}

  __device__ C zero(int64_t channel) const {
    if (!zero_point) return C(0);
    if (zero_point_is_int) return C(static_cast<const int32_t*>(zero_point)[channel]);
    return static_cast<const C*>(zero_point)[channel];
  }

  __device__ Channel<C> operator[](int64_t channel) const {
    return make_channel(scale[channel], zero(channel), C(qmin), C(qmax));
  }
};

// The channel of the row last asked for; neighbouring elements mostly share it. `a` holds rows and
// params.
template <class C, class Record = Channel<C>>
class ChannelCursor {
 public:
  template <class Args>
  __device__ const Record& at(const Args& a, int64_t row) {
    if (row != row_) {
      row_ = row;
      channel_ = a.params[a.rows.channel(row)];
    }
    return channel_;
  }

 private:
  int64_t row_ = -1;
  Record channel_ = {};
};

}  // namespace qk::cuda
