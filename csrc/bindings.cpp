// The only pybind11 file: Python's arguments into the structs of params.h, and on to CPU or CUDA.
//
// Tensors arrive as addresses (0 for none). `device` is -1 for the CPU, where `handle` is the
// number of threads, or the index of a CUDA device, where it is the stream.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "params.h"
#ifdef QK_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace qk;
using Address = uintptr_t;

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// Runs cpu(threads) or cuda(stream) without the GIL; the former's result is returned, -1 for the
// latter.
template <class Cpu, class Cuda>
static int64_t run(const char* op, int device, uint64_t handle, Cpu cpu, Cuda cuda) {
  py::gil_scoped_release release;
  if (device < 0) return cpu(int(handle));
#ifdef QK_WITH_CUDA
  const int previous = cuda::set_device(device);
  const cuda::Error error = cuda(reinterpret_cast<cuda::Stream>(handle));
  cuda::set_device(previous);
  if (error) throw std::runtime_error(std::string(op) + ": CUDA says " + cuda::error_text(error));
  return -1;
#else
  (void)cuda;
  throw std::runtime_error(std::string(op) + ": this build has no CUDA kernels");
#endif
}

#ifdef QK_WITH_CUDA
#define QK_CUDA(call) [&](cuda::Stream s) -> cuda::Error { return cuda::call; }
#else
#define QK_CUDA(call) [](auto...) { return 0; }
#endif

static int64_t fake_quant(int device, uint64_t handle, int dtype, int64_t outer, int64_t channels,
                          int64_t inner, Address x, Address y, Address mask, Address scale,
                          Address zero_point, bool zp_int, int qmin, int qmax, bool clip_value) {
  const FakeQuantParams p = {DType(dtype),
                             {outer, channels, inner},
                             {at(scale), at(zero_point), zp_int, qmin, qmax},
                             clip_value,
                             at(x),
                             at(y),
                             at<uint8_t>(mask)};
  return run(
      "fake_quant", device, handle, [&](int n) { return cpu::kernels().fake_quant(p, n); },
      QK_CUDA(launch_fake_quant(p, s)));
}

static void fake_quant_bwd(int device, uint64_t handle, int dtype, int64_t numel, Address grad,
                           Address mask, Address grad_x) {
  const FakeQuantBwdParams p = {DType(dtype), numel, at(grad), at<uint8_t>(mask), at(grad_x)};
  run(
      "fake_quant_bwd", device, handle,
      [&](int n) { return cpu::kernels().fake_quant_bwd(p, n), int64_t(-1); },
      QK_CUDA(launch_fake_quant_bwd(p, s)));
}

static int64_t lsq_bwd(int device, uint64_t handle, int dtype, int64_t outer, int64_t channels,
                       int64_t inner, Address grad, Address x, Address grad_x, Address grad_s,
                       Address grad_zp, Address workspace, Address scale, Address zero_point,
                       bool zp_int, int qmin, int qmax, bool clip_value, double grad_scale) {
  const LsqBwdParams p = {DType(dtype),
                          {outer, channels, inner},
                          {at(scale), at(zero_point), zp_int, qmin, qmax},
                          clip_value,
                          grad_scale,
                          at(grad),
                          at(x),
                          at(grad_x),
                          at(grad_s),
                          at(grad_zp),
                          at(workspace)};
  return run(
      "lsq_bwd", device, handle, [&](int n) { return cpu::kernels().lsq_bwd(p, n); },
      QK_CUDA(launch_lsq_bwd(p, s)));
}

static QuantRangeParams range_params(int dtype, int64_t outer, int64_t channels, int64_t inner,
                                     Address x, Address scale, Address zero_point, Address range,
                                     Address workspace, int qmin, int qmax, bool symmetric,
                                     int method, int64_t lo_k, double lo_w, int64_t hi_k,
                                     double hi_w) {
  return {DType(dtype),
          {outer, channels, inner},
          qmin,
          qmax,
          symmetric,
          Method(method),
          {lo_k, lo_w, hi_k, hi_w},
          at(x),
          at(scale),
          at<int32_t>(zero_point),
          at(range),
          at(workspace)};
}

static void quant_range(int device, uint64_t handle, int dtype, int64_t outer, int64_t channels,
                        int64_t inner, Address x, Address scale, Address zero_point, Address range,
                        Address workspace, int qmin, int qmax, bool symmetric, int method,
                        int64_t lo_k, double lo_w, int64_t hi_k, double hi_w) {
  const QuantRangeParams p =
      range_params(dtype, outer, channels, inner, x, scale, zero_point, range, workspace, qmin,
                   qmax, symmetric, method, lo_k, lo_w, hi_k, hi_w);
  run(
      "quant_range", device, handle,
      [&](int n) { return cpu::kernels().quant_range(p, n), int64_t(-1); },
      QK_CUDA(launch_quant_range(p, s)));
}

static void qparams(int device, uint64_t handle, bool is_double, int64_t channels, Address range,
                    Address scale, Address zero_point, int qmin, int qmax, bool symmetric) {
  const QParamsParams p = {is_double, channels,  qmin,      qmax,
                           symmetric, at(range), at(scale), at<int32_t>(zero_point)};
  run(
      "qparams", device, handle, [&](int n) { return cpu::kernels().qparams(p, n), int64_t(-1); },
      QK_CUDA(launch_qparams(p, s)));
}

static void fake_quant_dynamic(int device, uint64_t handle, int dtype, int64_t outer,
                               int64_t channels, int64_t inner, Address x, Address scale,
                               Address zero_point, Address workspace, int qmin, int qmax,
                               bool symmetric, int method, int64_t lo_k, double lo_w, int64_t hi_k,
                               double hi_w, Address y, Address mask, bool clip_value) {
  const FakeQuantDynamicParams p = {
      range_params(dtype, outer, channels, inner, x, scale, zero_point, 0, workspace, qmin, qmax,
                   symmetric, method, lo_k, lo_w, hi_k, hi_w),
      clip_value, at(y), at<uint8_t>(mask)};
  run(
      "fake_quant_dynamic", device, handle,
      [&](int n) { return cpu::kernels().fake_quant_dynamic(p, n), int64_t(-1); },
      QK_CUDA(launch_fake_quant_dynamic(p, s)));
}

static int64_t quantize(int device, uint64_t handle, int dtype, int64_t outer, int64_t channels,
                        int64_t inner, Address x, Address codes, Address scale, Address zero_point,
                        bool zp_int, int qmin, int qmax, int code_bytes, int pack,
                        int64_t row_size) {
  const QuantizeParams p = {DType(dtype),
                            {outer, channels, inner},
                            {at(scale), at(zero_point), zp_int, qmin, qmax},
                            code_bytes,
                            pack,
                            row_size,
                            at(x),
                            at(codes)};
  return run(
      "quantize", device, handle, [&](int n) { return cpu::kernels().quantize(p, n); },
      QK_CUDA(launch_quantize(p, s)));
}

static int64_t dequantize(int device, uint64_t handle, int dtype, int64_t outer, int64_t channels,
                          int64_t inner, Address codes, Address y, Address scale,
                          Address zero_point, bool zp_int, int qmin, int code_bytes,
                          bool code_signed, int pack, int64_t row_size) {
  const DequantizeParams p = {DType(dtype),
                              {outer, channels, inner},
                              {at(scale), at(zero_point), zp_int, qmin, 0},
                              code_bytes,
                              code_signed,
                              pack,
                              row_size,
                              at(codes),
                              at(y)};
  return run(
      "dequantize", device, handle, [&](int n) { return cpu::kernels().dequantize(p, n); },
      QK_CUDA(launch_dequantize(p, s)));
}

// Bytes of scratch memory; the CPU kernels take their own.
static size_t lsq_bwd_workspace(int device, int dtype, int64_t outer, int64_t channels,
                                int64_t inner) {
#ifdef QK_WITH_CUDA
  if (device >= 0) return cuda::lsq_bwd_workspace(DType(dtype), {outer, channels, inner});
#endif
  return 0;
}

static size_t quant_range_workspace(int device, int dtype, int64_t outer, int64_t channels,
                                    int64_t inner, int method) {
#ifdef QK_WITH_CUDA
  if (device >= 0)
    return cuda::quant_range_workspace(DType(dtype), {outer, channels, inner}, Method(method));
#endif
  return 0;
}

static py::dict build_info() {
  py::dict info;
  info["compiler"] = QK_COMPILER;
  info["simd"] = cpu::kernels().simd;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
#ifdef QK_WITH_CUDA
  info["cuda"] = QK_CUDA_VERSION;
  info["cuda_archs"] = cuda::architectures();
#else
  info["cuda"] = "";
  info["cuda_archs"] = "";
#endif
  return info;
}

#ifndef QK_MODULE
#define QK_MODULE _C
#endif

PYBIND11_MODULE(QK_MODULE, m) {
  m.def("fake_quant", &fake_quant);
  m.def("fake_quant_bwd", &fake_quant_bwd);
  m.def("lsq_bwd", &lsq_bwd);
  m.def("lsq_bwd_workspace", &lsq_bwd_workspace);
  m.def("quant_range", &quant_range);
  m.def("quant_range_workspace", &quant_range_workspace);
  m.def("qparams", &qparams);
  m.def("fake_quant_dynamic", &fake_quant_dynamic);
  m.def("quantize", &quantize);
  m.def("dequantize", &dequantize);
  m.def("build_info", &build_info);
}
