"""Fake quantizers of others for the step benchmark, each made from the QuantSpec of ours.

They take the place of `qkernels.nn.FakeQuantize` in the layers of a prepared model, so that only
the quantizer differs. All observe and quantize as QConfig.minmax does: weights with the range of
the weight at hand, activations with a running one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.nn import QuantSpec

AXIS = 0  # of the weights' channels


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """(qmin, qmax)."""
    return numeric.code_range("bench_step", spec.bits, spec.symmetric, spec.narrow_range)


class ByHand(nn.Module):
    """The eager composite: min-max, parameters and rounding in torch ops, STE by detach.

    Its gradient is that of ours: clamp passes it where the rounded code was in range.
    """

    def __init__(self, spec: QuantSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.qmin, self.qmax = code_range(spec)
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """(scale, zero point) for x, after observing it; of the weight's rank if per channel."""
        if self.spec.axis is not None:
            size = x.abs().amax(tuple(range(1, x.dim())), keepdim=True)
            return (size / ((self.qmax - self.qmin) / 2)).clamp(min=1e-30), 0.0
        lo, hi = torch.aminmax(x)
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        decay = torch.where(self.started, self.spec.ema or 0.0, 0.0)
        self.lo.copy_(torch.lerp(lo, self.lo, decay))
        self.hi.copy_(torch.lerp(hi, self.hi, decay))
        self.started.fill_(True)
        scale = ((self.hi - self.lo) / (self.qmax - self.qmin)).clamp(min=1e-30)
        return scale, (self.qmin - torch.round(self.lo / scale)).clamp(self.qmin, self.qmax)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
        """x to codes and back."""
        t = x * (1.0 / scale)
        code = t + (torch.round(t) - t).detach() + zero_point
        return (torch.clamp(code, self.qmin, self.qmax) - zero_point) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x, *self.qparams(x))


class TorchCore(ByHand):
    """The same observer with torch core's fake_quantize ops, which save a mask of a byte each."""

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
        if self.spec.axis is None:
            zp = torch.as_tensor(zero_point).to(torch.int32)
            return torch.fake_quantize_per_tensor_affine(x, scale, zp, self.qmin, self.qmax)
        flat = scale.flatten()
        zp = torch.zeros_like(flat, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(x, flat, zp, AXIS, self.qmin, self.qmax)


def torch_ao(spec: QuantSpec, channels: int) -> nn.Module:
    """torch.ao's fused module: observer, parameters and fake quantization in one op.

    A weight's averaging constant of 1 makes its range that of the weight at hand; the work is the
    same for any constant.
    """
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )

    qmin, qmax = code_range(spec)
    if spec.axis is None:
        return FusedMovingAvgObsFakeQuantize(
            MovingAverageMinMaxObserver,
            qmin,
            qmax,
            dtype=torch.quint8,
            qscheme=torch.per_tensor_affine,
            averaging_constant=1.0 - (spec.ema or 0.0),
        )
    return FusedMovingAvgObsFakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        qmin,
        qmax,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=AXIS,
        averaging_constant=1.0,
    )


class TorchAoIntx(nn.Module):
    """torchao's IntxFakeQuantizer, which is made for 2-D tensors of linear layers.

    A weight is seen as [out, rest] with its axis 0, an activation as one token of [1, numel]. It
    has no running range: that of activations is dynamic.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        dtype = getattr(torch, f"int{spec.bits}")
        kind = "per_token" if spec.axis is None else "per_channel"
        self.rows = 1 if spec.axis is None else -1
        config = IntxFakeQuantizeConfig(dtype, kind, is_symmetric=spec.symmetric)
        self.quantizer = IntxFakeQuantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1) if self.rows == 1 else x.flatten(1)
        return self.quantizer(flat).reshape(x.shape)


def torchao(spec: QuantSpec, channels: int) -> nn.Module:
    """torchao's fake quantizer for integers."""
    return TorchAoIntx(spec)
