"""Range, scale and zero point of a tensor, per channel. Formulas: reference/quant_range.py.

Min-max and mean|x| come of one read in two stages, in a fixed order. The percentile and the MSE
search have modules of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import tile
from qkernels.backends.triton.mse import mse_range
from qkernels.backends.triton.numeric import (
    at_least_smallest,
    compensated_add,
    double,
    is_nan,
    range_to_qparams,
    row_sum,
    store_range,
    widen,
)
from qkernels.backends.triton.percentile import percentile_range
from qkernels.numeric import Layout


@triton.jit
def lsq_scale(mean_abs, zero_point, qmin, qmax, SYMMETRIC: tl.constexpr):
    """2 mean|x| / sqrt(Qp) in double."""
    if SYMMETRIC:
        qp = tl.zeros_like(zero_point) + tl.maximum(qmax, 1)
    else:
        qp = tl.maximum(qmax - zero_point, zero_point - qmin)
    return 2.0 * mean_abs / tl.sqrt(qp.to(tl.float64))


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16; writes 8 (+ 8 of a sum) a channel and
# part
@triton.jit
def minmax_kernel(
    x_ptr,
    bounds_ptr,
    sums_ptr,
    blocks,
    steps,
    channels,
    inner,
    n,
    C: tl.constexpr,
    E: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Min and max over one part of C channels to bounds [parts, 2, channels], NaN if one is there;
    the sum of |x| to sums [parts, channels] unless that is None."""
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    dtype: tl.constexpr = bounds_ptr.dtype.element_ty
    lo = tl.full([C, E], float("inf"), dtype)
    hi = tl.full([C, E], float("-inf"), dtype)
    nans = tl.zeros([C, E], tl.int32)
    total = tl.zeros([C, E], dtype)
    lost = tl.zeros([C, E], dtype)
    for i in range(steps):
        offset, exists = tile(block, part * steps + i, channels, inner, n, C, E, MODE, WIDE)
        x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
        lo = tl.where(exists & (x < lo), x, lo)
        hi = tl.where(exists & (x > hi), x, hi)
        nans = tl.where(is_nan(x), 1, nans)
        if sums_ptr is not None:
            total, lost = compensated_add(total, lost, tl.abs(x))
    nan = tl.max(nans, axis=1) != 0
    c = block * C + tl.arange(0, C)
    at = bounds_ptr + part * 2 * channels + c
    tl.store(at, tl.where(nan, float("nan"), tl.min(lo, axis=1)), mask=c < channels)
    tl.store(at + channels, tl.where(nan, float("nan"), tl.max(hi, axis=1)), mask=c < channels)
    if sums_ptr is not None:
        tl.store(sums_ptr + part * channels + c, row_sum(total, lost), mask=c < channels)


# ideal bytes a channel: reads 8 (+ 8 of a sum) a part, writes 16
@triton.jit(do_not_specialize=["n", "parts", "qmin", "qmax"])
def minmax_finish_kernel(
    bounds_ptr,
    sums_ptr,
    scale_ptr,
    zero_point_ptr,
    range_ptr,
    n,
    parts,
    qmin,
    qmax,
    channels,
    SYMMETRIC: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """The parts together, in their order; with sums, LSQ's scale in place of the range's."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    dtype: tl.constexpr = bounds_ptr.dtype.element_ty
    lo = tl.full([P, C], float("inf"), dtype)
    hi = tl.full([P, C], float("-inf"), dtype)
    nans = tl.zeros([P, C], tl.int32)
    total = tl.zeros([P, C], tl.float64)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P)[:, None]
        exists = (part < parts) & (c < channels)[None, :]
        at = part * 2 * channels + c[None, :]
        low = tl.load(bounds_ptr + at, mask=exists, other=float("inf"))
        high = tl.load(bounds_ptr + at + channels, mask=exists, other=float("-inf"))
        lo = tl.where(low < lo, low, lo)
        hi = tl.where(high > hi, high, hi)
        nans = tl.where(is_nan(low), 1, nans)
        if sums_ptr is not None:
            at = part * channels + c[None, :]
            total += tl.load(sums_ptr + at, mask=exists, other=0.0)
    nan = tl.max(nans, axis=0) != 0
    least = tl.where(nan, float("nan"), tl.min(lo, axis=0))
    most = tl.where(nan, float("nan"), tl.max(hi, axis=0))
    scale, zero_point = range_to_qparams(least, most, qmin, qmax, SYMMETRIC)
    if sums_ptr is not None:
        mean = tl.sum(total, axis=0) / n.to(tl.float64)
        scale = at_least_smallest(lsq_scale(mean, zero_point, qmin, qmax, SYMMETRIC).to(dtype))
    known = c < channels
    tl.store(scale_ptr + c, scale, mask=known)
    tl.store(zero_point_ptr + c, zero_point, mask=known)
    tl.store(range_ptr + c, least, mask=known)
    tl.store(range_ptr + channels + c, most, mask=known)


@triton.jit
def moved_bound(running, observed, started, weight):
    """See reference/quant_range.py::moved_range."""
    delta = observed - running
    delta = tl.where(delta - delta == 0, delta, 0.0)
    return running + tl.where(started, weight, 1.0) * delta


# ideal bytes a channel: reads 8, writes 8; with a running range twice that
@triton.jit(do_not_specialize=["qmin", "qmax", "weight_bits"])
def qparams_kernel(
    range_ptr,
    scale_ptr,
    zero_point_ptr,
    running_ptr,
    qmin,
    qmax,
    weight_bits,
    channels,
    SYMMETRIC: tl.constexpr,
    C: tl.constexpr,
):
    """Bounds [2, channels] -> scale and zero point, of the running range if there is one."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    lo = tl.load(range_ptr + c, mask=c < channels, other=0.0)
    hi = tl.load(range_ptr + channels + c, mask=c < channels, other=0.0)
    if running_ptr is not None:
        old_lo = tl.load(running_ptr + c, mask=c < channels, other=0.0)
        old_hi = tl.load(running_ptr + channels + c, mask=c < channels, other=0.0)
        started = (old_lo != 0) | (old_hi != 0)
        weight = tl.zeros([C], lo.dtype) + double(weight_bits).to(lo.dtype)
        lo = moved_bound(old_lo, lo, started, weight)
        hi = moved_bound(old_hi, hi, started, weight)
    store_range(scale_ptr, zero_point_ptr, running_ptr, c, channels, lo, hi, qmin, qmax, SYMMETRIC)


def qparams(
    range: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    running: Tensor | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """range [2, ...] -> (scale, zero point as int32), each of shape [...]; running (without gaps)
    moves by range."""
    shape = range.shape[1:]
    scale, zero_point = range.new_empty(shape), range.new_empty(shape, dtype=torch.int32)
    channels = shape.numel()
    launch.run(
        qparams_kernel,
        launch.ceil_div(channels, 256),
        range.contiguous(),
        scale,
        zero_point,
        running,
        qmin,
        qmax,
        launch.float_bits(weight),
        channels,
        SYMMETRIC=symmetric,
        C=256,
    )
    return scale, zero_point


def minmax_parts(flat: Tensor, layout: Layout, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """First stage: (bounds [parts, 2, channels], sums of |x| [parts, channels] or None)."""
    plan = launch.reduction(layout)
    compute = numeric.compute_dtype(flat.dtype)
    _, channels, _ = layout
    bounds = flat.new_empty((plan.parts, 2, channels), dtype=compute)
    sums = None
    if with_sums:
        sums = flat.new_empty((plan.parts, channels), dtype=torch.float64)
    launch.run(
        minmax_kernel,
        plan.programs,
        flat,
        bounds,
        sums,
        plan.blocks,
        plan.steps,
        *plan.sizes,
        **plan.constants,
    )
    return bounds, sums


def minmax_finish(
    bounds: Tensor, sums: Tensor | None, out: tuple[Tensor, Tensor, Tensor], n: int, rest: tuple
) -> None:
    """Second stage: scale, zero point and range from the parts; rest is (qmin, qmax, symmetric)."""
    parts, _, channels = bounds.shape
    qmin, qmax, symmetric = rest
    programs, constants = launch.finishing(parts, channels, launch.TILE // 2)
    launch.run(
        minmax_finish_kernel,
        programs,
        bounds,
        sums,
        *out,
        n,
        parts,
        qmin,
        qmax,
        channels,
        SYMMETRIC=symmetric,
        **constants,
    )


def quant_range(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (scale, zero point as int32, range [2, ...]), one entry per channel (0-dim per tensor)."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    compute = numeric.compute_dtype(x.dtype)
    out = (
        x.new_empty(shape, dtype=compute),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((2, *shape), dtype=compute),
    )
    flat, _, layout = numeric.plan(x, axis, group_size)
    if flat.numel() == 0:  # nothing to look at: as for zeros
        _, channels, _ = layout
        layout = (1, channels, 1)
        flat = x.new_zeros(channels)
    rest = (qmin, qmax, symmetric)
    if method == "percentile":
        percentile_range(flat, layout, percentile, out, rest)
        return out
    outer, _, inner = layout
    bounds, sums = minmax_parts(flat, layout, method == "lsq")
    scale, zero_point, best = out
    range = torch.empty_like(best) if method == "mse" else best
    minmax_finish(bounds, sums, (scale, zero_point, range), outer * inner, rest)
    if method == "mse":
        mse_range(flat, layout, range, out, rest)
    return out
