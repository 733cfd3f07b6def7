#include "cpu/isa.h"

#define QK_STRING_OF(name) #name
#define QK_STRING(name) QK_STRING_OF(name)

// arm64 has one set of functions, the base one, and NEON is part of every such machine.
#if defined(__aarch64__)
#define QK_SIMD "neon"
#else
#define QK_SIMD QK_STRING(QK_ISA)
#endif

namespace qk::cpu::QK_ISA {

extern const Kernels table;
const Kernels table = {QK_SIMD,     fake_quant,  fake_quant_bwd,      lsq_bwd,
                       quant_range, qparams,     fake_quant_dynamic,  quantize,
                       dequantize,  error_stats, error_stats_dynamic, noise};

}  // namespace qk::cpu::QK_ISA
