"""Gradients of fake_quant with a learned scale and zero point. Formula: reference/lsq_bwd.py.

One pass over x and grad; sums in fp32 with the rounding errors kept aside, then in double, in a
fixed order: within a program, then over the parts of a channel in a second small launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import tile
from qkernels.backends.triton.numeric import (
    compensated_add,
    double,
    is_nan,
    load_channel,
    narrow,
    quantize_value,
    row_sum,
    widen,
)
from qkernels.ops._check import check_values

# a program keeps four sums for each element of its tile
TILE = launch.TILE // 2
# of the second stage, with two doubles for each
FINISH_TILE = launch.TILE // 2


@triton.jit
def lsq_bwd_part(
    pid,
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    scale_ptr,
    zero_point_ptr,
    grad_scale_ptr,
    grad_zero_point_ptr,
    partial_ptr,
    qmin,
    qmax,
    grad_scale_bits,
    blocks,
    steps,
    channels,
    inner,
    n,
    CLIP_VALUE: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program pid: grad_x, and the sums over one part of C channels: to partial
    [parts, 2, channels] in double, or, without it, scaled to the gradients of scale and zero
    point."""
    block = pid % blocks
    part = pid // blocks
    c = block * C + tl.arange(0, C)
    inv, scale, lo, hi = load_channel(scale_ptr, zero_point_ptr, c, c < channels, qmin, qmax)
    inv, scale, lo, hi = inv[:, None], scale[:, None], lo[:, None], hi[:, None]
    by_scale = tl.zeros([C, E], scale.dtype)
    by_scale_lost = tl.zeros([C, E], scale.dtype)
    by_zero = tl.zeros([C, E], scale.dtype)
    by_zero_lost = tl.zeros([C, E], scale.dtype)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
        grad = widen(tl.load(grad_ptr + offset, mask=exists, other=0.0))
        t, q, inside = quantize_value(x, inv, lo, hi, CLIP_VALUE)
        grad_x = narrow(tl.where(inside, grad, 0.0), grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + offset, grad_x, mask=exists)
        known = exists & ~is_nan(t)
        d = tl.where(known, grad * (q - tl.where(inside, t, 0.0)), 0.0)
        by_scale, by_scale_lost = compensated_add(by_scale, by_scale_lost, d)
        d = tl.where(known & ~inside, grad * -scale, 0.0)
        by_zero, by_zero_lost = compensated_add(by_zero, by_zero_lost, d)
    for_scale = row_sum(by_scale, by_scale_lost)
    for_zero = row_sum(by_zero, by_zero_lost)
    if partial_ptr is not None:
        at = partial_ptr + part * 2 * channels + c
        tl.store(at, for_scale, mask=c < channels)
        tl.store(at + channels, for_zero, mask=c < channels)
    else:
        factor = double(grad_scale_bits)
        dtype = grad_scale_ptr.dtype.element_ty
        tl.store(grad_scale_ptr + c, (for_scale * factor).to(dtype), mask=c < channels)
        tl.store(grad_zero_point_ptr + c, (for_zero * factor).to(dtype), mask=c < channels)


# ideal bytes an element: reads 4 + 4, writes 4 in fp32; 2 + 2 and 2 in fp16 and bf16; writes 16 a
# channel and part
@triton.jit(do_not_specialize=["qmin", "qmax", "grad_scale_bits"])
def lsq_bwd_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    scale_ptr,
    zero_point_ptr,
    grad_scale_ptr,
    grad_zero_point_ptr,
    partial_ptr,
    qmin,
    qmax,
    grad_scale_bits,
    blocks,
    steps,
    channels,
    inner,
    n,
    CLIP_VALUE: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first stage, and the only one where channels are of one part."""
    lsq_bwd_part(
        tl.program_id(0),
        grad_ptr,
        x_ptr,
        grad_x_ptr,
        scale_ptr,
        zero_point_ptr,
        grad_scale_ptr,
        grad_zero_point_ptr,
        partial_ptr,
        qmin,
        qmax,
        grad_scale_bits,
        blocks,
        steps,
        channels,
        inner,
        n,
        CLIP_VALUE,
        C,
        E,
        MODE,
        WIDE,
    )


@triton.jit
def lsq_finish_block(
    pid,
    grad_scale_ptr,
    grad_zero_point_ptr,
    partial_ptr,
    grad_scale_bits,
    parts,
    channels,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Program pid: the sums over the parts, in their order, times grad_scale."""
    c = pid * C + tl.arange(0, C)[None, :]
    for_scale = tl.zeros([P, C], tl.float64)
    for_zero = tl.zeros([P, C], tl.float64)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)[:, None]
        at = partial_ptr + part * 2 * channels + c
        exists = (part < parts) & (c < channels)
        for_scale += tl.load(at, mask=exists, other=0.0)
        for_zero += tl.load(at + channels, mask=exists, other=0.0)
    factor = double(grad_scale_bits)
    dtype = grad_scale_ptr.dtype.element_ty
    c = pid * C + tl.arange(0, C)
    known = c < channels
    tl.store(grad_scale_ptr + c, (tl.sum(for_scale, 0) * factor).to(dtype), mask=known)
    tl.store(grad_zero_point_ptr + c, (tl.sum(for_zero, 0) * factor).to(dtype), mask=known)


# ideal bytes a channel: reads 16 a part, writes 8
@triton.jit(do_not_specialize=["grad_scale_bits", "parts"])
def lsq_finish_kernel(
    grad_scale_ptr,
    grad_zero_point_ptr,
    partial_ptr,
    grad_scale_bits,
    parts,
    channels,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """The second stage."""
    lsq_finish_block(
        tl.program_id(0),
        grad_scale_ptr,
        grad_zero_point_ptr,
        partial_ptr,
        grad_scale_bits,
        parts,
        channels,
        P,
        C,
    )


def lsq_bwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (grad_x, grad_scale, grad_zp) in the dtypes of x, of scale, and of scale."""
    check_values("lsq_bwd", scale, zero_point)
    flat, order, layout = numeric.plan(x, axis, group_size)
    grad_x = torch.empty_like(flat)
    grad_s, grad_z = torch.empty_like(scale), torch.empty_like(scale)
    if x.numel() == 0:
        return launch.like(grad_x, x, group_size), grad_s.zero_(), grad_z.zero_()
    plan = launch.reduction(layout, tile=TILE)
    partial = None
    if plan.parts > 1:
        partial = x.new_empty((plan.parts, 2, layout[1]), dtype=torch.float64)
    bits = launch.float_bits(grad_scale)
    launch.run(
        lsq_bwd_kernel,
        plan.programs,
        numeric.to_order(grad, order),
        flat,
        grad_x,
        scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(),
        grad_s,
        grad_z,
        partial,
        qmin,
        qmax,
        bits,
        plan.blocks,
        plan.steps,
        *plan.sizes,
        CLIP_VALUE=clip == "value",
        **plan.constants,
    )
    if partial is not None:
        finish(partial, bits, grad_s, grad_z)
    return launch.like(grad_x, x, group_size), grad_s, grad_z


def finish(partial: Tensor, grad_scale_bits: int, grad_s: Tensor, grad_z: Tensor) -> None:
    """The second stage of the reduction; partial is [parts, 2, channels]."""
    parts, _, channels = partial.shape
    programs, constants = launch.finishing(parts, channels, FINISH_TILE)
    launch.run(
        lsq_finish_kernel,
        programs,
        grad_s,
        grad_z,
        partial,
        grad_scale_bits,
        parts,
        channels,
        **constants,
    )
