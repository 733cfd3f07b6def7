// What csrc/cuda offers to the binding. Every launcher returns at once when there is nothing to do,
// launches on the given stream, and returns the launch's error.
#pragma once

#include <cstddef>

#include "params.h"

struct CUstream_st;

namespace qk::cuda {

using Stream = CUstream_st*;
using Error = int;  // cudaError_t, kept out of this header so that the binding needs no CUDA header

Error launch_fake_quant(const FakeQuantParams& p, Stream stream);
Error launch_fake_quant_bwd(const FakeQuantBwdParams& p, Stream stream);
Error launch_lsq_bwd(const LsqBwdParams& p, Stream stream);
Error launch_quant_range(const QuantRangeParams& p, Stream stream);
Error launch_qparams(const QParamsParams& p, Stream stream);
Error launch_fake_quant_dynamic(const FakeQuantDynamicParams& p, Stream stream);
Error launch_quantize(const QuantizeParams& p, Stream stream);
Error launch_dequantize(const DequantizeParams& p, Stream stream);

// Bytes of scratch memory that the caller allocates; they depend on shapes alone.
size_t lsq_bwd_workspace(DType dtype, const Layout& layout);
size_t quant_range_workspace(DType dtype, const Layout& layout, Method method);

const char* error_text(Error error);
int set_device(int device);  // makes device current, returns the one before
const char* architectures();

}  // namespace qk::cuda
