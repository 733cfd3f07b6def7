"""Where the elements of a tile lie in memory, and the parameters of their channels."""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.backends.triton import launch
from qkernels.backends.triton.numeric import load_channel

SCALAR = tl.constexpr(launch.SCALAR)
ROW = tl.constexpr(launch.ROW)
STRADDLE = tl.constexpr(launch.STRADDLE)
ELEMENT = tl.constexpr(launch.ELEMENT)
GRID_ROWS = tl.constexpr(launch.ROWS)
COLUMNS = tl.constexpr(launch.COLUMNS)


@triton.jit
def locate(
    pid,
    outer,
    period,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tile [ROWS, GROUPS, 8] number pid, of [outer, period] in memory.

    -> (offset, whether it exists, row [ROWS], group of eight within the period [GROUPS])
    """
    blocks = ((period + 7) // 8 + GROUPS - 1) // GROUPS
    if WIDE:
        pid = pid.to(tl.int64)
    row = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    group = (pid % blocks) * GROUPS + tl.arange(0, GROUPS)
    position = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    offset = row[:, None, None] * period + position
    return offset, (row[:, None, None] < outer) & (position < period), row, group


@triton.jit
def locate_mask(outer, period, row, group):
    """-> (byte of the mask [ROWS, GROUPS], whether it exists)"""
    all_groups = (period + 7) // 8
    byte = row[:, None] * all_groups + group[None, :]
    return byte, (row[:, None] < outer) & (group[None, :] < all_groups)


@triton.jit
def load_params(
    scale_ptr,
    zero_point_ptr,
    row,
    group,
    qmin,
    qmax,
    outer,
    period,
    inner,
    channels,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
):
    """load_channel of the channels of a tile [ROWS, GROUPS, 8], each dim whole or 1."""
    first = group[None, :, None] * 8
    if MODE == SCALAR:
        channel = tl.zeros([1, 1, 1], tl.int32)
        known = channel == 0
    elif MODE == ROW:
        channel = row[:, None, None] % channels
        known = row[:, None, None] < outer
    elif MODE == ELEMENT:
        position = first + tl.arange(0, 8)[None, None, :]
        channel = position // inner
        known = position < period
    else:  # the channel of the first of eight elements
        channel = first // inner
        known = first < period
    here = channel % channels if WRAP else channel
    inv, scale, lo, hi = load_channel(scale_ptr, zero_point_ptr, here, known, qmin, qmax)
    if MODE == STRADDLE:  # a division for eight elements, not for each
        end = (channel + 1) * inner
        channel = (channel + 1) % channels if WRAP else channel + 1
        next_inv, next_scale, next_lo, next_hi = load_channel(
            scale_ptr, zero_point_ptr, channel, end < period, qmin, qmax
        )
        beyond = first + tl.arange(0, 8)[None, None, :] >= end
        inv, scale = tl.where(beyond, next_inv, inv), tl.where(beyond, next_scale, scale)
        lo, hi = tl.where(beyond, next_lo, lo), tl.where(beyond, next_hi, hi)
    return inv, scale, lo, hi


@triton.jit
def tile(
    block,
    step,
    channels,
    inner,
    n,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile [C, E] at element step * E of channel block * C -> (offset, whether it exists)."""
    if WIDE:
        block = block.to(tl.int64)
        step = step.to(tl.int64)
    c = (block * C + tl.arange(0, C))[:, None]
    e = (step * E + tl.arange(0, E))[None, :]
    if MODE == GRID_ROWS:
        offset = c * n + e
    elif MODE == COLUMNS:
        offset = e * channels + c
    else:
        offset = (e // inner) * (channels * inner) + c * inner + e % inner
    return offset, (c < channels) & (e < n)


@triton.jit
def mask_bytes(inside):
    """[.., 8] booleans -> bytes, the first is the lowest bit."""
    weights = 1 << tl.arange(0, 8)
    return tl.sum(tl.where(inside, weights, 0), axis=len(inside.shape) - 1).to(tl.uint8)
