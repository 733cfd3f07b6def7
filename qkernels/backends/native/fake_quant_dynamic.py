"""Range, scale and fake quantization in one call of the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels.backends.native.common import (
    Prepared,
    forms,
    new_bytes,
    params_like,
    pieces,
    range_fields,
    range_workspace,
    with_strides_of,
)

# scale, zero point and mask of a call, uninitialised
Outputs = tuple[Tensor, Tensor, Tensor]


def _outputs(x: Tensor, axis: int | None, group_size: int | None, mask: bool) -> Outputs:
    size = numeric.mask_bytes(x.numel()) if mask else 0
    return *params_like(x, axis, group_size), new_bytes(x, size)


def _outputs_of_list(calls: list[tuple[Any, ...]]) -> list[Outputs]:
    """Those of every call on the CPU, in one piece of memory for each dtype."""
    counts, sizes = [], []
    places: dict[torch.dtype, list[int]] = {}  # of the calls whose scales have a dtype
    for place, (x, _, _, axis, group_size, _, _, _, _, mask) in enumerate(calls):
        counts.append(numeric.channel_count(x.shape, axis, group_size))
        sizes.append(numeric.mask_bytes(x.numel()) if mask else 0)
        places.setdefault(numeric.compute_dtype(x.dtype), []).append(place)
    zps = pieces(counts, torch.int32)
    scales = list(zps)
    for dtype, chosen in places.items():
        for place, scale in zip(chosen, pieces([counts[i] for i in chosen], dtype), strict=True):
            scales[place] = scale
    for place, (_, _, _, axis, group_size, *_) in enumerate(calls):
        if axis is None and group_size is None:  # one for the tensor is 0-dim
            scales[place], zps[place] = scales[place].view(()), zps[place].view(())
    return list(zip(scales, zps, pieces(sizes, torch.uint8), strict=True))


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
    outputs: Outputs | None = None,
) -> Prepared:
    """-> (y, or x in place; scale, zero point as int32, mask bytes; empty unless asked for)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp, bits = _outputs(x, axis, group_size, mask) if outputs is None else outputs
    y = dense if inplace or dense is not x else torch.empty_like(dense)
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


fake_quant_dynamic, foreach_fake_quant_dynamic = forms(
    "fake_quant_dynamic", _prepare, outputs=_outputs_of_list
)
