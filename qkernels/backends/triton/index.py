"""Where the elements of a tile lie in memory, and which channel they belong to."""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.backends.triton import launch

SCALAR = tl.constexpr(launch.SCALAR)
ROW = tl.constexpr(launch.ROW)
GROUP = tl.constexpr(launch.GROUP)
GRID_ROWS = tl.constexpr(launch.ROWS)
COLUMNS = tl.constexpr(launch.COLUMNS)


@triton.jit
def locate(
    outer,
    period,
    inner,
    channels,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tile [ROWS, GROUPS, 8] of this program, of [outer, period] in memory.

    -> (offset, whether it exists, channel [1 or ROWS, 1 or GROUPS, 1 or 8], whether that exists,
        byte of the mask [ROWS, GROUPS], whether it exists)
    """
    all_groups = (period + 7) // 8
    blocks = (all_groups + GROUPS - 1) // GROUPS
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    row = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    group = (pid % blocks) * GROUPS + tl.arange(0, GROUPS)
    position = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    offset = row[:, None, None] * period + position
    exists = (row[:, None, None] < outer) & (position < period)
    if MODE == SCALAR:
        channel = tl.zeros([1, 1, 1], tl.int32)
        known = channel == 0
    elif MODE == ROW:
        channel = row[:, None, None] % channels
        known = row[:, None, None] < outer
    elif MODE == GROUP:
        first = group[None, :, None] * 8  # eight elements never cross a channel
        channel = first // inner
        known = first < period
    else:
        channel = position // inner
        known = position < period
    if WRAP:
        channel = channel % channels
    byte = row[:, None] * all_groups + group[None, :]
    in_mask = (row[:, None] < outer) & (group[None, :] < all_groups)
    return offset, exists, channel, known, byte, in_mask


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
