// What the range methods share inside csrc/cuda.
#pragma once

#include "cuda/reduce.h"
#include "math/quant_range.h"

namespace qk::cuda {

// Where the result of a channel goes. range may be null.
template <class C>
struct RangeResult {
  C* scale;
  int32_t* zero_point;
  C* range;  // [2, channels]
  int64_t channels;
  int32_t qmin, qmax;
  bool symmetric;

  RangeResult() = default;
  explicit RangeResult(const QuantRangeParams& p)
      : scale(static_cast<C*>(p.scale)),
        zero_point(p.zero_point),
        range(static_cast<C*>(p.range)),
        channels(p.layout.channels),
        qmin(p.qmin),
        qmax(p.qmax),
        symmetric(p.symmetric) {}

  __device__ QParams<C> qparams(Range<C> r) const {
    return range_to_qparams(r, C(qmin), C(qmax), symmetric);
  }

  __device__ void write(int64_t channel, Range<C> r) const {
    const QParams<C> q = qparams(r);
    scale[channel] = q.scale;
    zero_point[channel] = q.zero_point;
    if (range) {
      range[channel] = r.lo;
      range[channels + channel] = r.hi;
    }
  }
};

// [outer, channels, inner], cut into parts of each channel
struct ChannelParts {
  int64_t channels, n;  // n elements of each channel
  FastDivision inner;
  int64_t parts, part_size;

  ChannelParts() = default;
  ChannelParts(const Layout& l, int64_t parts)
      : channels(l.channels),
        n(l.outer * l.inner),
        inner(l.inner),
        parts(parts),
        part_size(ceil_div(n, parts)) {}

  __device__ int64_t index(int64_t channel, int64_t element) const {
    const int64_t row = inner.quotient(element);
    return element + (row * (channels - 1) + channel) * inner.divisor();
  }
};

// In percentile.cu and mse.cu, for calls of one dtype. The MSE search starts from the ranges of the
// elements, [2, channels] each.
template <class T, class C>
Error launch_percentile(const std::vector<QuantRangeParams>& calls, Stream stream);
size_t percentile_workspace(DType dtype, const Layout& layout);
template <class T, class C>
Error launch_mse(const std::vector<QuantRangeParams>& calls, const std::vector<const C*>& ranges,
                 Stream stream);
size_t mse_workspace(const Layout& layout);

}  // namespace qk::cuda
