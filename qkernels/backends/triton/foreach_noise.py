"""The noise ops of a list, in one launch for each kind of tensor; see table.py.

Tensors go one by one if they are not row-major (their walks differ), if nothing is added to them,
or if they have 2^30 elements and more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qkernels.backends.triton import launch, noise, table
from qkernels.backends.triton.noise_tile import noise_tile
from qkernels.backends.triton.philox import as_number
from qkernels.backends.triton.table import find, pointer, size
from qkernels.ops._check import each_call
from qkernels.ops._noise import check_statistics

GROUPS = noise.TILE // 8
FIELDS = 14


@triton.jit
def number_at(at, IS_POINTER: tl.constexpr):
    """A seed or step in a record, as philox.load_number takes it."""
    number = tl.load(at)
    if IS_POINTER:
        number = number.to(tl.pointer_type(tl.int64))
    return number


# ideal bytes: those of noise_kernel, and 120 of the table for a tensor
@triton.jit(do_not_specialize=["table_ptr", "count"])
def noise_list_kernel(
    table_ptr,
    count,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    PREVIOUS: tl.constexpr,
    SEED_AT: tl.constexpr,
    STEP_AT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HEAD: tl.constexpr,
    MODE: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile a program. DTYPE, MEAN, STD and PREVIOUS (of both) are dtypes, or None."""
    at, tile = find(table_ptr, count, FIELDS)
    noise_tile(
        tile,
        pointer(at, DTYPE, EVEN),
        pointer(at + 1, DTYPE, EVEN),
        None if MEAN is None else pointer(at + 2, MEAN, False),
        pointer(at + 3, STD, False),
        None if PREVIOUS is None else pointer(at + 4, PREVIOUS, False),
        None if PREVIOUS is None else pointer(at + 5, PREVIOUS, False),
        number_at(at + 6, SEED_AT),
        number_at(at + 7, STEP_AT),
        tl.load(at + 8),
        tl.load(at + 9),
        size(at + 10, False),
        size(at + 11, EVEN),
        size(at + 12, False),
        size(at + 13, False),
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        KIND,
        GATED,
        HEAD,
        MODE,
        True,
        False,
        GROUPS,
        False,
    )


def _foreach(
    op: str, arguments: Callable[..., noise.Arguments], calls: list[tuple[Any, ...]]
) -> list[Tensor]:
    """A noise op of every call; `arguments` makes a call those of noise.add."""
    each_call(partial(check_statistics, op), calls)
    listed = table.takes(calls, FIELDS)
    batch = table.Batch(noise_list_kernel, FIELDS)
    finish, kept = [], []
    for call in calls:
        x, params, draw, axis, group_size, inplace = added = arguments(*call)
        if not listed or draw.threshold == 0 or launch.is_wide(x.numel()):
            finish.append(partial(noise.add, *added))
            continue
        place = noise.placed(x, axis, group_size, inplace)
        if place.walk:
            noise.launch_noise(place, params, draw)
        else:
            kept.append(_add(batch, place, params, draw))
        finish.append(partial(noise.finished, x, place, inplace))
    table.launch_batches(calls[0][0].device, batch)
    return [done() for done in finish]


def _add(
    batch: table.Batch, place: noise.Place, params: tuple[Tensor | None, ...], draw: noise.Draw
) -> list[Tensor | None]:
    """-> what the record points to, beside the place."""
    flat, y, layout, _, _ = place
    numel, head = flat.numel(), draw.offset % 4
    _, channels, inner = launch.simplified(layout)
    if channels == 1 and head == 0:  # one channel is never left by an eight
        mode = launch.GROUP
    else:
        mode = noise.channel_mode(inner, channels, head)
    params_flat = [None if p is None else p.contiguous() for p in params]
    mean, std, previous, _ = params_flat
    numbers = (draw.seed, draw.step)
    batch.add(
        launch.ceil_div(numel + head, noise.TILE) if numel else 0,
        (
            flat.data_ptr(),
            y.data_ptr(),
            *(table.address(p) for p in params_flat),
            *(n if isinstance(n, int) else n.data_ptr() for n in numbers),
            as_number(draw.offset),
            launch.float_bits(draw.ramp),
            draw.threshold,
            numel,
            inner,
            channels,
        ),
        DTYPE=table.DTYPES[flat.dtype],
        MEAN=table.dtype_of(mean),
        STD=table.dtype_of(std),
        PREVIOUS=table.dtype_of(previous),
        SEED_AT=not isinstance(draw.seed, int),
        STEP_AT=not isinstance(draw.step, int),
        KIND=draw.kind.value,
        GATED=draw.threshold < 1 << 24,
        HEAD=head,
        MODE=mode,
        GROUPS=GROUPS,
        EVEN=table.even(numel, flat.data_ptr(), y.data_ptr()),
    )
    return params_flat


foreach_differential_noise = partial(_foreach, "differential_noise", noise.differential_arguments)
foreach_drop_in_noise = partial(_foreach, "drop_in_noise", noise.drop_in_arguments)
foreach_uniform_noise = partial(_foreach, "uniform_noise", noise.uniform_arguments)
