"""What the noise kernels do with a tile. Formulas: reference/noise.py.

A row-major x is taken by quads, so that one Philox counter serves four elements. In any other
dense order each element works out its row-major index, and a counter of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.backends.triton import launch
from qkernels.backends.triton.numeric import double, narrow, widen
from qkernels.backends.triton.philox import LARGEST_SEED, gate, load_number, normal, uniform

SCALAR = tl.constexpr(launch.SCALAR)
GROUP = tl.constexpr(launch.GROUP)
STRADDLE = tl.constexpr(launch.STRADDLE)
DIFFERENTIAL, DROP_IN, UNIFORM = (tl.constexpr(i) for i in range(3))


@triton.jit
def row_major(m, size0, size1, size2, stride0, stride1, stride2, stride3):
    """The row-major index of the element at place m in memory; dim 0 is the fastest there."""
    i = (m % size0).to(tl.int64) * stride0
    m = m // size0
    i += (m % size1).to(tl.int64) * stride1
    m = m // size1
    return i + (m % size2).to(tl.int64) * stride2 + (m // size2).to(tl.int64) * stride3


@triton.jit
def spread(ptr, channel, known):
    """std or scale of the channels, NaN where it is not one."""
    s = tl.load(ptr + channel, mask=known, other=0.0)
    return tl.where((s >= 0) & (s < float("inf")), s, float("nan"))


@triton.jit
def center(ptr, channel, known):
    """mean of the channels, NaN where it is not finite."""
    m = tl.load(ptr + channel, mask=known, other=0.0)
    return tl.where(tl.abs(m) < float("inf"), m, float("nan"))


@triton.jit
def change(
    mean_ptr,
    std_ptr,
    prev_mean_ptr,
    prev_std_ptr,
    channel,
    known,
    place,
    seed,
    step,
    EACH: tl.constexpr,
):
    """delta_t - delta_{t-1} in the compute dtype; without previous statistics, of the present."""
    mean, std = center(mean_ptr, channel, known), spread(std_ptr, channel, known)
    delta = mean + std * normal(place, seed, step, EACH).to(std.dtype)
    if prev_mean_ptr is not None:
        mean, std = center(prev_mean_ptr, channel, known), spread(prev_std_ptr, channel, known)
    before = (step - 1) & LARGEST_SEED
    return delta - (mean + std * normal(place, seed, before, EACH).to(std.dtype))


@triton.jit
def noise_tile(
    pid,
    x_ptr,
    y_ptr,
    mean_ptr,
    std_ptr,
    prev_mean_ptr,
    prev_std_ptr,
    seed,
    step,
    offset,
    ramp_bits,
    threshold,
    numel,
    inner,
    channels,
    size0,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    stride3,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HEAD: tl.constexpr,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile pid of y = x + noise where the gate is open. HEAD is offset mod 4 if quads are taken:
    the first begins that many elements before x. seed and step are numbers or pointers to one."""
    if WIDE:
        pid = pid.to(tl.int64)
    group = (pid * GROUPS + tl.arange(0, GROUPS))[:, None]
    at = group * 8 + tl.arange(0, 8)[None, :] - HEAD
    exists = (at >= 0) & (at < numel)
    if MODE == SCALAR:
        channel = tl.zeros([1, 1], tl.int32)
        known = channel == 0
    elif MODE == GROUP:  # eight elements never cross a channel
        channel = (group * 8) // inner
        known = group * 8 < numel
    elif MODE == STRADDLE:  # a division for eight elements, not for each
        channel = (group * 8 - HEAD) // inner
        channel += (at >= (channel + 1) * inner).to(channel.dtype)
        known = exists
    else:
        channel = at // inner
        known = exists
    if WRAP:
        channel = channel % channels
    if EACH:
        place = row_major(at, size0, size1, size2, stride0, stride1, stride2, stride3)
        place += load_number(offset)
    else:
        place = (load_number(offset) >> 2) + (group * 2 + tl.arange(0, 2)[None, :])
    seed, step = load_number(seed), load_number(step)
    stored = tl.load(x_ptr + at, mask=exists, other=0.0)
    x = widen(stored)
    if KIND == UNIFORM:
        noise = spread(std_ptr, channel, known) * uniform(place, seed, step, EACH).to(x.dtype)
    elif KIND == DROP_IN:
        noise = spread(std_ptr, channel, known) * normal(place, seed, step, EACH).to(x.dtype)
        noise = (center(mean_ptr, channel, known) + noise) * double(ramp_bits).to(x.dtype)
    else:
        noise = change(
            mean_ptr,
            std_ptr,
            prev_mean_ptr,
            prev_std_ptr,
            channel,
            known,
            place,
            seed,
            step,
            EACH,
        ) * double(ramp_bits).to(x.dtype)
    y = narrow(x + noise, stored.dtype)
    if GATED:
        y = tl.where(gate(place, seed, step, threshold, EACH), y, stored)
    tl.store(y_ptr + at, y, mask=exists)
