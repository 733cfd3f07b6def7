// What csrc/cpu offers to the binding: one table of functions per instruction set.
#pragma once

#include "params.h"

namespace qk::cpu {

// Every function takes a list of calls. Those that read a given scale return the first call with an
// invalid scale or zero point, or -1.
struct Kernels {
  const char* simd;
  int64_t (*fake_quant)(const FakeQuantParams* calls, int64_t count, int threads);
  void (*fake_quant_bwd)(const FakeQuantBwdParams* calls, int64_t count, int threads);
  int64_t (*lsq_bwd)(const LsqBwdParams* calls, int64_t count, int threads);
  void (*quant_range)(const QuantRangeParams* calls, int64_t count, int threads);
  void (*qparams)(const QParamsParams* calls, int64_t count, int threads);
  void (*fake_quant_dynamic)(const FakeQuantDynamicParams* calls, int64_t count, int threads);
  int64_t (*quantize)(const QuantizeParams* calls, int64_t count, int threads);
  int64_t (*dequantize)(const DequantizeParams* calls, int64_t count, int threads);
  int64_t (*error_stats)(const ErrorStatsParams* calls, int64_t count, int threads);
  void (*error_stats_dynamic)(const ErrorStatsDynamicParams* calls, int64_t count, int threads);
  int64_t (*noise)(const NoiseParams* calls, int64_t count, int threads);
};

// The widest table that this machine runs; QKERNELS_SIMD=base|avx2|avx512 asks for a narrower one.
const Kernels& kernels();

}  // namespace qk::cpu
