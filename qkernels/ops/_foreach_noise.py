"""The list forms of error_stats and of the noise ops; qkernels.foreach shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, Union

import torch
from torch import Tensor

from qkernels import _registry
from qkernels.ops import error_stats as _stats
from qkernels.ops import noise as _noise
from qkernels.ops._check import each_call, named
from qkernels.ops._foreach import Listed
from qkernels.ops._inplace import ToBeWritten, check_writable, written
from qkernels.ops._library import check
from qkernels.ops._noise import check_statistics
from qkernels.ops.error_stats import ErrorStats
from qkernels.ops.noise import Stats

T = TypeVar("T")
Each = Union[T, Sequence[T]]  # noqa: UP007  one value for all tensors, or one per tensor
EachStats = Union[Stats, list[Stats]]  # noqa: UP007  a tuple is one value here

_STATS = ("stats", "prev_stats")


def error_stats(
    xs: Sequence[Tensor],
    scales: Each[Tensor | float | None] = None,
    zero_points: Each[Tensor | int | None] = None,
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    method: Each[str] = "minmax",
    percentile: Each[float | None] = None,
    clip: Each[str] = "code",
    backend: str | None = None,
) -> list[ErrorStats]:
    """`qkernels.error_stats` of every tensor of a list.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.error_stats`.
    """
    values = {
        "scale": scales,
        "zero_point": zero_points,
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "narrow_range": narrow_range,
        "method": method,
        "percentile": percentile,
        "clip": clip,
    }
    listed = Listed("error_stats", xs, values, backend)
    if listed.apart:
        return listed.singles(_stats.error_stats)

    def checked(x: Tensor, **kw: Any) -> tuple[str, tuple[Any, ...]]:
        op, args = _stats.stats_call(x, **kw)
        check(op, *args)
        return op, args

    calls = listed.each(checked)
    results = listed.run_by_op(calls)
    return [_stats.as_error_stats(op, r) for (op, _), r in zip(calls, results, strict=True)]


def differential_noise(
    ws: Sequence[Tensor],
    stats: EachStats,
    prev_stats: EachStats | None = None,
    *,
    seed: Each[int | Tensor],
    step: Each[int | Tensor],
    ramp: Each[float] = 1.0,
    offset: Each[int] = 0,
    axis: Each[int | None] = 0,
    group_size: Each[int | None] = None,
    inplace: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.differential_noise` of every tensor of a list, with its gradient.

    Tensors of one seed and step get the same draws: give each a seed of its own (`qkernels.Noise`).

    Args:
        stats, prev_stats: an `ErrorStats` or a pair (mean, std) for all, or a list with one per
            tensor (a tuple is a pair).
        ws, seed, step, ramp, offset, axis, group_size: as in `qkernels.differential_noise`, each
            one value or a list with one per tensor.
        inplace, backend: one for all; in place, no tensor may be in the list twice, and an error
            in one leaves all as they were.
    """
    values = {
        "stats": stats,
        "prev_stats": prev_stats,
        "seed": seed,
        "step": step,
        "ramp": ramp,
        "offset": offset,
        "axis": axis,
        "group_size": group_size,
    }
    listed = Listed("differential_noise", ws, values, backend, what="ws", whole=_STATS)
    return _add(listed, _noise.differential_noise, _noise.differential_args, inplace)


def drop_in_noise(
    xs: Sequence[Tensor],
    stats: EachStats,
    *,
    p: Each[float],
    seed: Each[int | Tensor],
    step: Each[int | Tensor],
    ramp: Each[float] = 1.0,
    offset: Each[int] = 0,
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    inplace: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.drop_in_noise` of every tensor of a list, with its gradient.

    Arguments and errors as in `foreach.differential_noise` and `qkernels.drop_in_noise`.
    """
    values = {
        "stats": stats,
        "p": p,
        "seed": seed,
        "step": step,
        "ramp": ramp,
        "offset": offset,
        "axis": axis,
        "group_size": group_size,
    }
    listed = Listed("drop_in_noise", xs, values, backend, whole=_STATS)
    return _add(listed, _noise.drop_in_noise, _noise.drop_in_args, inplace)


def uniform_noise(
    xs: Sequence[Tensor],
    scales: Each[Tensor | float],
    *,
    seed: Each[int | Tensor],
    step: Each[int | Tensor],
    p: Each[float] = 1.0,
    offset: Each[int] = 0,
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    inplace: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.uniform_noise` of every tensor of a list, with its gradient.

    Arguments and errors as in `foreach.differential_noise` and `qkernels.uniform_noise`.
    """
    values = {
        "scale": scales,
        "p": p,
        "seed": seed,
        "step": step,
        "offset": offset,
        "axis": axis,
        "group_size": group_size,
    }
    listed = Listed("uniform_noise", xs, values, backend)
    return _add(listed, _noise.uniform_noise, _noise.uniform_args, inplace)


class ForeachAddNoise(torch.autograd.Function):
    """The eager carrier of the gradients of a list: each is its cotangent. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], list[Tensor]], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ys = run()
        ctx.mark_non_differentiable(
            *(y for y, needed in zip(ys, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


def _add(
    listed: Listed,
    single: Callable[..., Tensor],
    arguments: Callable[..., tuple[Any, ...]],
    inplace: bool,
) -> list[Tensor]:
    """A noise op on a list, given as its function of one tensor and what makes that function's
    arguments those of the schema."""
    op, xs = listed.op, listed.xs
    if inplace and len({id(x) for x in xs}) < len(xs):
        raise ValueError(f"foreach.{op}: inplace must be False for a tensor given twice, got True")
    if listed.apart:
        return listed.singles(partial(single, inplace=inplace))
    calls = listed.calls(op, arguments)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    if inplace:
        return _add_in_place(listed, calls, with_grad)
    run = partial(listed.run, op, calls)
    return list(ForeachAddNoise.apply(run, *xs)) if with_grad else run()


def _add_in_place(listed: Listed, calls: list[Any], with_grad: bool) -> list[Tensor]:
    """`_add` to the tensors themselves; where one is refused, all are as they were."""
    op, xs = listed.op, listed.xs
    addresses = [x.data_ptr() for x in xs if x.numel() > 0]
    if len(set(addresses)) < len(addresses):
        raise ValueError(
            f"foreach.{op}: inplace must be False for tensors that share memory, got True"
        )
    # a list kernel looks at all of them before it writes
    if with_grad or not _registry.takes_lists(op, listed.backend, xs[0]):
        with named(op):
            each_call(partial(check_statistics, op), calls)
    for x in xs:
        check_writable(op, x)
    watched = [x for x in xs if with_grad and x.requires_grad]
    for x in sorted(watched, key=lambda x: not x.is_leaf):  # leaves, which torch refuses, first
        ToBeWritten.apply(x)
    listed.run(op, [(x.detach(), *rest, True) for x, *rest in calls])
    for x in xs:
        if not (with_grad and x.requires_grad):
            written(x)
    return list(xs)
