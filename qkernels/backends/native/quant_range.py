"""Ranges in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import params_like, range_args, range_workspace


def qparams(range: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """range [2, ...] -> (scale, zero point as int32)."""
    range = range.contiguous()
    scale = torch.empty(range.shape[1:], dtype=range.dtype, device=range.device)
    zp = torch.empty(range.shape[1:], dtype=torch.int32, device=range.device)
    lib, device, handle = _native.target(range)
    lib.qparams(
        device,
        handle,
        range.dtype is torch.float64,
        scale.numel(),
        range.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        qmin,
        qmax,
        symmetric,
    )
    return scale, zp


def quant_range(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (scale, zero point as int32, range [2, ...])."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp = params_like(x, axis, group_size)
    bounds = torch.empty((2, *scale.shape), dtype=scale.dtype, device=x.device)
    lib, device, handle = target = _native.target(x)
    scratch = range_workspace(target, x, layout, method)
    lib.quant_range(
        device,
        handle,
        DTYPES[x.dtype],
        *layout,
        dense.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        bounds.data_ptr(),
        scratch.data_ptr(),
        *range_args(qmin, qmax, symmetric, method, percentile, layout),
    )
    return scale, zp, bounds
