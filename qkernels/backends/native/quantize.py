"""Integer codes and back in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import flat_params, with_strides_of
from qkernels.ops._check import check_values


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
) -> Tensor:
    """-> codes, or packed bytes if pack is 1, 2 or 4."""
    # packed rows follow each other in row-major order, whatever the strides of x
    source = x.contiguous() if pack else x
    dense, _, layout = numeric.plan(source, axis, group_size)
    row_size = x.shape[-1] if pack else x.numel()
    if pack:
        codes = x.new_empty(numeric.packed_shape(x.shape, pack), dtype=torch.uint8)
    else:
        codes = torch.empty_like(dense, dtype=numeric.code_dtype(qmin, qmax))
    lib, device, handle = _native.target(x)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    bad = lib.quantize(
        device,
        handle,
        DTYPES[x.dtype],
        *layout,
        dense.data_ptr(),
        codes.data_ptr(),
        s.data_ptr(),
        _native.pointer(zp),
        zp_is_int,
        qmin,
        qmax,
        codes.element_size(),
        pack,
        row_size,
    )
    if bad >= 0 or device >= 0:
        check_values("quantize", scale, zero_point)
    return codes if pack else with_strides_of(x, codes, group_size)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> (code - zp) * scale in dtype; size is the length of the last dim of packed codes."""
    if pack:
        dense = codes.contiguous()
        y = codes.new_empty((*codes.shape[:-1], size), dtype=dtype)
        layout = numeric.layout_of(y.shape, [], axis, group_size)
    else:
        dense, _, layout = numeric.plan(codes, axis, group_size)
        y = torch.empty_like(dense, dtype=dtype)
    lib, device, handle = _native.target(codes)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    bad = lib.dequantize(
        device,
        handle,
        DTYPES[dtype],
        *layout,
        dense.data_ptr(),
        y.data_ptr(),
        s.data_ptr(),
        _native.pointer(zp),
        zp_is_int,
        qmin,
        codes.element_size(),
        codes.dtype.is_signed,
        pack,
        size if pack else codes.numel(),
    )
    if bad >= 0 or device >= 0:
        check_values("dequantize", scale, zero_point)
    return y if pack else with_strides_of(codes, y, group_size)
