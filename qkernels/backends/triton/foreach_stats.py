"""error_stats of a list, in one launch for each shape of tile and one or two to add up the parts.

Tiles and their order are those of the single op, and so are the bits; see table.py. Channels of a
few hundred elements and of thousands differ in their tiles, so that a network takes some five
launches. Tensors without elements or with 2^30 and more go one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch, table
from qkernels.backends.triton.error_stats import (
    FINISH_TILE,
    TILE,
    error_stats,
    error_stats_finish_block,
    error_stats_part,
    error_stats_unchecked,
)
from qkernels.backends.triton.table import find, pointer, size
from qkernels.ops._check import check_values, each_call

FIELDS, FINISH_FIELDS = 15, 7


# ideal bytes: those of error_stats_kernel, and 128 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def error_stats_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    PARTIAL: tl.constexpr,
    EMA: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_EVEN: tl.constexpr,
    INNER_EVEN: tl.constexpr,
    N_EVEN: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first stage. DTYPE, COMPUTE, ZERO_POINT, PARTIAL and EMA are dtypes, or None."""
    at, pid = find(table_ptr, count, FIELDS)
    error_stats_part(
        pid,
        pointer(at, DTYPE, ALIGNED),
        pointer(at + 1, COMPUTE, False),
        None if ZERO_POINT is None else pointer(at + 2, ZERO_POINT, False),
        None if PARTIAL is None else pointer(at + 3, PARTIAL, False),
        pointer(at + 4, COMPUTE, False),
        None if EMA is None else pointer(at + 5, EMA, False),
        size(at + 6, False),
        size(at + 7, False),
        tl.load(at + 8),
        tl.load(at + 9),
        1 if ONE_BLOCK else size(at + 10, False),
        size(at + 11, False),
        size(at + 12, CHANNELS_EVEN),
        size(at + 13, INNER_EVEN),
        size(at + 14, N_EVEN),
        CLIP_VALUE,
        C,
        E,
        MODE,
        WIDE,
    )


# ideal bytes: those of error_stats_finish_kernel, and 64 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def error_stats_finish_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_EVEN: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """The second stage."""
    at, pid = find(table_ptr, count, FIELDS)
    error_stats_finish_block(
        pid,
        pointer(at, COMPUTE, False),
        None if EMA is None else pointer(at + 1, EMA, False),
        pointer(at + 2, tl.float64, ALIGNED),
        tl.load(at + 3),
        tl.load(at + 4),
        size(at + 5, False),
        size(at + 6, CHANNELS_EVEN),
        P,
        C,
    )


def foreach_error_stats(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    """error_stats of every call."""
    averages = [args[8] for args in calls if len(args) > 8 and args[8] is not None]
    shared = len({id(a) for a in averages}) < len(averages)  # follows one tensor after the other
    if shared or not table.takes(calls, FIELDS + FINISH_FIELDS + 1):
        return each_call(error_stats, calls)
    each_call(lambda _x, scale, zp, *_: check_values("error_stats", scale, zp), calls)
    first = table.Batch(error_stats_list_kernel, FIELDS)
    second = table.Batch(error_stats_finish_list_kernel, FINISH_FIELDS)
    prepared = [_add(first, second, *args) for args in calls]
    table.launch_batches(calls[0][0].device, first, second)
    return [stats for stats, _kept in prepared]


def _add(
    first: table.Batch,
    second: table.Batch,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> tuple[Tensor, Any]:
    """-> (statistics, what the records point to)."""
    numel = x.numel()
    if numel == 0 or launch.is_wide(numel):
        args = (x, scale, zero_point, qmin, qmax, axis, group_size, clip, ema, decay)
        return error_stats_unchecked(*args), None
    compute = numeric.compute_dtype(x.dtype)
    stats = x.new_empty((4, *numeric.params_shape(x.shape, axis, group_size)), dtype=compute)
    flat, _, layout = numeric.plan(x, axis, group_size)
    plan = launch.reduction(layout, tile=TILE)
    channels, _, n = plan.sizes
    partial = None
    if plan.parts > 1:
        partial = x.new_empty((plan.parts, 3, channels), dtype=torch.float64)
    s, zp = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    tensors = (flat, s, zp, partial, stats, ema)
    rest = (n, launch.float_bits(1.0 - decay))
    common = {"COMPUTE": table.DTYPES[compute], "EMA": table.dtype_of(ema)}
    told = table.tiling_constants(plan)
    first.add(
        plan.programs,
        (*map(table.address, tensors), qmin, qmax, *rest, plan.blocks, plan.steps, *plan.sizes),
        DTYPE=table.DTYPES[x.dtype],
        ZERO_POINT=table.dtype_of(zp),
        PARTIAL=table.dtype_of(partial),
        CLIP_VALUE=clip == "value",
        ALIGNED=table.even(flat.data_ptr()),
        **common,
        **told,
        **plan.constants,
    )
    if partial is not None:
        programs, constants = launch.finishing(plan.parts, channels, FINISH_TILE)
        second.add(
            programs,
            (*map(table.address, (stats, ema, partial)), *rest, plan.parts, channels),
            ALIGNED=table.even(partial.data_ptr()),
            CHANNELS_EVEN=told["CHANNELS_EVEN"],
            **common,
            **constants,
        )
    return stats, tensors
