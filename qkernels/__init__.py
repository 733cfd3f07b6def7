"""Fused CUDA, Triton and CPU kernels for quantization-aware training in PyTorch."""

from qkernels import foreach
from qkernels._native import build_info
from qkernels._registry import explain, use_backend
from qkernels._version import __version__
from qkernels.noise_source import Noise
from qkernels.ops.error_stats import ErrorStats, error_stats
from qkernels.ops.fake_quant import fake_quant
from qkernels.ops.fake_quant_dynamic import FakeQuantized, fake_quant_dynamic
from qkernels.ops.noise import differential_noise, drop_in_noise, uniform_noise
from qkernels.ops.quant_range import QuantRange, observe_range, qparams, quant_range
from qkernels.ops.quantize import dequantize, quantize

__all__ = [
    "ErrorStats",
    "FakeQuantized",
    "Noise",
    "QuantRange",
    "__version__",
    "build_info",
    "dequantize",
    "differential_noise",
    "drop_in_noise",
    "error_stats",
    "explain",
    "fake_quant",
    "fake_quant_dynamic",
    "foreach",
    "observe_range",
    "qparams",
    "quant_range",
    "quantize",
    "uniform_noise",
    "use_backend",
]
