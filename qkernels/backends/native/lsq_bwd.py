"""The gradients of a learned scale in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import flat_params, with_strides_of
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
    dense, order, layout = numeric.plan(x, axis, group_size)
    grad = numeric.to_order(grad, order)
    grad_x, grad_s, grad_zp = (
        torch.empty_like(dense),
        torch.empty_like(scale),
        torch.empty_like(scale),
    )
    lib, device, handle = _native.target(x)
    dtype = DTYPES[x.dtype]
    workspace = lib.lsq_bwd_workspace(device, dtype, *layout)
    scratch = x.new_empty((workspace + 7) // 8, dtype=torch.float64)  # holds aligned doubles
    s, zp, zp_is_int = flat_params(scale, zero_point)
    bad = lib.lsq_bwd(
        device,
        handle,
        dtype,
        *layout,
        grad.data_ptr(),
        dense.data_ptr(),
        grad_x.data_ptr(),
        grad_s.data_ptr(),
        grad_zp.data_ptr(),
        scratch.data_ptr(),
        s.data_ptr(),
        _native.pointer(zp),
        zp_is_int,
        qmin,
        qmax,
        clip == "value",
        grad_scale,
    )
    if bad >= 0 or device >= 0:
        check_values("lsq_bwd", scale, zero_point)
    return with_strides_of(x, grad_x, group_size), grad_s, grad_zp
