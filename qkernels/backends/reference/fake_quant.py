"""Quantize and dequantize in one go, with a mask for the straight-through gradient.

    t    = x * (1 / scale)
    q    = clamp(rint(t), qmin - zp, qmax - zp)        zp = rint(zero_point)
    y    = q * scale                                   (code - zp) * scale, code = q + zp
    mask = rint(t) == q            clip="code": the rounded code is in range
         = qmin - zp <= t <= qmax - zp                 clip="value"
    grad_x = grad * mask

NaN gives NaN with gradient 0; a channel whose scale is not a positive, finite, normal number, or
whose zero point is not finite, is NaN throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference.common import (
    from_channels,
    pack_bits,
    per_channel,
    to_channels,
    unpack_bits,
)
from qkernels.ops._check import check_values


class Quantized(NamedTuple):
    """All that the formula gives for x as [outer, channels, inner]."""

    t: Tensor  # x / scale
    q: Tensor  # code - zero point
    inside: Tensor  # where the straight-through gradient passes
    scale: Tensor  # [channels, 1], NaN where invalid
    zero_point: Tensor  # [channels, 1], rounded


def valid_params(scale: Tensor, zero_point: Tensor) -> Tensor:
    """Where scale is positive, finite and normal, and the zero point small enough to be exact."""
    positive = (scale >= numeric.smallest_scale(scale.dtype)) & scale.isfinite()
    return positive & (zero_point.abs() <= numeric.LARGEST_ZERO_POINT)


def quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, clip: str
) -> Quantized:
    """The formula above for x as [outer, channels, inner]; shared by fake_quant, LSQ, quantize."""
    s = per_channel(scale, x.dtype)
    zp = torch.zeros_like(s) if zero_point is None else per_channel(zero_point, x.dtype).round()
    valid = valid_params(s, zp)
    s = torch.where(valid, s, torch.nan)
    lo, hi = qmin - zp, qmax - zp
    t = x * (1.0 / s)
    r = t.round() + 0.0  # half to even; + 0.0 turns -0.0 into 0.0, as code - zp does
    q = torch.minimum(torch.maximum(r, lo), hi)
    inside = (t >= lo) & (t <= hi) if clip == "value" else r == q
    return Quantized(t, q, inside, s, zp)


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    mask: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> (y, or x itself in place; mask bytes; empty unless asked for)."""
    check_values("fake_quant", scale, zero_point)
    args = (x, scale, zero_point, qmin, qmax, axis, group_size, clip, mask, inplace)
    return fake_quant_unchecked(*args)


def fake_quant_unchecked(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    mask: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """fake_quant with a scale that is not the user's: an invalid channel is NaN, and no error."""
    v = quantized(to_channels(x, axis, group_size), scale, zero_point, qmin, qmax, clip)
    y = from_channels(v.q * v.scale, x, group_size)
    if inplace:
        y = x.copy_(y)
    return y, pack_bits(v.inside) if mask else x.new_empty(0, dtype=torch.uint8)


def fake_quant_bwd(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """grad where the mask is set, +0 elsewhere (even where grad is NaN or infinite)."""
    grad = numeric.to_order(grad, order)
    flat = (grad.permute(order) if order else grad).reshape(-1)
    bits = unpack_bits(mask, flat.numel())
    out = torch.where(bits, flat, torch.zeros_like(flat))
    if not order:
        return out.reshape(grad.shape)
    return out.reshape([grad.shape[d] for d in order]).permute(numeric.inverse(order))
