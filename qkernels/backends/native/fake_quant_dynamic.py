"""Range, scale and fake quantization in one call of the compiled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels.backends.native.common import (
    NOTHING,
    Prepared,
    forms,
    params_like,
    pieces,
    range_fields,
    range_workspace,
    with_strides_of,
)

# scale, zero point and mask of a call, uninitialised
Room = tuple[Tensor, Tensor, Tensor]


def _room(x: Tensor, axis: int | None, group_size: int | None, mask: bool) -> Room:
    bits = x.new_empty(numeric.mask_bytes(x.numel()) if mask else 0, dtype=torch.uint8)
    return *params_like(x, axis, group_size), bits


def _rooms(target: _native.Target, calls: list[tuple[Any, ...]]) -> list[Room] | None:
    """The rooms of a list in three pieces of memory: to take one piece costs as much as the kernel
    of a small tensor. None on CUDA, whose kernels want them aligned, and if scales differ in dtype.
    """
    x = calls[0][0]
    dtype = numeric.compute_dtype(x.dtype)
    if target[1] >= 0 or any(numeric.compute_dtype(args[0].dtype) is not dtype for args in calls):
        return None
    counts, sizes, whole = [], [], []
    for place, (x, _, _, axis, group_size, *_, mask) in enumerate(calls):
        if axis is None and group_size is None:
            whole.append(place)
        counts.append(numeric.channel_count(x.shape, axis, group_size))
        sizes.append(numeric.mask_bytes(x.numel()) if mask else 0)
    scales, zps = pieces(x, counts, dtype), pieces(x, counts, torch.int32)
    for place in whole:  # one for the tensor is 0-dim
        scales[place], zps[place] = scales[place].view(()), zps[place].view(())
    return list(zip(scales, zps, pieces(x, sizes, torch.uint8), strict=True))


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
    room: Room | None = None,
) -> Prepared:
    """-> (y, or x in place; scale, zero point as int32, mask bytes; empty unless asked for)."""
    dense, _, layout = numeric.plan(x, axis, group_size)
    scale, zp, bits = _room(x, axis, group_size, mask) if room is None else room
    y = dense if inplace or dense is not x else torch.empty_like(dense)
    scratch = NOTHING if target[1] < 0 else range_workspace(target, x, layout, method)
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


fake_quant_dynamic, foreach_fake_quant_dynamic = forms("fake_quant_dynamic", _prepare, rooms=_rooms)
