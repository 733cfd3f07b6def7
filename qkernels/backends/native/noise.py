"""Noise in the compiled module."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels._native import DTYPES
from qkernels.backends.native.common import Prepared, forms, with_strides_of
from qkernels.ops._noise import check_statistics

# as NoiseKind and Walk::kMostDims in csrc/params.h
DIFFERENTIAL, DROP_IN, UNIFORM = 0, 1, 2
MOST_DIMS = 4
NO_GATE = 1 << 24

Param = Tensor | None


def _walk_fields(walk: list[tuple[int, int]]) -> tuple[int, ...]:
    """The fields of Walk."""
    rest = (0,) * (MOST_DIMS - len(walk))
    return len(walk), *(n for n, _ in walk), *rest, *(s for _, s in walk), *rest


def _prepared(
    kind: int,
    x: Tensor,
    params: tuple[Param, Param, Param, Param],
    counter: tuple[int, int, Param, Param],
    offset: int,
    ramp: float,
    threshold: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool,
) -> Prepared:
    """-> y, or x itself."""
    dense, order, layout = numeric.plan(x, axis, group_size)
    reordered = group_size is not None and dense is not x
    walk = numeric.logical_walk(dense) if order else []
    if len(walk) > MOST_DIMS:  # five dims in an order of their own: rare enough to be copied
        dense, walk, reordered = x.contiguous(), [], True
        layout = numeric.layout_of(x.shape, [], axis, group_size)
    y = dense if inplace or dense is not x else torch.empty_like(dense)
    mean, std, prev_mean, prev_std = flat = [None if p is None else p.contiguous() for p in params]
    seed, step, seed_at, step_at = counter
    fields = (
        DTYPES[x.dtype],
        *layout,
        *(_walk_fields(walk) if walk else (1, x.numel(), 0, 0, 0, 1, 0, 0, 0)),
        kind,
        seed,
        step,
        0 if seed_at is None else seed_at.data_ptr(),
        0 if step_at is None else step_at.data_ptr(),
        offset,
        ramp,
        threshold,
        0 if mean is None else mean.data_ptr(),
        0 if std is None else std.data_ptr(),
        0 if prev_mean is None else prev_mean.data_ptr(),
        0 if prev_std is None else prev_std.data_ptr(),
        dense.data_ptr(),
        y.data_ptr(),
    )
    kept = (dense, flat)
    if dense is x:
        return fields, y, kept, None
    if inplace:
        return fields, x, kept, lambda: x.copy_(y)
    return fields, y, kept, (lambda: with_strides_of(x, y)) if reordered else None


def _prepare_differential(
    target: _native.Target,
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
) -> Prepared:
    if x.is_cuda:
        _check_differential(x, mean, std, prev_mean, prev_std)
    params = (mean, std, prev_mean, prev_std)
    counter = (seed, step, seed_at, step_at)
    return _prepared(
        DIFFERENTIAL, x, params, counter, offset, ramp, NO_GATE, axis, group_size, inplace
    )


def _prepare_drop_in(
    target: _native.Target,
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
) -> Prepared:
    if x.is_cuda:
        _check_drop_in(x, mean, std)
    params, counter = (mean, std, None, None), (seed, step, seed_at, step_at)
    threshold = numeric.gate_threshold(p)
    return _prepared(
        DROP_IN, x, params, counter, offset, ramp, threshold, axis, group_size, inplace
    )


def _prepare_uniform(
    target: _native.Target,
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
) -> Prepared:
    if x.is_cuda:
        _check_uniform(x, scale)
    params, counter = (None, scale, None, None), (seed, step, seed_at, step_at)
    threshold = numeric.gate_threshold(p)
    return _prepared(UNIFORM, x, params, counter, offset, 1.0, threshold, axis, group_size, inplace)


_check_differential = partial(check_statistics, "differential_noise")
_check_drop_in = partial(check_statistics, "drop_in_noise")
_check_uniform = partial(check_statistics, "uniform_noise")

differential_noise, foreach_differential_noise = forms(
    "noise", _prepare_differential, _check_differential
)
drop_in_noise, foreach_drop_in_noise = forms("noise", _prepare_drop_in, _check_drop_in)
uniform_noise, foreach_uniform_noise = forms("noise", _prepare_uniform, _check_uniform)
