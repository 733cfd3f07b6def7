"""Quantization-aware modules: prepare a float model, calibrate it, train it, take it apart again.

model = prepare(model, QConfig.lsq(2, 2))   # its Conv and Linear layers now fake-quantize
calibrate(model, loader)                    # first ranges, or let the first training step do it
...                                         # train as before
torch.save(float_state_dict(model), path)   # the float model's keys

Or float training under the noise of quantization, and its statistics: `attach_noise`, `ErrorEMA`.
"""

from qkernels.nn.calibrate import calibrate
from qkernels.nn.dorefa import DorefaActivationFakeQuantize, DorefaWeightFakeQuantize
from qkernels.nn.error_ema import ErrorEMA
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.fold import fold_batchnorm
from qkernels.nn.kinds import fake_quantizer
from qkernels.nn.layers import QuantLayer
from qkernels.nn.noise import NoiseHandle, attach_noise, noise_handles
from qkernels.nn.noise_modules import NoiseSpec
from qkernels.nn.pact import PactFakeQuantize
from qkernels.nn.partial import (
    PartialFakeQuantize,
    QDropFakeQuantize,
    QuantNoiseFakeQuantize,
)
from qkernels.nn.prepare import (
    float_state_dict,
    prepare,
    quantizable_layers,
    remove,
    set_quantization,
)
from qkernels.nn.qconfig import QConfig
from qkernels.nn.quant_spec import QuantSpec
from qkernels.nn.rounding import SoftRounding

__all__ = [
    "DorefaActivationFakeQuantize",
    "DorefaWeightFakeQuantize",
    "ErrorEMA",
    "FakeQuantize",
    "NoiseHandle",
    "NoiseSpec",
    "PactFakeQuantize",
    "PartialFakeQuantize",
    "QConfig",
    "QDropFakeQuantize",
    "QuantLayer",
    "QuantNoiseFakeQuantize",
    "QuantSpec",
    "SoftRounding",
    "attach_noise",
    "calibrate",
    "fake_quantizer",
    "float_state_dict",
    "fold_batchnorm",
    "noise_handles",
    "prepare",
    "quantizable_layers",
    "remove",
    "set_quantization",
]
