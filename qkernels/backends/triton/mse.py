"""The MSE search of quant_range: every tile is read once and tried against all candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import tile
from qkernels.backends.triton.numeric import (
    is_nan,
    make_channel,
    mse_shrink,
    quantize_value,
    range_to_qparams,
    store_range,
    widen,
)
from qkernels.numeric import Layout

CANDIDATES = tl.constexpr(numeric.MSE_CANDIDATES)
# candidates as a block, whose size must be a power of two
SLOTS = tl.constexpr(launch.power_of_two(numeric.MSE_CANDIDATES))
# a program keeps MOST_CHANNELS * SLOTS sums in registers
MOST_CHANNELS = 16


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16, once for all candidates, whose
# arithmetic is what takes the time
@triton.jit(do_not_specialize=["qmin", "qmax"])
def mse_kernel(
    x_ptr,
    range_ptr,
    error_ptr,
    qmin,
    qmax,
    blocks,
    steps,
    channels,
    inner,
    n,
    SYMMETRIC: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Squared errors of all candidates over one part of C channels, to [parts, channels, SLOTS]."""
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    c = block * C + tl.arange(0, C)
    slot = tl.arange(0, SLOTS)[None, :]
    lo = tl.load(range_ptr + c, mask=c < channels, other=0.0)
    hi = tl.load(range_ptr + channels + c, mask=c < channels, other=0.0)
    errors = tl.zeros([C, SLOTS], tl.float64)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
        for k in range(CANDIDATES):
            shrink = mse_shrink(k, lo.dtype)
            scale, zp = range_to_qparams(lo * shrink, hi * shrink, qmin, qmax, SYMMETRIC)
            inv, scale, low, high = make_channel(scale, zp.to(lo.dtype), qmin, qmax)
            _t, q, _inside = quantize_value(x, inv[:, None], low[:, None], high[:, None], False)
            e = tl.where(exists, q * scale[:, None] - x, 0.0).to(tl.float64)
            errors = tl.where(slot == k, errors + tl.sum(e * e, axis=1)[:, None], errors)
    at = error_ptr + (part * channels + c[:, None]).to(tl.int64) * SLOTS + slot
    tl.store(at, errors, mask=(c < channels)[:, None])


# ideal bytes a channel: reads 8 * SLOTS a part, writes 16
@triton.jit(do_not_specialize=["parts", "qmin", "qmax"])
def mse_finish_kernel(
    error_ptr,
    minmax_ptr,
    scale_ptr,
    zero_point_ptr,
    range_ptr,
    parts,
    qmin,
    qmax,
    channels,
    SYMMETRIC: tl.constexpr,
    C: tl.constexpr,
):
    """The range of the first candidate with the least error, of the shrunk min-max range."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    slot = tl.arange(0, SLOTS)[None, :]
    known = (c < channels)[:, None] & (slot < CANDIDATES)
    errors = tl.zeros([C, SLOTS], tl.float64)
    for part in range(parts):
        at = error_ptr + (part * channels + c[:, None]).to(tl.int64) * SLOTS + slot
        errors += tl.load(at, mask=known, other=0.0)
    infinity = float("inf")
    # an error of NaN or infinity is never less, and then the min-max range stays
    errors = tl.where(known & ~is_nan(errors), errors, infinity)
    least = tl.min(errors, axis=1)[:, None]
    best = tl.min(tl.where((errors == least) & (least < infinity), slot, SLOTS), axis=1)
    best = tl.where(best < CANDIDATES, best, 0)
    lo = tl.load(minmax_ptr + c, mask=c < channels, other=0.0)
    hi = tl.load(minmax_ptr + channels + c, mask=c < channels, other=0.0)
    shrink = mse_shrink(best, lo.dtype)
    lo, hi = lo * shrink, hi * shrink
    store_range(scale_ptr, zero_point_ptr, range_ptr, c, channels, lo, hi, qmin, qmax, SYMMETRIC)


def mse_range(
    flat: Tensor, layout: Layout, minmax: Tensor, out: tuple[Tensor, Tensor, Tensor], rest: tuple
) -> None:
    """Fill out = (scale, zero point, range) with the best of the shrunk min-max range."""
    qmin, qmax, symmetric = rest
    plan = launch.reduction(layout, most_channels=MOST_CHANNELS)
    _, channels, _ = layout
    errors = flat.new_empty((plan.parts, channels, SLOTS.value), dtype=torch.float64)
    launch.run(
        mse_kernel,
        plan.programs,
        flat,
        minmax,
        errors,
        qmin,
        qmax,
        plan.blocks,
        plan.steps,
        *plan.sizes,
        SYMMETRIC=symmetric,
        **plan.constants,
    )
    block = min(4, launch.power_of_two(channels))
    launch.run(
        mse_finish_kernel,
        launch.ceil_div(channels, block),
        errors,
        minmax,
        *out,
        plan.parts,
        qmin,
        qmax,
        channels,
        SYMMETRIC=symmetric,
        C=block,
    )
