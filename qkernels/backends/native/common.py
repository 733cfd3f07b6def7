"""Arguments that the native rows share, in the order in which csrc/bindings.cpp takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric

METHOD_IDS = {name: i for i, name in enumerate(numeric.METHODS)}


def flat_params(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """(scale, zero point, whether int32) without gaps, as the kernels index them."""
    if not scale.is_contiguous():
        scale = scale.contiguous()
    if zero_point is None:
        return scale, None, False
    if not zero_point.is_contiguous():
        zero_point = zero_point.contiguous()
    return scale, zero_point, zero_point.dtype is torch.int32


def range_args(
    qmin: int, qmax: int, symmetric: bool, method: str, percentile: float, layout: numeric.Layout
) -> tuple[int | float | bool, ...]:
    """What the range kernels need besides memory."""
    (lo_k, lo_w), (hi_k, hi_w) = (0, 0.0), (0, 0.0)
    if method == "percentile":
        outer, _, inner = layout
        (lo_k, lo_w), (hi_k, hi_w) = numeric.percentile_ranks(percentile, max(outer * inner, 1))
    return qmin, qmax, symmetric, METHOD_IDS[method], lo_k, lo_w, hi_k, hi_w


def range_workspace(
    target: _native.Target, x: Tensor, layout: numeric.Layout, method: str
) -> Tensor:
    """Scratch memory of the range kernels; empty on the CPU."""
    lib, device, _ = target
    dtype = _native.DTYPES[x.dtype]
    size = lib.quant_range_workspace(device, dtype, *layout, METHOD_IDS[method])
    return x.new_empty((size + 7) // 8, dtype=torch.float64)  # holds aligned doubles


def params_like(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Uninitialised (scale, zero point) for a tensor."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    scale = torch.empty(shape, dtype=numeric.compute_dtype(x.dtype), device=x.device)
    return scale, torch.empty(shape, dtype=torch.int32, device=x.device)


def with_strides_of(x: Tensor, out: Tensor, group_size: int | None) -> Tensor:
    """out, or, where groups made a row-major copy of x, a copy with the strides that x asks for."""
    if group_size is None or x.is_contiguous():
        return out
    return torch.empty_like(x, dtype=out.dtype).copy_(out)
