"""Percentile bounds of quant_range: exact order statistics by selection on ordered integer keys.

A channel that fits in a tile is read once and its keys are bisected bit by bit in registers. A
longer one is read once per digit of four bits: every program counts the digits of its part, and a
second small launch follows the rank into one digit. Nothing is sorted, nothing is read by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import tile
from qkernels.backends.triton.keys import bound, to_key
from qkernels.backends.triton.numeric import is_nan, store_range, widen
from qkernels.numeric import Layout

# keys of a channel that one program of eight warps holds in registers, 32 a thread
HELD = 8192
DIGIT_BITS = 4
DIGITS = tl.constexpr(1 << DIGIT_BITS)
# of a channel, as int64: the digits found and the rank among the keys that begin so, for the lower
# and the upper bound; then whether the next key in order is equal
STATE = tl.constexpr(6)

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def bisect(key, exists, k, BITS: tl.constexpr):
    """Keys [C, E] -> (the k-th least, the one after it), [C] each."""
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    NAN: tl.constexpr = (1 << BITS) - 1
    found = tl.zeros([key.shape[0], 1], KEY)
    one = tl.full([1, 1], 1, KEY)
    for i in range(BITS):
        candidate = found | (one << (BITS - 1 - i))
        below = tl.sum(((key < candidate) & exists).to(tl.int32), axis=1)[:, None]
        found = tl.where(below <= k, candidate, found)
    upto = tl.sum(((key <= found) & exists).to(tl.int32), axis=1)
    above = tl.min(tl.where((key > found) & exists, key, tl.full([1, 1], NAN, KEY)), axis=1)
    found = tl.max(found, axis=1)
    return found, tl.where(upto > k + 1, found, above)


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16
@triton.jit(do_not_specialize=["lo_k", "lo_w", "hi_k", "hi_w", "qmin", "qmax"])
def percentile_held_kernel(
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    range_ptr,
    lo_k,
    lo_w,
    hi_k,
    hi_w,
    qmin,
    qmax,
    channels,
    inner,
    n,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All of the percentile method for C channels of at most E elements."""
    block = tl.program_id(0)
    c = block * C + tl.arange(0, C)
    offset, exists = tile(block, block * 0, channels, inner, n, C, E, MODE, WIDE)
    x = tl.load(x_ptr + offset, mask=exists, other=0.0)
    key = to_key(x, BITS)
    nan = tl.max((exists & is_nan(widen(x))).to(tl.int32), axis=1) != 0
    a, b = bisect(key, exists, lo_k, BITS)
    lo = bound(a, b, lo_w, nan, x.dtype, BITS)
    a, b = bisect(key, exists, hi_k, BITS)
    hi = bound(a, b, hi_w, nan, x.dtype, BITS)
    store_range(scale_ptr, zero_point_ptr, range_ptr, c, channels, lo, hi, qmin, qmax, SYMMETRIC)


# ideal bytes an element: reads 4 in fp32, in each of eight launches; 2 in fp16 and bf16, in four
@triton.jit(do_not_specialize=["shift"])
def digits_kernel(
    x_ptr,
    state_ptr,
    count_ptr,
    shift,
    blocks,
    steps,
    channels,
    inner,
    n,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Counts of the digit at `shift` over one part of a channel, to [parts, channels, 2, DIGITS].

    Keys that begin as the lower bound's go into the first row, else those that begin as the upper
    bound's into the second; while both begin alike the first row is that of both.
    """
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    bins = tl.arange(0, 2 * DIGITS)
    counts = tl.zeros([2 * DIGITS], tl.int32)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        key = to_key(tl.load(x_ptr + offset, mask=exists, other=0.0), BITS)
        high = key >> shift.to(KEY)
        digit = (high & (DIGITS - 1)).to(tl.int32)
        if FIRST:
            as_lo = exists
            as_hi = exists
        else:
            high = high // DIGITS
            as_lo = exists & (high == tl.load(state_ptr + block * STATE).to(KEY))
            as_hi = exists & (high == tl.load(state_ptr + block * STATE + 1).to(KEY))
        digit = tl.where(as_lo, digit, tl.where(as_hi, digit + DIGITS, 0))
        missed = tl.sum(tl.where(as_lo | as_hi, 0, 1), axis=1)
        # what does not count was put in bin 0 and is taken out again
        counted = tl.histogram(tl.reshape(digit, [E]), 2 * DIGITS)
        counts += counted - tl.where(bins == 0, tl.max(missed, axis=0), 0)
    tl.store(count_ptr + (part * channels + block).to(tl.int64) * (2 * DIGITS) + bins, counts)


@triton.jit
def follow(counts, rank):
    """-> (the digit that holds the key of this rank, its rank within, whether the next is equal)"""
    row = tl.arange(0, DIGITS)[:, None]
    column = tl.arange(0, DIGITS)[None, :]
    below = tl.sum(tl.where(column < row, counts[None, :], 0), axis=1)
    digit = tl.sum((below + counts <= rank).to(tl.int64), axis=0)
    chosen = tl.arange(0, DIGITS) == digit
    rank -= tl.sum(tl.where(chosen, below, 0), axis=0)
    here = tl.sum(tl.where(chosen, counts, 0), axis=0)
    return digit, rank, (rank + 1 < here).to(tl.int64)


# ideal bytes a channel: reads 128 a part
@triton.jit(do_not_specialize=["lo_k", "hi_k", "parts"])
def select_kernel(
    count_ptr,
    state_ptr,
    next_ptr,
    lo_k,
    hi_k,
    parts,
    channels,
    FIRST: tl.constexpr,
    P: tl.constexpr,
):
    """Append the next digit to both bounds of a channel, from one state to the next."""
    channel = tl.program_id(0)
    digit = tl.arange(0, DIGITS)[None, :]
    lo_counts = tl.zeros([P, DIGITS], tl.int64)
    hi_counts = tl.zeros([P, DIGITS], tl.int64)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)[:, None]
        at = count_ptr + (part * channels + channel).to(tl.int64) * (2 * DIGITS) + digit
        lo_counts += tl.load(at, mask=part < parts, other=0)
        hi_counts += tl.load(at + DIGITS, mask=part < parts, other=0)
    lo_counts = tl.sum(lo_counts, axis=0)
    hi_counts = tl.sum(hi_counts, axis=0)
    state = state_ptr + channel * STATE
    if FIRST:
        lo_begin = tl.full([], 0, tl.int64)
        hi_begin = lo_begin
        lo_rank = lo_k.to(tl.int64)
        hi_rank = hi_k.to(tl.int64)
    else:
        lo_begin = tl.load(state)
        hi_begin = tl.load(state + 1)
        lo_rank = tl.load(state + 2)
        hi_rank = tl.load(state + 3)
    hi_counts = tl.where(lo_begin == hi_begin, lo_counts, hi_counts)
    lo_digit, lo_rank, lo_tied = follow(lo_counts, lo_rank)
    hi_digit, hi_rank, hi_tied = follow(hi_counts, hi_rank)
    after = next_ptr + channel * STATE
    tl.store(after, lo_begin * DIGITS + lo_digit)
    tl.store(after + 1, hi_begin * DIGITS + hi_digit)
    tl.store(after + 2, lo_rank)
    tl.store(after + 3, hi_rank)
    tl.store(after + 4, lo_tied)
    tl.store(after + 5, hi_tied)


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16
@triton.jit
def above_kernel(
    x_ptr,
    state_ptr,
    above_ptr,
    blocks,
    steps,
    channels,
    inner,
    n,
    BITS: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The least keys above both found ones and the greatest key, over one part of a channel, to
    [parts, channels, 3]."""
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    lo = tl.load(state_ptr + block * STATE).to(KEY)
    hi = tl.load(state_ptr + block * STATE + 1).to(KEY)
    above_lo = tl.full([C, E], (1 << BITS) - 1, KEY)
    above_hi = above_lo
    greatest = tl.zeros([C, E], KEY)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        key = to_key(tl.load(x_ptr + offset, mask=exists, other=0.0), BITS)
        above_lo = tl.where(exists & (key > lo) & (key < above_lo), key, above_lo)
        above_hi = tl.where(exists & (key > hi) & (key < above_hi), key, above_hi)
        greatest = tl.where(exists & (key > greatest), key, greatest)
    one = tl.arange(0, C)
    at = above_ptr + (part * channels + block + one).to(tl.int64) * 3
    tl.store(at, tl.min(above_lo, axis=1).to(tl.int64))
    tl.store(at + 1, tl.min(above_hi, axis=1).to(tl.int64))
    tl.store(at + 2, tl.max(greatest, axis=1).to(tl.int64))


# ideal bytes a channel: reads 24 a part, writes 16
@triton.jit(do_not_specialize=["lo_w", "hi_w", "parts", "qmin", "qmax"])
def percentile_finish_kernel(
    above_ptr,
    state_ptr,
    scale_ptr,
    zero_point_ptr,
    range_ptr,
    lo_w,
    hi_w,
    parts,
    qmin,
    qmax,
    channels,
    DTYPE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
):
    """Bounds and parameters of a channel from its state and the keys above."""
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    channel = tl.program_id(0)
    above_lo = tl.full([1, P], (1 << BITS) - 1, KEY)
    above_hi = above_lo
    greatest = tl.zeros([1, P], KEY)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)[None, :]
        exists = part < parts
        at = above_ptr + (part * channels + channel).to(tl.int64) * 3
        key = tl.load(at, mask=exists, other=-1).to(KEY)
        above_lo = tl.where(exists & (key < above_lo), key, above_lo)
        key = tl.load(at + 1, mask=exists, other=-1).to(KEY)
        above_hi = tl.where(exists & (key < above_hi), key, above_hi)
        key = tl.load(at + 2, mask=exists, other=0).to(KEY)
        greatest = tl.where(key > greatest, key, greatest)
    nan = tl.max(greatest, axis=1) == (1 << BITS) - 1
    c = channel + tl.arange(0, 1)
    state = state_ptr + c * STATE
    key = tl.load(state).to(KEY)
    after = tl.where(tl.load(state + 4) != 0, key, tl.min(above_lo, axis=1))
    lo = bound(key, after, lo_w, nan, DTYPE, BITS)
    key = tl.load(state + 1).to(KEY)
    after = tl.where(tl.load(state + 5) != 0, key, tl.min(above_hi, axis=1))
    hi = bound(key, after, hi_w, nan, DTYPE, BITS)
    store_range(scale_ptr, zero_point_ptr, range_ptr, c, channels, lo, hi, qmin, qmax, SYMMETRIC)


def percentile_range(
    flat: Tensor, layout: Layout, percentile: float, out: tuple[Tensor, Tensor, Tensor], rest: tuple
) -> None:
    """Fill out = (scale, zero point, range); rest is (qmin, qmax, symmetric)."""
    layout = launch.simplified(layout)
    outer, channels, inner = layout
    n = outer * inner
    if outer > 1 and max(1, HELD // launch.power_of_two(n)) * inner < launch.RUN:
        # scattered reads, many times over, would cost more than one copy
        flat = flat.as_strided(layout, (channels * inner, inner, 1)).transpose(0, 1).contiguous()
        layout = (1, channels, n)
    (lo_k, lo_w), (hi_k, hi_w) = numeric.percentile_ranks(percentile, n)
    ranks = (lo_k, launch.float_bits(lo_w), hi_k, launch.float_bits(hi_w))
    if n <= HELD:
        held(flat, layout, ranks, out, rest)
    else:
        select(flat, layout, ranks, out, rest)


def held(flat: Tensor, layout: Layout, ranks: tuple, out: tuple, rest: tuple) -> None:
    """Channels that fit in a tile."""
    qmin, qmax, symmetric = rest
    plan = launch.reduction(layout, tile=HELD)
    launch.run(
        percentile_held_kernel,
        plan.programs,
        flat,
        *out,
        *ranks,
        qmin,
        qmax,
        *plan.sizes,
        SYMMETRIC=symmetric,
        BITS=flat.element_size() * 8,
        num_warps=8,
        **plan.constants,
    )


def select(flat: Tensor, layout: Layout, ranks: tuple, out: tuple, rest: tuple) -> None:
    """Channels of any length, digit by digit."""
    qmin, qmax, symmetric = rest
    lo_k, lo_w, hi_k, hi_w = ranks
    _, channels, _ = layout
    bits = flat.element_size() * 8
    plan = launch.reduction(layout, most_channels=1)
    parts = plan.parts
    # the digits found so far, and where the next launch puts them with one more
    state, after = flat.new_empty((2, channels, STATE.value), dtype=torch.int64)
    counts = flat.new_empty((parts, channels, 2 * DIGITS.value), dtype=torch.int32)
    above = flat.new_empty((parts, channels, 3), dtype=torch.int64)
    block = min(launch.power_of_two(parts), 64)
    where = (plan.blocks, plan.steps, *plan.sizes)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        first = shift == bits - DIGIT_BITS
        constants = {"FIRST": first, "BITS": bits, **plan.constants}
        launch.run(digits_kernel, plan.programs, flat, state, counts, shift, *where, **constants)
        args = (counts, state, after, lo_k, hi_k, parts, channels)
        launch.run(select_kernel, channels, *args, FIRST=first, P=block)
        state, after = after, state
    launch.run(above_kernel, plan.programs, flat, state, above, *where, BITS=bits, **plan.constants)
    launch.run(
        percentile_finish_kernel,
        channels,
        above,
        state,
        *out,
        lo_w,
        hi_w,
        parts,
        qmin,
        qmax,
        channels,
        DTYPE=DTYPES[flat.dtype],
        SYMMETRIC=symmetric,
        BITS=bits,
        P=block,
    )
