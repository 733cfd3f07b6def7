// The functions of one instruction set. Every file of csrc/cpu but select.cpp is compiled once per
// set, with QK_ISA naming it.
#pragma once

#include "cpu/kernels.h"
#include "math/hd.h"

namespace qk::cpu::QK_ISA {

int64_t fake_quant(const FakeQuantParams& p, int threads);
void fake_quant_bwd(const FakeQuantBwdParams& p, int threads);
int64_t lsq_bwd(const LsqBwdParams& p, int threads);
void quant_range(const QuantRangeParams& p, int threads);
void qparams(const QParamsParams& p, int threads);
void fake_quant_dynamic(const FakeQuantDynamicParams& p, int threads);
int64_t quantize(const QuantizeParams& p, int threads);
int64_t dequantize(const DequantizeParams& p, int threads);

}  // namespace qk::cpu::QK_ISA
