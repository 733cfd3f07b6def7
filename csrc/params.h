// Arguments of every kernel: raw pointers and sizes, the same structs for CPU and CUDA.
//
// A tensor is seen in memory order as [outer, channels, inner]; per tensor, outer = channels = 1.
// Pointers to x, y, grad are of the storage dtype T; scale, ranges are of the compute dtype C
// (float, or double for double T). Reductions are written to [channels].
#pragma once

#include <cstdint>

namespace qk {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
enum class Method : int { minmax = 0, percentile = 1, mse = 2, lsq = 3 };

struct Layout {
  int64_t outer, channels, inner;
  int64_t numel() const { return outer * channels * inner; }
};

// scale [channels], zero_point [channels] as int32 or C, or null for 0
struct QuantParams {
  const void* scale;
  const void* zero_point;
  bool zero_point_is_int;
  int32_t qmin, qmax;
};

struct FakeQuantParams {
  DType dtype;
  Layout layout;
  QuantParams quant;
  bool clip_value;
  const void* x;
  void* y;
  uint8_t* mask;  // one bit per element, or null
};

struct FakeQuantBwdParams {
  DType dtype;
  int64_t numel;
  const void* grad;
  const uint8_t* mask;
  void* grad_x;
};

struct LsqBwdParams {
  DType dtype;
  Layout layout;
  QuantParams quant;
  bool clip_value;
  double grad_scale;
  const void* grad;
  const void* x;
  void* grad_x;
  void* grad_s;     // [channels] of C
  void* grad_zp;    // [channels] of C
  void* workspace;  // CUDA: lsq_bwd_workspace bytes; CPU: null
};

// Order statistics of the percentile: x_(k) + w (x_(k+1) - x_(k)); the ranks depend on n alone.
struct Ranks {
  int64_t lo_k;
  double lo_w;
  int64_t hi_k;
  double hi_w;
};

struct QuantRangeParams {
  DType dtype;
  Layout layout;
  int32_t qmin, qmax;
  bool symmetric;
  Method method;
  Ranks ranks;
  const void* x;
  void* scale;          // [channels] of C
  int32_t* zero_point;  // [channels]
  void* range;          // [2, channels] of C
  void* workspace;      // CUDA: quant_range_workspace bytes; CPU: null
};

struct QParamsParams {
  bool is_double;
  int64_t channels;
  int32_t qmin, qmax;
  bool symmetric;
  const void* range;  // [2, channels] of C
  void* scale;
  int32_t* zero_point;
  void* running;  // [2, channels] of C: moves by range and takes its place; or null
  double weight;  // of range in running
};

struct FakeQuantDynamicParams {
  QuantRangeParams range;  // range.range may be null
  bool clip_value;
  void* y;
  uint8_t* mask;
};

// codes of 1, 2 or 4 bytes (int8 / uint8, int16, int32); or packed: `pack` bits each, every row of
// row_size codes padded to whole bytes
struct QuantizeParams {
  DType dtype;
  Layout layout;
  QuantParams quant;
  int code_bytes;
  int pack;
  int64_t row_size;
  const void* x;
  void* codes;
};

struct DequantizeParams {
  DType dtype;
  Layout layout;
  QuantParams quant;  // qmax unused; packed codes are signed iff qmin < 0
  int code_bytes;
  bool code_signed;
  int pack;
  int64_t row_size;
  const void* codes;
  void* y;
};

// Statistics of Q(x) - x: mean, var, mean_square and clip_rate, [4, channels] of C
struct ErrorStatsParams {
  DType dtype;
  Layout layout;
  QuantParams quant;
  bool clip_value;
  const void* x;
  void* stats;
  void* ema;  // [5, channels] of C: averages of the four, and the weight gathered; or null
  double decay;
  void* workspace;  // CUDA: error_stats_workspace bytes; CPU: null
};

// The same with the range of x, into range.scale and range.zero_point.
struct ErrorStatsDynamicParams {
  QuantRangeParams range;
  bool clip_value;
  void* stats;
  void* ema;
  double decay;
  void* workspace;
};

enum class NoiseKind : int { differential = 0, drop_in = 1, uniform = 2 };

// Dims of a dense tensor from slowest to fastest in memory, and the step of each in the row-major
// index; a row-major tensor has rank 1.
struct Walk {
  static constexpr int kMostDims = 4;
  int rank;
  int64_t size[kMostDims], stride[kMostDims];
};

// Where the draws come from: numbers, or (not null) addresses on the tensor's device.
struct Counter {
  int64_t seed, step;
  const int64_t *seed_at, *step_at;
};

struct NoiseParams {
  DType dtype;
  Layout layout;
  Walk walk;
  NoiseKind kind;
  Counter counter;
  int64_t offset;  // of the tensor's first element in the row-major index
  double ramp;
  int32_t threshold;  // a gate is open with probability threshold / 2^24
  const void *mean, *std, *prev_mean, *prev_std;  // [channels] of C; mean is null for uniform
  const void* x;
  void* y;
};

}  // namespace qk
