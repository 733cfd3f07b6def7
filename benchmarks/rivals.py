"""What others offer for the same work: torch core, and plain torch compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake quantization with the given [rows, 1] parameters, as one writes it by hand."""
    code = torch.clamp(torch.round(x * (1.0 / scale)) + zp, qmin, qmax)
    return (code - zp) * scale


def dynamic_composite(x: Tensor, qmin: int, qmax: int) -> Tensor:
    """The same with the affine min-max range of each row."""
    lo = x.amin(1, keepdim=True).clamp(max=0)
    hi = x.amax(1, keepdim=True).clamp(min=0)
    scale = (hi - lo) / (qmax - qmin)
    scale = scale.clamp(min=torch.finfo(x.dtype).tiny)
    zp = torch.clamp(qmin - torch.round(lo / scale), qmin, qmax)
    return composite(x, scale, zp, qmin, qmax)


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn by torch.compile with its default backend."""
    return torch.compile(fn, fullgraph=True)


def kthvalue_percentile(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Lower and upper percentile of each row by two kthvalue calls (nearest rank)."""
    n = x.shape[1]
    k = max(1, round(percentile / 100 * n))
    return x.kthvalue(n - k + 1, dim=1).values, x.kthvalue(k, dim=1).values
