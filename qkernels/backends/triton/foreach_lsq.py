"""lsq_bwd of a list, in one launch for each shape of tile and one or two to add up the parts.

As in foreach_stats.py, tiles and their order are those of the single op, and so are the bits.
Tensors without elements or with 2^30 and more go one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch, table
from qkernels.backends.triton.lsq_bwd import (
    FINISH_TILE,
    TILE,
    lsq_bwd,
    lsq_bwd_part,
    lsq_finish_block,
)
from qkernels.backends.triton.table import find, pointer, size
from qkernels.ops._check import check_values, each_call

FIELDS, FINISH_FIELDS = 16, 6


# ideal bytes: those of lsq_bwd_kernel, and 136 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def lsq_bwd_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    PARTIAL: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    CHANNELS_EVEN: tl.constexpr,
    INNER_EVEN: tl.constexpr,
    N_EVEN: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first stage. DTYPE, COMPUTE, ZERO_POINT and PARTIAL are dtypes, or None."""
    at, pid = find(table_ptr, count, FIELDS)
    lsq_bwd_part(
        pid,
        pointer(at, DTYPE, GRAD_ALIGNED),
        pointer(at + 1, DTYPE, X_ALIGNED),
        pointer(at + 2, DTYPE, OUT_ALIGNED),
        pointer(at + 3, COMPUTE, False),
        None if ZERO_POINT is None else pointer(at + 4, ZERO_POINT, False),
        pointer(at + 5, COMPUTE, False),
        pointer(at + 6, COMPUTE, False),
        None if PARTIAL is None else pointer(at + 7, PARTIAL, False),
        size(at + 8, False),
        size(at + 9, False),
        tl.load(at + 10),
        1 if ONE_BLOCK else size(at + 11, False),
        size(at + 12, False),
        size(at + 13, CHANNELS_EVEN),
        size(at + 14, INNER_EVEN),
        size(at + 15, N_EVEN),
        CLIP_VALUE,
        C,
        E,
        MODE,
        WIDE,
    )


# ideal bytes: those of lsq_finish_kernel, and 56 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def lsq_finish_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_EVEN: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """The second stage."""
    at, pid = find(table_ptr, count, FIELDS)
    lsq_finish_block(
        pid,
        pointer(at, COMPUTE, False),
        pointer(at + 1, COMPUTE, False),
        pointer(at + 2, tl.float64, ALIGNED),
        tl.load(at + 3),
        size(at + 4, False),
        size(at + 5, CHANNELS_EVEN),
        P,
        C,
    )


def foreach_lsq_bwd(calls: list[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """lsq_bwd of every call."""
    if not table.takes(calls, FIELDS + FINISH_FIELDS + 1):
        return each_call(lsq_bwd, calls)
    each_call(lambda _grad, _x, scale, zp, *_: check_values("lsq_bwd", scale, zp), calls)
    first = table.Batch(lsq_bwd_list_kernel, FIELDS)
    second = table.Batch(lsq_finish_list_kernel, FINISH_FIELDS)
    prepared = [_add(first, second, *args) for args in calls]
    table.launch_batches(calls[0][0].device, first, second)
    return [
        (launch.like(grad_x, x, group_size), grad_s, grad_z)
        for grad_x, grad_s, grad_z, x, group_size, _kept in prepared
    ]


def _add(
    first: table.Batch,
    second: table.Batch,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    grad_scale: float,
) -> tuple[Any, ...]:
    """-> (grad_x, grad_scale, grad_zp, x, group_size, what the records point to)."""
    numel = x.numel()
    if numel == 0 or launch.is_wide(numel):
        args = (grad, x, scale, zero_point, qmin, qmax, axis, group_size, clip, grad_scale)
        return *lsq_bwd(*args), x, None, None
    flat, order, layout = numeric.plan(x, axis, group_size)
    grad = numeric.to_order(grad, order)
    grad_x = torch.empty_like(flat)
    grad_s, grad_z = torch.empty_like(scale), torch.empty_like(scale)
    plan = launch.reduction(layout, tile=TILE)
    channels, _, _ = plan.sizes
    partial = None
    if plan.parts > 1:
        partial = x.new_empty((plan.parts, 2, channels), dtype=torch.float64)
    s, zp = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    tensors = (grad, flat, grad_x, s, zp, grad_s, grad_z, partial)
    bits = launch.float_bits(grad_scale)
    told = table.tiling_constants(plan)
    compute = table.DTYPES[scale.dtype]
    first.add(
        plan.programs,
        (*map(table.address, tensors), qmin, qmax, bits, plan.blocks, plan.steps, *plan.sizes),
        DTYPE=table.DTYPES[x.dtype],
        COMPUTE=compute,
        ZERO_POINT=table.dtype_of(zp),
        PARTIAL=table.dtype_of(partial),
        CLIP_VALUE=clip == "value",
        GRAD_ALIGNED=table.even(grad.data_ptr()),
        X_ALIGNED=table.even(flat.data_ptr()),
        OUT_ALIGNED=table.even(grad_x.data_ptr()),
        **told,
        **plan.constants,
    )
    if partial is not None:
        programs, constants = launch.finishing(plan.parts, channels, FINISH_TILE)
        second.add(
            programs,
            (*map(table.address, (grad_s, grad_z, partial)), bits, plan.parts, channels),
            COMPUTE=compute,
            ALIGNED=table.even(partial.data_ptr()),
            CHANNELS_EVEN=told["CHANNELS_EVEN"],
            **constants,
        )
    return grad_x, grad_s, grad_z, x, group_size, tensors
