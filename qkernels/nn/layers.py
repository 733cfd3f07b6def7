"""The quantizable layers: each is its float class with fake quantizers for weight and input.

A float layer becomes one by a change of class, in place: parameters, buffers, hooks and names stay
what they were, so the float model's state_dict keys and its optimizer survive.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qkernels.nn.fake_quantize import FakeQuantize


class QuantLayer(nn.Module):
    """What the quantized layers share; `float_class` is the layer without it."""

    float_class: type[nn.Module]
    weight: Tensor
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(input, weight), each fake-quantized if it has a quantizer."""
        weight = self.weight
        if self.input_fake_quant is not None:
            x = self.input_fake_quant(x)
        if self.weight_fake_quant is not None:
            weight = self.weight_fake_quant(weight)
        return x, weight

    def initialize_weight(self) -> None:
        """Set what the weight's quantizer keeps from the weight as it is now."""
        quantizer = self.weight_fake_quant
        if quantizer is not None and not quantizer.spec.dynamic and not self.weight.is_meta:
            quantizer.store(quantizer.measure(self.weight))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A new weight that comes without its quantizers' entries (a float checkpoint) starts them
        anew: they would belong to the weights of before."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "weight" not in state_dict:
            return
        weight, input = self.weight_fake_quant, self.input_fake_quant
        if weight is not None and not weight.entries(prefix + "weight_fake_quant.", state_dict):
            self.initialize_weight()
        if input is not None and not input.entries(prefix + "input_fake_quant.", state_dict):
            input.reset()


class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear with fake-quantized weight and input."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return F.linear(x, weight, self.bias)


class _QuantConv(QuantLayer):
    _conv_forward: Any  # of the float class

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return self._conv_forward(x, weight, self.bias)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """nn.Conv1d with fake-quantized weight and input."""

    float_class = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """nn.Conv2d with fake-quantized weight and input."""

    float_class = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """nn.Conv3d with fake-quantized weight and input."""

    float_class = nn.Conv3d


class _QuantConvTranspose(QuantLayer):
    _function: Any
    _output_padding: Any  # this and the rest of the float class
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x, weight = self.quantized(input)
        stride, padding, dilation = self.stride, self.padding, self.dilation
        dims = len(self.kernel_size)
        extra = self._output_padding(
            x, output_size, stride, padding, self.kernel_size, dims, dilation
        )
        return self._function(x, weight, self.bias, stride, padding, extra, self.groups, dilation)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with fake-quantized weight and input."""

    float_class = nn.ConvTranspose1d
    _function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with fake-quantized weight and input."""

    float_class = nn.ConvTranspose2d
    _function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with fake-quantized weight and input."""

    float_class = nn.ConvTranspose3d
    _function = staticmethod(F.conv_transpose3d)


QUANT_CLASS: dict[type[nn.Module], type[QuantLayer]] = {
    quant.float_class: quant
    for quant in (
        QuantLinear,
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
    )
}
