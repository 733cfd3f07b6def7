"""fake_quant and its straight-through backward in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import flat_params, with_strides_of
from qkernels.ops._check import check_values


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    """-> (y, mask bytes; empty unless asked for)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    y = torch.empty_like(dense)
    bits = x.new_empty(numeric.mask_bytes(x.numel()) if mask else 0, dtype=torch.uint8)
    lib, device, handle = _native.target(x)
    s, zp, zp_is_int = flat_params(scale, zero_point)
    bad = lib.fake_quant(
        device,
        handle,
        DTYPES[x.dtype],
        *layout,
        dense.data_ptr(),
        y.data_ptr(),
        bits.data_ptr(),
        s.data_ptr(),
        _native.pointer(zp),
        zp_is_int,
        qmin,
        qmax,
        clip == "value",
    )
    if bad >= 0 or device >= 0:
        check_values("fake_quant", scale, zero_point)
    return with_strides_of(x, y, group_size), bits


def fake_quant_bwd(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """grad where the mask is set, else 0."""
    grad = numeric.to_order(grad, order)
    out = torch.empty_like(grad)
    lib, device, handle = _native.target(grad)
    lib.fake_quant_bwd(
        device,
        handle,
        DTYPES[grad.dtype],
        grad.numel(),
        grad.data_ptr(),
        mask.data_ptr(),
        out.data_ptr(),
    )
    return out
