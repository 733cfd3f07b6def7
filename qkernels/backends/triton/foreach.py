"""fake_quant and its backward of a list, in one launch for each kind of tensor; see table.py.

Tiles are runs of memory, whatever the layout: the results of elements depend on no tile, so these
are the bits of the single ops. Tensors of 2^30 elements and more go one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch, table
from qkernels.backends.triton.fake_quant import (
    fake_quant,
    fake_quant_bwd,
    fake_quant_bwd_tile,
    fake_quant_tile,
    fake_quant_unchecked,
)
from qkernels.backends.triton.table import find, pointer, size
from qkernels.ops._check import check_values, each_call

GROUPS = launch.TILE // 8
# of records; see the kernels
FAKE_QUANT_FIELDS, BWD_FIELDS = 10, 4


# ideal bytes: those of fake_quant_kernel, and 88 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def fake_quant_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PARAM: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MASK: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile a program. DTYPE, PARAM (of scale), ZERO_POINT and MASK are dtypes, or None."""
    at, tile = find(table_ptr, count, FIELDS)
    fake_quant_tile(
        tile,
        pointer(at, DTYPE, EVEN),
        pointer(at + 1, DTYPE, EVEN),
        None if MASK is None else pointer(at + 2, MASK, False),
        pointer(at + 3, PARAM, False),
        None if ZERO_POINT is None else pointer(at + 4, ZERO_POINT, False),
        size(at + 5, False),
        size(at + 6, False),
        1,
        size(at + 7, EVEN),
        size(at + 8, False),
        size(at + 9, False),
        CLIP_VALUE,
        1,
        GROUPS,
        MODE,
        True,
        False,
    )


# ideal bytes: those of fake_quant_bwd_kernel, and 40 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def fake_quant_bwd_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile a program."""
    at, tile = find(table_ptr, count, FIELDS)
    fake_quant_bwd_tile(
        tile,
        pointer(at, DTYPE, EVEN),
        pointer(at + 1, tl.uint8, False),
        pointer(at + 2, DTYPE, EVEN),
        size(at + 3, EVEN),
        GROUPS,
        False,
    )


def flat_mode(layout: numeric.Layout) -> tuple[int, int, int]:
    """(mode, inner, channels) of a tensor taken as one run of memory: one channel is by eights,
    whatever its size, as they never cross into another."""
    outer, channels, inner = layout
    if channels == 1:
        return launch.GROUP, outer * inner, 1
    return launch.by_eights(inner), inner, channels


def foreach_fake_quant(calls: list[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]]:
    """fake_quant of every call."""
    if not table.takes(calls, FAKE_QUANT_FIELDS):
        return each_call(fake_quant, calls)
    each_call(lambda _x, scale, zp, *_: check_values("fake_quant", scale, zp), calls)
    batch = table.Batch(fake_quant_list_kernel, FAKE_QUANT_FIELDS)
    prepared = [_add_fake_quant(batch, *args) for args in calls]
    table.launch_batches(calls[0][0].device, batch)
    return [(launch.result(y, x, *rest), bits) for y, bits, x, *rest, _kept in prepared]


def _add_fake_quant(
    batch: table.Batch,
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
) -> tuple[Any, ...]:
    """-> (y, mask bytes, what launch.result takes besides y, what the record points to)."""
    numel = x.numel()
    if launch.is_wide(numel):
        args = (x, scale, zero_point, qmin, qmax, axis, group_size, clip, mask, inplace)
        return *fake_quant_unchecked(*args), x, None, inplace, None
    flat, _, layout = numeric.plan(x, axis, group_size)
    y = launch.output(flat, x, inplace)
    bits = x.new_empty(numeric.mask_bytes(numel) if mask else 0, dtype=torch.uint8)
    s, zp = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    mode, inner, channels = flat_mode(layout)
    pointers = (flat.data_ptr(), y.data_ptr(), bits.data_ptr(), s.data_ptr(), table.address(zp))
    batch.add(
        launch.ceil_div(numel, launch.TILE),
        (*pointers, qmin, qmax, numel, inner, channels),
        DTYPE=table.DTYPES[x.dtype],
        PARAM=table.DTYPES[s.dtype],
        ZERO_POINT=table.dtype_of(zp),
        MASK=tl.uint8 if mask else None,
        CLIP_VALUE=clip == "value",
        GROUPS=GROUPS,
        MODE=mode,
        EVEN=table.even(numel, *pointers[:2]),
    )
    return y, bits, x, group_size, inplace, (flat, s, zp)


def foreach_fake_quant_bwd(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    """fake_quant_bwd of every call."""
    if not table.takes(calls, BWD_FIELDS):
        return each_call(fake_quant_bwd, calls)
    batch = table.Batch(fake_quant_bwd_list_kernel, BWD_FIELDS)
    prepared = [_add_bwd(batch, *args) for args in calls]
    table.launch_batches(calls[0][0].device, batch)
    return [out for out, _kept in prepared]


def _add_bwd(
    batch: table.Batch, grad: Tensor, mask: Tensor, order: list[int]
) -> tuple[Tensor, Any]:
    """-> (grad where the mask is set, what the record points to)."""
    numel = grad.numel()
    if launch.is_wide(numel):
        return fake_quant_bwd(grad, mask, order), None
    grad, mask = numeric.to_order(grad, order), mask.contiguous()
    out = torch.empty_like(grad)
    grad_at, out_at = grad.data_ptr(), out.data_ptr()
    batch.add(
        launch.ceil_div(numel, launch.TILE),
        (grad_at, mask.data_ptr(), out_at, numel),
        DTYPE=table.DTYPES[grad.dtype],
        GROUPS=GROUPS,
        EVEN=table.even(numel, grad_at, out_at),
    )
    return out, (grad, mask)
