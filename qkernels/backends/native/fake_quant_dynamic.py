"""Range, scale and fake quantization in one call of the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import (
    params_like,
    range_args,
    range_workspace,
    with_strides_of,
)


def fake_quant_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (y, scale, zero point as int32, mask bytes; empty unless asked for)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp = params_like(x, axis, group_size)
    y = torch.empty_like(dense)
    numel = x.numel() if mask else 0
    bits = torch.empty(numeric.mask_bytes(numel), dtype=torch.uint8, device=x.device)
    lib, device, handle = target = _native.target(x)
    scratch = range_workspace(target, x, layout, method)
    lib.fake_quant_dynamic(
        device,
        handle,
        DTYPES[x.dtype],
        *layout,
        dense.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        scratch.data_ptr(),
        *range_args(qmin, qmax, symmetric, method, percentile, layout),
        y.data_ptr(),
        bits.data_ptr(),
        clip == "value",
    )
    return with_strides_of(x, y, group_size), scale, zp, bits
