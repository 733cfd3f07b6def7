"""Ranges in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels.backends.native.common import (
    Prepared,
    forms,
    params_like,
    range_fields,
    range_workspace,
)


def _prepare_qparams(
    target: _native.Target,
    range: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    running: Tensor | None = None,
    weight: float = 0.0,
) -> Prepared:
    """range [2, ...] -> (scale, zero point as int32); running (without gaps) moves by range."""
    range = range.contiguous()
    scale = range.new_empty(range.shape[1:])
    zp = range.new_empty(range.shape[1:], dtype=torch.int32)
    fields = (
        range.dtype is torch.float64,
        scale.numel(),
        qmin,
        qmax,
        symmetric,
        range.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        0 if running is None else running.data_ptr(),
        weight,
    )
    return fields, (scale, zp), range, None


def _prepare(
    target: _native.Target,
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
) -> Prepared:
    """-> (scale, zero point as int32, range [2, ...])."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp = params_like(x, axis, group_size)
    bounds = scale.new_empty((2, *scale.shape))
    scratch = range_workspace(target, x, layout, method)
    fields = (
        *range_fields(dense, layout, qmin, qmax, symmetric, method, percentile),
        dense.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        bounds.data_ptr(),
        scratch.data_ptr(),
    )
    return fields, (scale, zp, bounds), (dense, scratch), None


qparams, foreach_qparams = forms("qparams", _prepare_qparams)
quant_range, foreach_quant_range = forms("quant_range", _prepare)
