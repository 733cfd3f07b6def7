"""The gradients of a learned scale in the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import (
    Prepared,
    flat_params,
    forms,
    with_strides_of,
    workspace,
)
from qkernels.ops._check import check_values


def _prepare(
    target: _native.Target,
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
) -> Prepared:
    """-> (grad_x, grad_scale, grad_zp) in the dtypes of x, of scale, and of scale."""
    dense, order, layout = numeric.plan(x, axis, group_size)
    grad = numeric.to_order(grad, order)
    grad_x = torch.empty_like(dense)
    grad_s = torch.empty_like(scale)
    grad_zp = torch.empty_like(scale)
    scratch = workspace(target, x, "lsq_bwd_workspace", *layout)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    fields = (
        DTYPES[x.dtype],
        *layout,
        s.data_ptr(),
        0 if zp is None else zp.data_ptr(),
        zp_is_int,
        qmin,
        qmax,
        clip == "value",
        grad_scale,
        grad.data_ptr(),
        dense.data_ptr(),
        grad_x.data_ptr(),
        grad_s.data_ptr(),
        grad_zp.data_ptr(),
        scratch.data_ptr(),
    )
    kept = (grad, dense, scratch, s, zp)
    if group_size is not None and dense is not x:
        return fields, grad_x, kept, lambda: (with_strides_of(x, grad_x), grad_s, grad_zp)
    return fields, (grad_x, grad_s, grad_zp), kept, None


def _check(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any) -> None:
    check_values("lsq_bwd", scale, zero_point)


lsq_bwd, foreach_lsq_bwd = forms("lsq_bwd", _prepare, _check)
