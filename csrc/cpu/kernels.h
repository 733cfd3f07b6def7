// What csrc/cpu offers to the binding: one table of functions per instruction set.
#pragma once

#include "params.h"

namespace qk::cpu {

// Functions that read a given scale return the first channel whose scale or zero point is invalid,
// or -1; the output of an invalid channel is NaN.
struct Kernels {
  const char* simd;
  int64_t (*fake_quant)(const FakeQuantParams& p, int threads);
  void (*fake_quant_bwd)(const FakeQuantBwdParams& p, int threads);
  int64_t (*lsq_bwd)(const LsqBwdParams& p, int threads);
  void (*quant_range)(const QuantRangeParams& p, int threads);
  void (*qparams)(const QParamsParams& p, int threads);
  void (*fake_quant_dynamic)(const FakeQuantDynamicParams& p, int threads);
  int64_t (*quantize)(const QuantizeParams& p, int threads);
  int64_t (*dequantize)(const DequantizeParams& p, int threads);
};

// The widest table that this machine runs; QKERNELS_SIMD=base|avx2|avx512 asks for a narrower one.
const Kernels& kernels();

}  // namespace qk::cpu
