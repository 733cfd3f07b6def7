"""How a Triton row runs: whether it can, the one launch, and how a tensor is cut into tiles.

This module does not import triton, so that asking whether it is there costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.numeric import Layout

# elements of a tile: 16 a thread, which is four 128-bit loads of fp32 in flight
TILE = 2048
# a reduction gets as many programs as fill any present GPU; a constant, so that its order of
# summation is the same on all of them
PROGRAMS = 1024
# contiguous elements that a tile reads at the least, if there are so many: a 128-byte line of fp32
RUN = 32
# plans of launches that are remembered, those of the layouts of a large network
PLANS = 1024
# from here on an offset may not fit in 32 bits (tiles reach beyond the end of the tensor)
WIDE_FROM = 1 << 30

# how the channel of an element is found: see load_params() in index.py
SCALAR, ROW, GROUP, STRADDLE, ELEMENT = 0, 1, 2, 3, 4
# how elements of a channel lie in memory: see tile() in index.py
ROWS, COLUMNS, MIXED = 0, 1, 2


def available(device: str) -> str | None:
    """Why the Triton rows cannot run on a device type, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "Triton runs on CPU tensors only if TRITON_INTERPRET=1 is set before Python starts"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def run(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Launch a kernel on the current stream of the device of args[0], a tensor.

    A multiply and an add are never fused: the numerics contract is that of separate operations.
    """
    if programs == 0:
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    with on(args[0].device):
        kernel[(programs,)](*args, **constants, **options)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device made current; for interpreted kernels, numpy silent on inf and NaN."""
    if device.type == "cpu":
        import numpy

        return numpy.errstate(all="ignore")
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def is_wide(numel: int) -> bool:
    """Whether offsets into a tensor of this size need 64 bits."""
    return numel >= WIDE_FROM


def float_bits(value: float) -> int:
    """The bits of a double: Triton narrows float arguments to fp32, integers pass as they are."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def like(y: Tensor, x: Tensor, group_size: int | None) -> Tensor:
    """y with the strides of the dense form of x. Only grouped ops run in another order than x's."""
    if group_size is None or x.is_contiguous():
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


def output(flat: Tensor, x: Tensor, inplace: bool) -> Tensor:
    """Where an elementwise kernel over flat, the dense form of x, writes: a copy is ours."""
    return flat if inplace or flat is not x else torch.empty_like(flat)


def result(y: Tensor, x: Tensor, group_size: int | None, inplace: bool) -> Tensor:
    """What an op returns for y of `output`: x itself in place, else as `like`."""
    if not inplace:
        return like(y, x, group_size)
    return x if y is x else x.copy_(y)


class Grid(NamedTuple):
    """Tiles of [rows, groups of eight elements] for an elementwise kernel over [outer, period]."""

    programs: int
    sizes: tuple[int, int, int, int]  # outer, period, inner, channels
    constants: dict[str, Any]


def elementwise(layout: Layout, masked: bool) -> Grid:
    """How an elementwise kernel walks a layout; bytes of a mask must not cross rows of a tile.

    A period is one step of the outer dim. The channel of an element depends on its position in the
    period alone, so that a tile of several rows loads and inverts its scales once.
    """
    outer, channels, inner = layout
    return _elementwise(layout, masked, is_wide(outer * channels * inner))


@functools.lru_cache(PLANS)
def _elementwise(layout: Layout, masked: bool, wide: bool) -> Grid:
    outer, channels, inner = simplified(layout)
    numel = outer * channels * inner
    mode = SCALAR if channels == 1 else by_eights(inner)
    groups, wrap = TILE // 8, False
    row_groups = fitting_groups(inner) if channels > 1 and (not masked or inner % 8 == 0) else 0
    if row_groups:  # one channel a program
        mode, groups, outer, period = ROW, row_groups, outer * channels, inner
    else:
        period = channels * inner
        # short rows would leave tiles empty: take the tensor as one, at the price of a modulo
        wrap = outer > 1 and (period < 64 or (masked and period % 8 != 0))
        if wrap:
            outer, period = 1, numel
    all_groups = ceil_div(period, 8)
    groups = min(groups, power_of_two(all_groups))
    rows = 1 if mode == ROW else min(TILE // (8 * groups), power_of_two(outer))
    constants = {"ROWS": rows, "GROUPS": groups, "MODE": mode, "WRAP": wrap, "WIDE": wide}
    programs = ceil_div(all_groups, groups) * ceil_div(outer, rows)
    return Grid(programs, (outer, period, inner, channels), constants)


def by_eights(inner: int) -> int:
    """How eight elements that begin anywhere at a multiple of eight lie to channels."""
    return GROUP if inner % 8 == 0 else STRADDLE if inner > 8 else ELEMENT


def fitting_groups(inner: int) -> int:
    """Groups of eight in a tile of one channel, the last not too empty; 0 if none fits."""
    needed = ceil_div(inner, 8)
    for groups in (TILE // 8, TILE // 16):
        if needed >= groups and 4 * ceil_div(needed, groups) * groups <= 5 * needed:
            return groups
    return 0


def simplified(layout: Layout) -> Layout:
    """A single channel is one run of memory whatever the axis."""
    outer, channels, inner = layout
    return (1, 1, outer * inner) if channels == 1 else layout


class Tiling(NamedTuple):
    """Tiles of [channels, elements of a channel] for a reduction, in `parts` parts a channel."""

    blocks: int
    parts: int
    steps: int
    sizes: tuple[int, int, int]  # channels, inner, elements of a channel
    constants: dict[str, Any]

    @property
    def programs(self) -> int:
        return self.blocks * self.parts


def reduction(layout: Layout, tile: int = TILE, most_channels: int = TILE) -> Tiling:
    """How a reducing kernel walks a layout: wide contiguous reads, and enough programs.

    Program p reduces block p % blocks of the channels over `steps` tiles of part p // blocks.
    """
    outer, channels, inner = layout
    return _reduction(layout, tile, most_channels, is_wide(outer * channels * inner))


@functools.lru_cache(PLANS)
def _reduction(layout: Layout, tile: int, most_channels: int, wide: bool) -> Tiling:
    outer, channels, inner = simplified(layout)
    n = outer * inner
    mode = ROWS if outer == 1 else COLUMNS if inner == 1 else MIXED
    wanted = 1 if outer == 1 else ceil_div(RUN, inner)
    wanted = max(power_of_two(wanted), tile // power_of_two(n))
    block = min(wanted, power_of_two(channels), most_channels)
    size = min(power_of_two(n), tile // block)
    blocks = ceil_div(channels, block)
    all_steps = ceil_div(n, size)
    parts = max(1, min(all_steps, PROGRAMS // max(blocks, 1)))
    steps = ceil_div(all_steps, parts)
    constants = {"C": block, "E": size, "MODE": mode, "WIDE": wide}
    return Tiling(blocks, ceil_div(all_steps, steps), steps, (channels, inner, n), constants)


def finishing(parts: int, channels: int, cells: int) -> tuple[int, dict[str, int]]:
    """How a second stage adds up [parts, channels]: (programs, tile [P, C] of at most `cells`)."""
    block = min(16, power_of_two(channels))
    constants = {"P": min(power_of_two(parts), cells // block), "C": block}
    return ceil_div(channels, block), constants
