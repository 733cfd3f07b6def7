"""Integer codes and back in the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import Prepared, flat_params, forms, with_strides_of
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
    pack: int,
) -> Prepared:
    """-> codes, or packed bytes if pack is 1, 2 or 4."""
    # packed rows follow each other in row-major order, whatever the strides of x
    source = x.contiguous() if pack else x
    dense, _, layout = numeric.plan(source, axis, group_size)
    row_size = x.shape[-1] if pack else x.numel()
    if pack:
        codes = x.new_empty(numeric.packed_shape(x.shape, pack), dtype=torch.uint8)
    else:
        codes = torch.empty_like(dense, dtype=numeric.code_dtype(qmin, qmax))
    s, zp, zp_is_int = flat_params(scale, zero_point)
    fields = (
        DTYPES[x.dtype],
        *layout,
        s.data_ptr(),
        0 if zp is None else zp.data_ptr(),
        zp_is_int,
        qmin,
        qmax,
        codes.element_size(),
        pack,
        row_size,
        dense.data_ptr(),
        codes.data_ptr(),
    )
    relaid = group_size is not None and not pack and dense is not x
    finish = (lambda: with_strides_of(x, codes)) if relaid else None
    return fields, codes, (dense, s, zp), finish


def _prepare_dequantize(
    target: _native.Target,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
    size: int,
    dtype: torch.dtype,
) -> Prepared:
    """-> (code - zp) * scale in dtype; size is the length of the last dim of packed codes."""
    if pack:
        dense = codes.contiguous()
        y = codes.new_empty((*codes.shape[:-1], size), dtype=dtype)
        layout = numeric.layout_of(y.shape, [], axis, group_size)
    else:
        dense, _, layout = numeric.plan(codes, axis, group_size)
        y = torch.empty_like(dense, dtype=dtype)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    fields = (
        DTYPES[dtype],
        *layout,
        s.data_ptr(),
        0 if zp is None else zp.data_ptr(),
        zp_is_int,
        qmin,
        0,  # qmax, which codes need no more
        codes.element_size(),
        codes.dtype.is_signed,
        pack,
        size if pack else codes.numel(),
        dense.data_ptr(),
        y.data_ptr(),
    )
    relaid = group_size is not None and not pack and dense is not codes
    finish = (lambda: with_strides_of(codes, y)) if relaid else None
    return fields, y, (dense, s, zp), finish


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any) -> None:
    check_values("quantize", scale, zero_point)


def _check_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any) -> None:
    check_values("dequantize", scale, zero_point)


quantize, foreach_quantize = forms("quantize", _prepare, _check)
dequantize, foreach_dequantize = forms("dequantize", _prepare_dequantize, _check_dequantize)
