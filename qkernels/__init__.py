"""Fused CUDA, Triton and CPU kernels for quantization-aware training in PyTorch."""

from qkernels._native import build_info
from qkernels._registry import explain, use_backend
from qkernels._version import __version__
from qkernels.ops.fake_quant import fake_quant
from qkernels.ops.fake_quant_dynamic import FakeQuantized, fake_quant_dynamic
from qkernels.ops.quant_range import QuantRange, observe_range, qparams, quant_range
from qkernels.ops.quantize import dequantize, quantize

__all__ = [
    "FakeQuantized",
    "QuantRange",
    "__version__",
    "build_info",
    "dequantize",
    "explain",
    "fake_quant",
    "fake_quant_dynamic",
    "observe_range",
    "qparams",
    "quant_range",
    "quantize",
    "use_backend",
]
