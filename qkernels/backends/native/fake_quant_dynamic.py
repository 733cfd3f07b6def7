"""Range, scale and fake quantization in one call of the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels.backends.native.common import (
    Prepared,
    forms,
    params_like,
    range_fields,
    range_workspace,
    with_strides_of,
)


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
    clip: str,
    mask: bool,
    inplace: bool = False,
) -> Prepared:
    """-> (y, or x in place; scale, zero point as int32, mask bytes; empty unless asked for)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp = params_like(x, axis, group_size)
    y = dense if inplace or dense is not x else torch.empty_like(dense)
    bits = x.new_empty(numeric.mask_bytes(x.numel()) if mask else 0, dtype=torch.uint8)
    scratch = range_workspace(target, x, layout, method)
    fields = (
        *range_fields(dense, layout, qmin, qmax, symmetric, method, percentile),
        dense.data_ptr(),
        scale.data_ptr(),
        zp.data_ptr(),
        0,
        scratch.data_ptr(),
        clip == "value",
        y.data_ptr(),
        bits.data_ptr(),
    )
    finish = None
    if group_size is not None and dense is not x:

        def finish() -> Any:
            return with_strides_of(x, y), scale, zp, bits

    return fields, (y, scale, zp, bits), (dense, scratch), finish


fake_quant_dynamic, foreach_fake_quant_dynamic = forms("fake_quant_dynamic", _prepare)
