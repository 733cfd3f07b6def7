"""Noise added to a tensor in one pass. Formulas: reference/noise.py.

A row-major x is taken by quads, so that one Philox counter serves four elements. In any other
dense order each element works out its row-major index, and a counter of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.numeric import double, narrow, widen
from qkernels.backends.triton.philox import (
    LARGEST_SEED,
    as_number,
    gate,
    load_number,
    normal,
    uniform,
)
from qkernels.ops._noise import check_statistics

# two eights a thread: a draw needs too many registers for the tile of the cheaper kernels
TILE = launch.TILE // 2
# dims that the kernel can walk; a tensor with more, after merging, is copied
WALK_DIMS = 4

SCALAR = tl.constexpr(launch.SCALAR)
GROUP = tl.constexpr(launch.GROUP)
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


@triton.jit(do_not_specialize=["seed", "step", "offset", "ramp_bits", "threshold"])
def noise_kernel(
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
    """y = x + noise where the gate is open. HEAD is offset mod 4 if quads are taken: the first of
    them begins that many elements before x. seed and step are numbers or pointers to one."""
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    group = (pid * GROUPS + tl.arange(0, GROUPS))[:, None]
    at = group * 8 + tl.arange(0, 8)[None, :] - HEAD
    exists = (at >= 0) & (at < numel)
    if MODE == SCALAR:
        channel = tl.zeros([1, 1], tl.int32)
        known = channel == 0
    elif MODE == GROUP:  # eight elements never cross a channel
        channel = (group * 8) // inner
        known = group * 8 < numel
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


class Draw(NamedTuple):
    """What to add, other than the statistics: an op's arguments as the kernel takes them."""

    kind: tl.constexpr
    seed: int | Tensor
    step: int | Tensor
    offset: int
    ramp: float = 1.0
    threshold: int = 1 << 24  # a gate is open with probability threshold / 2^24


def add(
    x: Tensor,
    params: tuple[Tensor | None, ...],
    draw: Draw,
    axis: int | None,
    group_size: int | None,
    inplace: bool,
) -> Tensor:
    """x with noise, in x itself or like it. params: mean, std, previous mean and std, or None."""
    if draw.threshold == 0:
        return x if inplace else torch.empty_like(x).copy_(x)
    flat, order, layout = numeric.plan(x, axis, group_size)
    walk = numeric.logical_walk(flat) if order else []
    moved = group_size is not None  # whether flat may have another order than x
    if len(walk) > WALK_DIMS:
        walk, flat, moved = [], flat.contiguous(), True
        layout = numeric.layout_of(x.shape, [], axis, None)
    # a copy is ours to write to
    y = flat if inplace or flat is not x else torch.empty_like(x)
    launch_noise(flat, y, params, draw, layout, walk)
    if inplace:
        return x if y is x else x.copy_(y)
    return torch.empty_like(x).copy_(y) if moved and flat is not x else y


def launch_noise(
    flat: Tensor,
    y: Tensor,
    params: tuple[Tensor | None, ...],
    draw: Draw,
    layout: numeric.Layout,
    walk: list[tuple[int, int]],
) -> None:
    """One launch over a dense tensor; walk is empty for a row-major one."""
    outer, channels, inner = launch.simplified(layout)
    head = 0 if walk else draw.offset % 4
    groups = launch.ceil_div(flat.numel() + head, 8) if flat.numel() else 0
    block = min(TILE // 8, launch.power_of_two(groups))
    whole = inner % 8 == 0 and head == 0
    sizes, strides = walk_arguments(walk)
    launch.run(
        noise_kernel,
        launch.ceil_div(groups, block),
        flat,
        y,
        *(None if p is None else p.contiguous() for p in params),
        draw.seed,
        draw.step,
        as_number(draw.offset),
        launch.float_bits(draw.ramp),
        draw.threshold,
        flat.numel(),
        inner,
        channels,
        *sizes,
        *strides,
        KIND=draw.kind.value,
        GATED=draw.threshold < 1 << 24,
        HEAD=head,
        MODE=launch.SCALAR if channels == 1 else launch.GROUP if whole else launch.ELEMENT,
        WRAP=outer > 1,
        EACH=bool(walk),
        GROUPS=block,
        WIDE=launch.is_wide(flat.numel()),
    )


def number(value: int, at: Tensor | None) -> int | Tensor:
    """A seed or step as the kernel takes it."""
    return as_number(value) if at is None else at


def walk_arguments(walk: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(sizes of the three fastest dims in memory, row-major strides of four), fastest first."""
    dims = [*reversed(walk), *[(1, 0)] * (WALK_DIMS - len(walk))]
    return [size for size, _ in dims[:-1]], [stride for _, stride in dims]


def differential_noise(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    prev_mean: Tensor | None,
    prev_std: Tensor | None,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    ramp: float,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> Tensor:
    """-> y; without previous statistics they are the present ones."""
    check_statistics("differential_noise", x, mean, std, prev_mean, prev_std)
    params: tuple[Tensor | None, ...] = (mean, std, None, None)
    if prev_mean is not None and prev_std is not None:
        params = (mean, std, prev_mean, prev_std)
    draw = Draw(DIFFERENTIAL, number(seed, seed_at), number(step, step_at), offset, ramp)
    return add(x, params, draw, axis, group_size, inplace)


def drop_in_noise(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    p: float,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    ramp: float,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> Tensor:
    """-> y."""
    check_statistics("drop_in_noise", x, mean, std)
    counter = (number(seed, seed_at), number(step, step_at), offset)
    draw = Draw(DROP_IN, *counter, ramp, numeric.gate_threshold(p))
    return add(x, (mean, std, None, None), draw, axis, group_size, inplace)


def uniform_noise(
    x: Tensor,
    scale: Tensor,
    p: float,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> Tensor:
    """-> y."""
    check_statistics("uniform_noise", x, scale)
    counter = (number(seed, seed_at), number(step, step_at), offset)
    draw = Draw(UNIFORM, *counter, threshold=numeric.gate_threshold(p))
    return add(x, (None, scale, None, None), draw, axis, group_size, inplace)
