"""Quantization-aware modules: prepare a float model, calibrate it, train it, take it apart again.

model = prepare(model, QConfig.lsq(2, 2))   # its Conv and Linear layers now fake-quantize
calibrate(model, loader)                    # first ranges, or let the first training step do it
...                                         # train as before
torch.save(float_state_dict(model), path)   # the float model's keys
"""

from qkernels.nn.calibrate import calibrate
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.fold import fold_batchnorm
from qkernels.nn.layers import QuantLayer
from qkernels.nn.prepare import float_state_dict, prepare, remove, set_quantization
from qkernels.nn.qconfig import QConfig, QuantSpec

__all__ = [
    "FakeQuantize",
    "QConfig",
    "QuantLayer",
    "QuantSpec",
    "calibrate",
    "float_state_dict",
    "fold_batchnorm",
    "prepare",
    "remove",
    "set_quantization",
]
