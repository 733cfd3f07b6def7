// The functions of one instruction set. Every file of csrc/cpu but select.cpp is compiled once per
// set, with QK_ISA naming it.
#pragma once

#include "cpu/kernels.h"
#include "math/hd.h"

namespace qk::cpu::QK_ISA {

int64_t fake_quant(const FakeQuantParams* calls, int64_t count, int threads);
void fake_quant_bwd(const FakeQuantBwdParams* calls, int64_t count, int threads);
int64_t lsq_bwd(const LsqBwdParams* calls, int64_t count, int threads);
void quant_range(const QuantRangeParams* calls, int64_t count, int threads);
void qparams(const QParamsParams* calls, int64_t count, int threads);
void fake_quant_dynamic(const FakeQuantDynamicParams* calls, int64_t count, int threads);
int64_t quantize(const QuantizeParams* calls, int64_t count, int threads);
int64_t dequantize(const DequantizeParams* calls, int64_t count, int threads);
int64_t error_stats(const ErrorStatsParams* calls, int64_t count, int threads);
void error_stats_dynamic(const ErrorStatsDynamicParams* calls, int64_t count, int threads);
int64_t noise(const NoiseParams* calls, int64_t count, int threads);

}  // namespace qk::cpu::QK_ISA
