// What csrc/cuda offers to the binding. Every launcher takes a list of calls (one tensor is a list
// of one), returns at once when there is nothing to do, launches on the given stream, and returns
// the first launch's error. The calls of a list run in any order, so none may read what another
// writes. The list may go away as soon as the launcher returns.
#pragma once

#include <cstddef>

#include "params.h"

struct CUstream_st;

namespace qk::cuda {

using Stream = CUstream_st*;
using Error = int;  // cudaError_t, kept out of this header so that the binding needs no CUDA header

Error launch_fake_quant(const FakeQuantParams* calls, int64_t count, Stream stream);
Error launch_fake_quant_bwd(const FakeQuantBwdParams* calls, int64_t count, Stream stream);
Error launch_lsq_bwd(const LsqBwdParams* calls, int64_t count, Stream stream);
Error launch_quant_range(const QuantRangeParams* calls, int64_t count, Stream stream);
Error launch_qparams(const QParamsParams* calls, int64_t count, Stream stream);
Error launch_fake_quant_dynamic(const FakeQuantDynamicParams* calls, int64_t count, Stream stream);
Error launch_quantize(const QuantizeParams* calls, int64_t count, Stream stream);
Error launch_dequantize(const DequantizeParams* calls, int64_t count, Stream stream);
Error launch_error_stats(const ErrorStatsParams* calls, int64_t count, Stream stream);
Error launch_error_stats_dynamic(const ErrorStatsDynamicParams* calls, int64_t count,
                                 Stream stream);
Error launch_noise(const NoiseParams* calls, int64_t count, Stream stream);

// Bytes of scratch memory that the caller allocates; they depend on shapes alone.
size_t lsq_bwd_workspace(DType dtype, const Layout& layout);
size_t quant_range_workspace(DType dtype, const Layout& layout, Method method);
size_t error_stats_workspace(DType dtype, const Layout& layout);

const char* error_text(Error error);
int set_device(int device);  // makes device current, returns the one before
const char* architectures();

}  // namespace qk::cuda
