// The only pybind11 file: Python's arguments into the structs of params.h, and on to CPU or CUDA.
//
// Every op is called as op(device, handle, calls): `device` is -1 for the CPU, where `handle` is
// the number of threads, or the index of a CUDA device, where it is the stream; `calls` is a list
// of tuples, each the fields of one struct in their order. Tensors arrive as addresses (0 for
// none).
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "math/quant_range.h"
#include "params.h"

namespace py = pybind11;
using namespace qk;

// The fields of a tuple in turn: each conversion takes the next one, as the type asked for. The
// parts of a braced list are evaluated from left to right, so {next, next} reads them in order.
class Fields {
 public:
  Fields(const char* op, PyObject* tuple) : op(op), tuple(tuple) {
    if (!PyTuple_Check(tuple)) throw py::type_error(std::string(op) + ": a call must be a tuple");
  }

  template <class T>
  operator T() {
    if (taken == PyTuple_GET_SIZE(tuple)) fail("more");
    return as<T>(PyTuple_GET_ITEM(tuple, taken++));
  }

  void finish() const {
    if (taken != PyTuple_GET_SIZE(tuple)) fail("fewer");
  }

 private:
  template <class T>
  static T as(PyObject* value) {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(checked(PyLong_AsUnsignedLongLong(value)));
    } else if constexpr (std::is_same_v<T, bool>) {
      return checked(PyObject_IsTrue(value)) != 0;
    } else if constexpr (std::is_floating_point_v<T>) {
      return checked(PyFloat_AsDouble(value));
    } else {
      return T(checked(PyLong_AsLongLong(value)));
    }
  }

  template <class R>
  static R checked(R value) {
    if (value == R(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  [[noreturn]] void fail(const char* rule) const {
    throw py::type_error(std::string(op) + ": a call must have " + rule + " fields than the " +
                         std::to_string(PyTuple_GET_SIZE(tuple)) + " given");
  }

  const char* op;
  PyObject* tuple;
  Py_ssize_t taken = 0;
};

template <class P>
P read(Fields& next);

static Layout layout(Fields& next) { return {next, next, next}; }
static QuantParams quant(Fields& next) { return {next, next, next, next, next}; }
static Ranks ranks(Fields& next) { return {next, next, next, next}; }
static Counter counter(Fields& next) { return {next, next, next, next}; }
static Walk walk(Fields& next) {
  return {next, {next, next, next, next}, {next, next, next, next}};
}

template <>
FakeQuantParams read(Fields& next) {
  return {next, layout(next), quant(next), next, next, next, next};
}

template <>
FakeQuantBwdParams read(Fields& next) {
  return {next, next, next, next, next};
}

template <>
LsqBwdParams read(Fields& next) {
  return {next, layout(next), quant(next), next, next, next, next, next, next, next, next};
}

template <>
QuantRangeParams read(Fields& next) {
  return {next, layout(next), next, next, next, next, ranks(next), next, next, next, next, next};
}

template <>
QParamsParams read(Fields& next) {
  return {next, next, next, next, next, next, next, next, next, next};
}

template <>
FakeQuantDynamicParams read(Fields& next) {
  return {read<QuantRangeParams>(next), next, next, next};
}

template <>
QuantizeParams read(Fields& next) {
  return {next, layout(next), quant(next), next, next, next, next, next};
}

template <>
DequantizeParams read(Fields& next) {
  return {next, layout(next), quant(next), next, next, next, next, next, next};
}

template <>
ErrorStatsParams read(Fields& next) {
  return {next, layout(next), quant(next), next, next, next, next, next, next};
}

template <>
ErrorStatsDynamicParams read(Fields& next) {
  return {read<QuantRangeParams>(next), next, next, next, next, next};
}

template <>
NoiseParams read(Fields& next) {
  return {next, layout(next), walk(next), next, counter(next), next, next,
          next, next,         next,       next, next,          next, next};
}

// What a call does, in elements that are looked at once.
template <class P>
static auto elements(const P& p) -> decltype(p.layout.numel()) {
  return p.layout.numel();
}
static int64_t elements(const FakeQuantBwdParams& p) { return p.numel; }
static int64_t elements(const QParamsParams& p) { return p.channels; }
// a search looks at them many times
static int64_t elements(const QuantRangeParams& p) {
  const bool search = p.method == Method::mse || p.method == Method::percentile;
  return p.layout.numel() * (search ? kMseCandidates : 1);
}
static int64_t elements(const FakeQuantDynamicParams& p) { return elements(p.range); }
static int64_t elements(const ErrorStatsDynamicParams& p) { return elements(p.range); }

// Up to here a call on the CPU keeps the GIL: letting go of it and asking for it again takes half a
// microsecond, as long as the kernel of a small tensor.
static constexpr int64_t kMostWithGil = 16384;

template <class P, class R>
using Cpu = R (*cpu::Kernels::*)(const P*, int64_t, int);
template <class P>
using Cuda = cuda::Error (*)(const P*, int64_t, cuda::Stream);

// Runs the list, without the GIL unless it is short. Returns the index of the first call with an
// invalid scale or zero point where the CPU looked for one, else -1.
template <class P, class R>
static int64_t run(const char* op, int device, uint64_t handle, const std::vector<P>& calls,
                   Cpu<P, R> on_cpu, Cuda<P> on_cuda) {
  int64_t total = 0;
  for (const P& p : calls) total += elements(p);
  std::optional<py::gil_scoped_release> release;
  if (device >= 0 || total > kMostWithGil) release.emplace();
  const int64_t count = int64_t(calls.size());
  if (device < 0) {
    const auto function = cpu::kernels().*on_cpu;
    if constexpr (std::is_void_v<R>) {
      return function(calls.data(), count, int(handle)), -1;
    } else {
      return function(calls.data(), count, int(handle));
    }
  }
#ifdef QK_WITH_CUDA
  const int previous = cuda::set_device(device);
  const cuda::Error error = on_cuda(calls.data(), count, reinterpret_cast<cuda::Stream>(handle));
  cuda::set_device(previous);
  if (error) throw std::runtime_error(std::string(op) + ": CUDA says " + cuda::error_text(error));
  return -1;
#else
  (void)on_cuda;
  throw std::runtime_error(std::string(op) + ": this build has no CUDA kernels");
#endif
}

// The type of the last argument follows from that of `on_cpu`.
template <class P, class R>
static void define(py::module_& m, const char* op, Cpu<P, R> on_cpu,
                   std::common_type_t<Cuda<P>> on_cuda) {
  m.def(op, [=](int device, uint64_t handle, const py::list& list) {
    std::vector<P> calls;
    calls.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      Fields fields(op, PyList_GET_ITEM(list.ptr(), i));
      calls.push_back(read<P>(fields));
      fields.finish();
    }
    return run(op, device, handle, calls, on_cpu, on_cuda);
  });
}

#ifdef QK_WITH_CUDA
#define QK_CUDA(launcher) &cuda::launcher
#else
#define QK_CUDA(launcher) nullptr
#endif

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

static size_t error_stats_workspace(int device, int dtype, int64_t outer, int64_t channels,
                                    int64_t inner) {
#ifdef QK_WITH_CUDA
  if (device >= 0) return cuda::error_stats_workspace(DType(dtype), {outer, channels, inner});
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
  using cpu::Kernels;
  define(m, "fake_quant", &Kernels::fake_quant, QK_CUDA(launch_fake_quant));
  define(m, "fake_quant_bwd", &Kernels::fake_quant_bwd, QK_CUDA(launch_fake_quant_bwd));
  define(m, "lsq_bwd", &Kernels::lsq_bwd, QK_CUDA(launch_lsq_bwd));
  define(m, "quant_range", &Kernels::quant_range, QK_CUDA(launch_quant_range));
  define(m, "qparams", &Kernels::qparams, QK_CUDA(launch_qparams));
  define(m, "fake_quant_dynamic", &Kernels::fake_quant_dynamic, QK_CUDA(launch_fake_quant_dynamic));
  define(m, "quantize", &Kernels::quantize, QK_CUDA(launch_quantize));
  define(m, "dequantize", &Kernels::dequantize, QK_CUDA(launch_dequantize));
  define(m, "error_stats", &Kernels::error_stats, QK_CUDA(launch_error_stats));
  define(m, "error_stats_dynamic", &Kernels::error_stats_dynamic,
         QK_CUDA(launch_error_stats_dynamic));
  define(m, "noise", &Kernels::noise, QK_CUDA(launch_noise));
  m.def("lsq_bwd_workspace", &lsq_bwd_workspace);
  m.def("quant_range_workspace", &quant_range_workspace);
  m.def("error_stats_workspace", &error_stats_workspace);
  m.def("build_info", &build_info);
}
