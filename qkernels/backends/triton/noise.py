"""Noise added to a tensor in one pass. Formulas: reference/noise.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.noise_tile import DIFFERENTIAL, DROP_IN, UNIFORM, noise_tile
from qkernels.backends.triton.philox import as_number
from qkernels.ops._noise import check_statistics

# two eights a thread: a draw needs too many registers for the tile of the cheaper kernels
TILE = launch.TILE // 2
# dims that the kernel can walk; a tensor with more, after merging, is copied
WALK_DIMS = 4


# ideal bytes an element: reads 4, writes 4 in fp32; 2 and 2 in fp16 and bf16. A counter costs 40
# multiplications: a draw takes one for four elements (row-major) or one (else), the differential
# noise draws twice
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
    """A tile a program."""
    noise_tile(
        tl.program_id(0),
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
        KIND,
        GATED,
        HEAD,
        MODE,
        WRAP,
        EACH,
        GROUPS,
        WIDE,
    )


class Draw(NamedTuple):
    """What to add, other than the statistics: an op's arguments as the kernel takes them."""

    kind: tl.constexpr
    seed: int | Tensor
    step: int | Tensor
    offset: int
    ramp: float = 1.0
    threshold: int = 1 << 24  # a gate is open with probability threshold / 2^24


# of `add`
Arguments = tuple[Tensor, tuple[Tensor | None, ...], Draw, int | None, int | None, bool]


class Place(NamedTuple):
    """Where the noise goes: dense memory, its layout, and how logical indices walk through it."""

    flat: Tensor
    y: Tensor
    layout: numeric.Layout
    walk: list[tuple[int, int]]  # empty for a row-major one
    moved: bool  # whether flat may have another order than x


def placed(x: Tensor, axis: int | None, group_size: int | None, inplace: bool) -> Place:
    """The dense form of x, and memory for the result."""
    flat, order, layout = numeric.plan(x, axis, group_size)
    walk = numeric.logical_walk(flat) if order else []
    moved = group_size is not None
    if len(walk) > WALK_DIMS:
        walk, flat, moved = [], flat.contiguous(), True
        layout = numeric.layout_of(x.shape, [], axis, None)
    return Place(flat, launch.output(flat, x, inplace), layout, walk, moved)


def finished(x: Tensor, place: Place, inplace: bool) -> Tensor:
    """The op's result: x itself in place, else y with x's strides."""
    if inplace:
        return x if place.y is x else x.copy_(place.y)
    if place.moved and place.flat is not x:
        return torch.empty_like(x).copy_(place.y)
    return place.y


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
    place = placed(x, axis, group_size, inplace)
    launch_noise(place, params, draw)
    return finished(x, place, inplace)


def launch_noise(place: Place, params: tuple[Tensor | None, ...], draw: Draw) -> None:
    """One launch over a dense tensor."""
    flat, y, layout, walk, _ = place
    outer, channels, inner = launch.simplified(layout)
    head = 0 if walk else draw.offset % 4
    groups = launch.ceil_div(flat.numel() + head, 8) if flat.numel() else 0
    block = min(TILE // 8, launch.power_of_two(groups))
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
        MODE=channel_mode(inner, channels, head),
        WRAP=outer > 1,
        EACH=bool(walk),
        GROUPS=block,
        WIDE=launch.is_wide(flat.numel()),
    )


def channel_mode(inner: int, channels: int, head: int) -> int:
    """How the kernel finds the channels of eight elements, the first at a multiple less head."""
    if channels == 1:
        return launch.SCALAR
    mode = launch.by_eights(inner)
    return launch.STRADDLE if head and mode == launch.GROUP else mode


def number(value: int, at: Tensor | None) -> int | Tensor:
    """A seed or step as the kernel takes it."""
    return as_number(value) if at is None else at


def walk_arguments(walk: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(sizes of the three fastest dims in memory, row-major strides of four), fastest first."""
    dims = [*reversed(walk), *[(1, 0)] * (WALK_DIMS - len(walk))]
    return [size for size, _ in dims[:-1]], [stride for _, stride in dims]


def differential_arguments(
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
) -> Arguments:
    """Without previous statistics they are the present ones."""
    params: tuple[Tensor | None, ...] = (mean, std, None, None)
    if prev_mean is not None and prev_std is not None:
        params = (mean, std, prev_mean, prev_std)
    draw = Draw(DIFFERENTIAL, number(seed, seed_at), number(step, step_at), offset, ramp)
    return x, params, draw, axis, group_size, inplace


def drop_in_arguments(
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
) -> Arguments:
    counter = (number(seed, seed_at), number(step, step_at), offset)
    draw = Draw(DROP_IN, *counter, ramp, numeric.gate_threshold(p))
    return x, (mean, std, None, None), draw, axis, group_size, inplace


def uniform_arguments(
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
) -> Arguments:
    counter = (number(seed, seed_at), number(step, step_at), offset)
    draw = Draw(UNIFORM, *counter, threshold=numeric.gate_threshold(p))
    return x, (None, scale, None, None), draw, axis, group_size, inplace


def op(name: str, arguments: Callable[..., Arguments]) -> Callable[..., Tensor]:
    """A noise op, from what makes its arguments those of `add`."""

    def single(*call: Any) -> Tensor:
        check_statistics(name, *call)
        return add(*arguments(*call))

    return single


differential_noise = op("differential_noise", differential_arguments)
drop_in_noise = op("drop_in_noise", drop_in_arguments)
uniform_noise = op("uniform_noise", uniform_arguments)
