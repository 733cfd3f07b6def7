"""Statistics of the quantization error in the compiled module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES, pointer
from qkernels.backends.native.common import (
    Prepared,
    flat_params,
    forms,
    params_like,
    range_fields,
    range_workspace,
    workspace,
)
from qkernels.ops._check import check_values


def _stats_like(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Uninitialised statistics."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    return x.new_empty((4, *shape), dtype=numeric.compute_dtype(x.dtype))


def _prepare(
    target: _native.Target,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> Prepared:
    """-> statistics [4] or [4, channels]."""
    if x.is_cuda:  # before anything is written; looks only if QKERNELS_CHECK=1
        check_values("error_stats", scale, zero_point)
    dense, _, layout = numeric.plan(x, axis, group_size)
    stats = _stats_like(x, axis, group_size)
    scratch = workspace(target, x, "error_stats_workspace", *layout)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    fields = (
        DTYPES[x.dtype],
        *layout,
        s.data_ptr(),
        pointer(zp),
        zp_is_int,
        qmin,
        qmax,
        clip == "value",
        dense.data_ptr(),
        stats.data_ptr(),
        pointer(ema),
        decay,
        scratch.data_ptr(),
    )
    return fields, stats, (dense, s, zp, scratch), None


def _prepare_dynamic(
    target: _native.Target,
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> Prepared:
    """-> (statistics, scale, zero point as int32)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp = params_like(x, axis, group_size)
    stats = _stats_like(x, axis, group_size)
    scratch = workspace(target, x, "error_stats_workspace", *layout)
    range_scratch = range_workspace(target, x, layout, method)
    fields = (
        *range_fields(x, layout, qmin, qmax, symmetric, method, percentile),
        dense.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        0,  # the bounds themselves are not asked for
        range_scratch.data_ptr(),
        clip == "value",
        stats.data_ptr(),
        pointer(ema),
        decay,
        scratch.data_ptr(),
    )
    return fields, (stats, scale, zp), (dense, scratch, range_scratch), None


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any) -> None:
    check_values("error_stats", scale, zero_point)


error_stats, foreach_error_stats = forms("error_stats", _prepare, _check)
error_stats_dynamic, foreach_error_stats_dynamic = forms("error_stats_dynamic", _prepare_dynamic)
