"""Statistics of the quantization error of each channel. Formula: reference/error_stats.py.

One read of x; the error is never stored. The sums of e and e^2 are in fp64: the square of an fp32
number is exact there, so that neither an offset a thousand times the spread nor an outlier costs
digits, and none overflows that the mean of squares would not. GPUs for computing convert and add
faster than memory delivers x; on others, whose fp64 is slow, this bounds the kernel. The order is
fixed: within a program, then over the parts of a channel in a second small launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import tile
from qkernels.backends.triton.numeric import divide, double, load_channel, quantize_value, widen
from qkernels.backends.triton.quant_range import quant_range
from qkernels.ops._check import check_values

# a program keeps two doubles and a count for each element of its tile
TILE = launch.TILE // 2
# of the second stage, with three doubles for each
FINISH_TILE = launch.TILE // 4


@triton.jit
def follow(at, value, step, known):
    """An average takes a step towards a value."""
    average = tl.load(at, mask=known, other=0.0)
    tl.store(at, average + (value - average) * step, mask=known)


@triton.jit
def write_stats(
    stats_ptr, ema_ptr, c, channels, n, total, squares, clipped, rate_bits, C: tl.constexpr
):
    """Statistics of the channels c [C] from their sums in double; the moving average follows."""
    known = c < channels
    count = tl.zeros([C], tl.float64) + n
    mean = total / count
    var = squares / count - mean * mean
    var = tl.where(var < 0, 0.0, var)  # what rounding leaves of equal errors; NaN stays
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    at = stats_ptr + c
    s0, s1, s2 = mean.to(dtype), var.to(dtype), (mean * mean + var).to(dtype)
    s3 = (clipped / count).to(dtype)
    tl.store(at, s0, mask=known)
    tl.store(at + channels, s1, mask=known)
    tl.store(at + 2 * channels, s2, mask=known)
    tl.store(at + 3 * channels, s3, mask=known)
    if ema_ptr is not None:
        # what is not finite would stay in an average for good
        known = known & (tl.abs(s0) < float("inf")) & (s1 < float("inf")) & (s2 < float("inf"))
        rate = tl.zeros([C], dtype) + double(rate_bits).to(dtype)
        at = ema_ptr + c
        weight = tl.load(at + 4 * channels, mask=known, other=1.0)
        weight += (1.0 - weight) * rate
        tl.store(at + 4 * channels, weight, mask=known)
        step = divide(rate, weight)
        follow(at, s0, step, known)
        follow(at + channels, s1, step, known)
        follow(at + 2 * channels, s2, step, known)
        follow(at + 3 * channels, s3, step, known)


@triton.jit
def error_stats_part(
    pid,
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    partial_ptr,
    stats_ptr,
    ema_ptr,
    qmin,
    qmax,
    count,
    rate_bits,
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
    """Program pid: sums over one part of C channels of e, e^2 and clipped elements: to partial
    [parts, 3, channels] in double, or, without partial, the statistics themselves."""
    block = pid % blocks
    part = pid // blocks
    c = block * C + tl.arange(0, C)
    inv, scale, lo, hi = load_channel(scale_ptr, zero_point_ptr, c, c < channels, qmin, qmax)
    inv, scale, lo, hi = inv[:, None], scale[:, None], lo[:, None], hi[:, None]
    totals = tl.zeros([C, E], tl.float64)
    squares = tl.zeros([C, E], tl.float64)
    clipped = tl.zeros([C, E], tl.int32)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
        _t, q, inside = quantize_value(x, inv, lo, hi, CLIP_VALUE)
        e = tl.where(exists, q * scale - x, 0.0).to(tl.float64)
        totals += e
        squares += e * e
        clipped += (exists & ~inside).to(tl.int32)
    total, square = tl.sum(totals, axis=1), tl.sum(squares, axis=1)
    share = tl.sum(clipped, axis=1).to(tl.float64)
    if partial_ptr is not None:
        at = partial_ptr + part * 3 * channels + c
        tl.store(at, total, mask=c < channels)
        tl.store(at + channels, square, mask=c < channels)
        tl.store(at + 2 * channels, share, mask=c < channels)
    else:
        write_stats(stats_ptr, ema_ptr, c, channels, count, total, square, share, rate_bits, C)


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16; writes 24 a channel and part, 16 a
# channel
@triton.jit(do_not_specialize=["qmin", "qmax", "count", "rate_bits"])
def error_stats_kernel(
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    partial_ptr,
    stats_ptr,
    ema_ptr,
    qmin,
    qmax,
    count,
    rate_bits,
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
    error_stats_part(
        tl.program_id(0),
        x_ptr,
        scale_ptr,
        zero_point_ptr,
        partial_ptr,
        stats_ptr,
        ema_ptr,
        qmin,
        qmax,
        count,
        rate_bits,
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
def error_stats_finish_block(
    pid,
    stats_ptr,
    ema_ptr,
    partial_ptr,
    count,
    rate_bits,
    parts,
    channels,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Program pid: the sums over the parts, in their order, and what follows from them."""
    c = pid * C + tl.arange(0, C)
    totals = tl.zeros([P, C], tl.float64)
    squares = tl.zeros([P, C], tl.float64)
    clipped = tl.zeros([P, C], tl.float64)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)[:, None]
        at = partial_ptr + part * 3 * channels + c[None, :]
        exists = (part < parts) & (c < channels)[None, :]
        totals += tl.load(at, mask=exists, other=0.0)
        squares += tl.load(at + channels, mask=exists, other=0.0)
        clipped += tl.load(at + 2 * channels, mask=exists, other=0.0)
    total, square, share = tl.sum(totals, 0), tl.sum(squares, 0), tl.sum(clipped, 0)
    write_stats(stats_ptr, ema_ptr, c, channels, count, total, square, share, rate_bits, C)


# ideal bytes a channel: reads 24 a part, writes 16
@triton.jit(do_not_specialize=["count", "rate_bits", "parts"])
def error_stats_finish_kernel(
    stats_ptr,
    ema_ptr,
    partial_ptr,
    count,
    rate_bits,
    parts,
    channels,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """The second stage."""
    error_stats_finish_block(
        tl.program_id(0),
        stats_ptr,
        ema_ptr,
        partial_ptr,
        count,
        rate_bits,
        parts,
        channels,
        P,
        C,
    )


def error_stats(
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
) -> Tensor:
    """-> [4] or [4, channels]: mean, var, mean_square, clip_rate."""
    check_values("error_stats", scale, zero_point)
    return error_stats_unchecked(
        x, scale, zero_point, qmin, qmax, axis, group_size, clip, ema, decay
    )


def error_stats_unchecked(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None,
    decay: float,
) -> Tensor:
    """error_stats with a scale that is not the user's: an invalid channel is NaN, and no error."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    stats = x.new_empty((4, *shape), dtype=numeric.compute_dtype(x.dtype))
    flat, _, layout = numeric.plan(x, axis, group_size)
    outer, channels, inner = layout
    n, rate_bits = max(outer * inner, 1), launch.float_bits(1.0 - decay)
    if flat.numel() == 0:  # statistics of nothing are zeros, which the average follows too
        finish(x.new_empty((0, 3, channels), dtype=torch.float64), stats, ema, n, rate_bits)
        return stats
    plan = launch.reduction(layout, tile=TILE)
    partial = None
    if plan.parts > 1:
        partial = x.new_empty((plan.parts, 3, channels), dtype=torch.float64)
    launch.run(
        error_stats_kernel,
        plan.programs,
        flat,
        scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(),
        partial,
        stats,
        ema,
        qmin,
        qmax,
        n,
        rate_bits,
        plan.blocks,
        plan.steps,
        *plan.sizes,
        CLIP_VALUE=clip == "value",
        **plan.constants,
    )
    if partial is not None:
        finish(partial, stats, ema, n, rate_bits)
    return stats


def finish(partial: Tensor, stats: Tensor, ema: Tensor | None, n: int, rate_bits: int) -> None:
    """The second stage of the reduction; partial is [parts, 3, channels]."""
    parts, _, channels = partial.shape
    programs, constants = launch.finishing(parts, channels, FINISH_TILE)
    launch.run(
        error_stats_finish_kernel,
        programs,
        stats,
        ema,
        partial,
        n,
        rate_bits,
        parts,
        channels,
        **constants,
    )


def error_stats_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (statistics, scale, zero point as int32): those of x's own range, found in a read of x
    before theirs."""
    scale, zp, _ = quant_range(x, qmin, qmax, axis, group_size, symmetric, method, percentile)
    args = (x, scale, zp, qmin, qmax, axis, group_size, clip, ema, decay)
    return error_stats_unchecked(*args), scale, zp
