"""Noise added to a tensor, every element of it a function of (seed, step, index).

    differential   y = x + ramp * (d_t - d_{t-1}),   d_t = mean_t + std_t * eps(seed, step t, i)
    drop_in        y = x + ramp * (mean + std * eps) where the gate of i is open, else x
    uniform        y = x + scale * u                 where the gate of i is open, else x

mean, std and scale have an entry per channel; i is offset + the row-major index of the element,
whatever its place in memory. eps, u and gates are those of reference/philox.py, fp32 numbers that
are widened for fp64 x. d_{t-1} is drawn again from its counter, step - 1 modulo 2^63. A channel
whose std or scale is negative or not finite, or whose mean is not finite, is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference import philox
from qkernels.backends.reference.common import from_channels, per_channel, to_channels
from qkernels.ops._noise import check_statistics


def counter(
    seed: int, step: int, seed_at: Tensor | None, step_at: Tensor | None
) -> tuple[int, ...]:
    """(seed, step) as numbers, from the device where tensors are given."""
    if seed_at is not None:
        seed = int(seed_at) & numeric.LARGEST_SEED
    if step_at is not None:
        step = int(step_at) & numeric.LARGEST_SEED
    return seed, step


def indices(x: Tensor, offset: int) -> Tensor:
    """offset + the row-major index of every element of x."""
    return (torch.arange(x.numel(), device=x.device) + offset).reshape(x.shape)


def as_channels(values: Tensor, x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Values of x's shape, one for each element, as to_channels would show x."""
    like = torch.empty_like(x, dtype=numeric.compute_dtype(x.dtype))
    return to_channels(like.copy_(values), axis, group_size)


def spread(p: Tensor, dtype: torch.dtype) -> Tensor:
    """std or scale per channel, NaN where it is not one."""
    s = per_channel(p, dtype)
    return torch.where((s >= 0) & s.isfinite(), s, torch.nan)


def center(p: Tensor, dtype: torch.dtype) -> Tensor:
    """mean per channel, NaN where it is not finite."""
    m = per_channel(p, dtype)
    return torch.where(m.isfinite(), m, torch.nan)


def finish(x: Tensor, y: Tensor, group_size: int | None, inplace: bool) -> Tensor:
    """y as [outer, channels, inner] to a tensor like x, or into x."""
    out = from_channels(y, x, group_size)
    return x.copy_(out) if inplace else out


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
    if prev_mean is None or prev_std is None:
        prev_mean, prev_std = mean, std
    seed, step = counter(seed, step, seed_at, step_at)
    rows = to_channels(x, axis, group_size)
    index = indices(x, offset)

    def delta(m: Tensor, s: Tensor, at: int) -> Tensor:
        eps = as_channels(philox.normal(index, seed, at), x, axis, group_size)
        return center(m, rows.dtype) + spread(s, rows.dtype) * eps

    before = (step - 1) & numeric.LARGEST_SEED
    change = delta(mean, std, step) - delta(prev_mean, prev_std, before)
    return finish(x, rows + change * ramp, group_size, inplace)


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
    seed, step = counter(seed, step, seed_at, step_at)
    rows = to_channels(x, axis, group_size)
    index = indices(x, offset)
    eps = as_channels(philox.normal(index, seed, step), x, axis, group_size)
    noise = (center(mean, rows.dtype) + spread(std, rows.dtype) * eps) * ramp
    y = torch.where(gates(x, index, seed, step, p, axis, group_size), rows + noise, rows)
    return finish(x, y, group_size, inplace)


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
    seed, step = counter(seed, step, seed_at, step_at)
    rows = to_channels(x, axis, group_size)
    index = indices(x, offset)
    u = as_channels(philox.uniform(index, seed, step), x, axis, group_size)
    noise = spread(scale, rows.dtype) * u
    y = torch.where(gates(x, index, seed, step, p, axis, group_size), rows + noise, rows)
    return finish(x, y, group_size, inplace)


def gates(
    x: Tensor,
    index: Tensor,
    seed: int,
    step: int,
    p: float,
    axis: int | None,
    group_size: int | None,
) -> Tensor:
    """Booleans as [outer, channels, inner], true with probability p."""
    is_open = philox.gate(index, seed, step, numeric.gate_threshold(p))
    return as_channels(is_open, x, axis, group_size) != 0
