"""Gradients of fake_quant with a learned scale (LSQ, Esser et al. 2019) and zero point (LSQ+).

    grad_x     = grad * inside
    grad_scale = g * sum over the channel of grad * (q - t inside, q outside)
    grad_zp    = g * sum over the channel of grad * (0 inside, -scale outside)

with t = x / scale and q = code - zp as in fake_quant. NaN elements of x contribute nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.backends.reference.common import from_channels, to_channels
from qkernels.backends.reference.fake_quant import quantized
from qkernels.ops._check import check_values


def lsq_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (grad_x, grad_scale, grad_zp) in the dtypes of x, of scale, and of scale."""
    check_values("lsq_bwd", scale, zero_point)
    v = quantized(to_channels(x, axis, group_size), scale, zero_point, qmin, qmax, clip)
    like = torch.empty_like(x)  # grad in the memory order of x
    g = to_channels(like.copy_(grad), axis, group_size)
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    known = ~v.t.isnan()
    ds = torch.where(known, g * (v.q - torch.where(v.inside, v.t, zero)), zero)
    dz = torch.where(known & ~v.inside, g * -v.scale, zero)
    grad_x = from_channels(torch.where(v.inside, g, zero), x, group_size)

    def reduce(d: Tensor) -> Tensor:
        total = d.to(torch.float64).sum(dim=(0, 2)) * grad_scale
        return total.to(scale.dtype).reshape(scale.shape)

    return grad_x, reduce(ds), reduce(dz)
