"""What others offer for the same work: torch core, and plain torch, eager and by torch.compile.

The composites compute in fp32 and store in x's dtype, as our ops do, with parameters in a shape
that broadcasts over x and `dims` the dimensions that share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .clocks import Call


def composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake quantization as one writes it by hand."""
    code = torch.clamp(torch.round(x.float() * (1.0 / scale)) + zp, qmin, qmax)
    return ((code - zp) * scale).to(x.dtype)


def ste_composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """The same with a straight-through gradient where the code is in range."""
    code = torch.round(x.float() * (1.0 / scale)) + zp
    inside = (code >= qmin) & (code <= qmax)
    y = ((torch.clamp(code, qmin, qmax) - zp) * scale).to(x.dtype)
    passed = torch.where(inside, x, x.detach())
    return passed + (y - passed).detach()


def lsq_composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """The same with the gradient of a learned scale and zero point too (LSQ, clipped by code)."""
    t = x.float() * (1.0 / scale)
    code = torch.round(t) + zp
    inside = (code >= qmin) & (code <= qmax)
    carrier = torch.where(inside, t + zp, 0.0)
    code = torch.clamp(code, qmin, qmax).detach() + (carrier - carrier.detach())
    return ((code - zp) * scale).to(x.dtype)


def dynamic_composite(x: Tensor, qmin: int, qmax: int, dims: list[int] | None = None) -> Tensor:
    """Fake quantization with the affine min-max range (of each row, without dims)."""
    return composite(x, *minmax_composite(x, qmin, qmax, dims), qmin, qmax)


def minmax_composite(
    x: Tensor, qmin: int, qmax: int, dims: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of the affine min-max range."""
    dims = [1] if dims is None else dims
    lo = x.amin(dims, keepdim=True).float().clamp(max=0)
    hi = x.amax(dims, keepdim=True).float().clamp(min=0)
    scale = ((hi - lo) / (qmax - qmin)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, torch.clamp(qmin - torch.round(lo / scale), qmin, qmax)


def error_composite(
    x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int, dims: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the error."""
    dims = [1] if dims is None else dims
    e = composite(x.float(), scale, zp, qmin, qmax) - x.float()
    return e.mean(dims), e.var(dims, unbiased=False)


def quantize_composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of one byte."""
    return torch.clamp(torch.round(x.float() * (1.0 / scale)) + zp, qmin, qmax).to(torch.uint8)


def dequantize_composite(codes: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
    """And back."""
    return (codes.float() - zp) * scale


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn by torch.compile with its default backend, for the shapes of its first call."""
    torch._dynamo.reset()  # so that no earlier shape makes these dynamic
    return torch.compile(fn, fullgraph=True, dynamic=False)


def core_fake_quant(
    x: Tensor, scale: Tensor, zp: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """torch core's op."""
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zp, qmin, qmax)
    return torch.fake_quantize_per_channel_affine(x, scale, zp, axis, qmin, qmax)


def core_learnable(
    x: Tensor, scale: Tensor, zp: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """torch core's op with a learned scale; it wants a floating zero point of the scale's shape."""
    if axis is None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        return op(x, scale.reshape(1), zp.reshape(1), qmin, qmax, 1.0)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zp, axis, qmin, qmax, 1.0)


def core_learnable_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zp: Tensor, axis: int | None, qmin: int, qmax: int
) -> tuple[Tensor, ...]:
    """The backward of core_learnable alone."""
    aten = torch.ops.aten
    if axis is None:
        op = aten._fake_quantize_learnable_per_tensor_affine_backward
        return op(grad, x, scale.reshape(1), zp.reshape(1), qmin, qmax, 1.0)
    op = aten._fake_quantize_learnable_per_channel_affine_backward
    return op(grad, x, scale, zp, axis, qmin, qmax, 1.0)


def copies(x: Tensor, nbytes: int) -> dict[str, Call]:
    """A copy that reads and writes `nbytes` together into memory that is there, and into new."""
    count = max(1, nbytes // 8)
    source = torch.zeros(count, dtype=torch.float32, device=x.device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source), "clone": source.clone}


def kthvalue_percentile(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Lower and upper percentile of each row by two kthvalue calls (nearest rank)."""
    n = x.shape[1]
    k = max(1, round(percentile / 100 * n))
    return x.kthvalue(n - k + 1, dim=1).values, x.kthvalue(k, dim=1).values
