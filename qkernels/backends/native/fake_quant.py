"""fake_quant and its straight-through backward in the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import Prepared, flat_params, forms, new_bytes, with_strides_of
from qkernels.ops._check import check_values


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
    mask: bool,
    inplace: bool = False,
) -> Prepared:
    """-> (y, or x itself in place; mask bytes; empty unless asked for)."""
    if axis is None and group_size is None and x.is_contiguous():  # plan takes longer
        dense, outer, channels, inner = x, 1, 1, x.numel()
    else:
        dense, _, (outer, channels, inner) = numeric.plan(x, axis, group_size)
    y = dense if inplace or dense is not x else torch.empty_like(dense)
    size = numeric.mask_bytes(outer * channels * inner) if mask else 0
    bits = new_bytes(x, size)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    fields = (
        DTYPES[x.dtype],
        outer,
        channels,
        inner,
        s.data_ptr(),
        0 if zp is None else zp.data_ptr(),
        zp_is_int,
        qmin,
        qmax,
        clip == "value",
        dense.data_ptr(),
        y.data_ptr(),
        bits.data_ptr(),
    )
    if group_size is not None and dense is not x:
        return fields, y, (dense, s, zp), lambda: (with_strides_of(x, y), bits)
    return fields, (y, bits), (dense, s, zp), None


def _prepare_bwd(target: _native.Target, grad: Tensor, mask: Tensor, order: list[int]) -> Prepared:
    """-> grad where the mask is set, else 0."""
    grad = numeric.to_order(grad, order)
    out = torch.empty_like(grad)
    fields = (
        DTYPES[grad.dtype],
        grad.numel(),
        grad.data_ptr(),
        mask.data_ptr(),
        out.data_ptr(),
    )
    return fields, out, grad, None


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any) -> None:
    check_values("fake_quant", scale, zero_point)


fake_quant, foreach_fake_quant = forms("fake_quant", _prepare, _check)
fake_quant_bwd, foreach_fake_quant_bwd = forms("fake_quant_bwd", _prepare_bwd)
