"""The range of x, and the fake quantization of x with it: quant_range, then fake_quant."""

from __future__ import annotations

from torch import Tensor

from qkernels.backends.reference.fake_quant import fake_quant_unchecked
from qkernels.backends.reference.quant_range import quant_range


def fake_quant_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    mask: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (y, or x in place; scale, zero point as int32, mask bytes; empty unless asked for)."""
    scale, zp, _ = quant_range(x, qmin, qmax, axis, group_size, symmetric, method, percentile)
    y, bits = fake_quant_unchecked(x, scale, zp, qmin, qmax, axis, group_size, clip, mask, inplace)
    return y, scale, zp, bits
