"""fake_quantizer: the module for a QuantSpec."""

from __future__ import annotations

from qkernels.nn.dorefa import DorefaActivationFakeQuantize, DorefaWeightFakeQuantize
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.pact import PactFakeQuantize
from qkernels.nn.partial import QDropFakeQuantize, QuantNoiseFakeQuantize
from qkernels.nn.quant_spec import QuantSpec

CLASSES: dict[str, type[FakeQuantize]] = {
    cls.kind: cls
    for cls in (
        FakeQuantize,
        PactFakeQuantize,
        DorefaWeightFakeQuantize,
        DorefaActivationFakeQuantize,
        QuantNoiseFakeQuantize,
        QDropFakeQuantize,
    )
}


def fake_quantizer(spec: QuantSpec, channels: int = 1) -> FakeQuantize:
    """The fake quantizer of the spec's kind. Arguments and errors are those of `FakeQuantize`."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"fake_quantizer: spec must be a QuantSpec, got {spec!r}")
    return CLASSES[spec.kind](spec, channels)
