"""fake_quant_dynamic: range, scale and fake quantization of a tensor in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops import _check
from qkernels.ops._library import call, define, traced
from qkernels.ops.fake_quant_bwd import (
    joined,
    mask_backward,
    mask_backward_list,
    mask_order,
    taken_apart,
)


class FakeQuantized(NamedTuple):
    """Result of `fake_quant_dynamic`."""

    y: Tensor
    scale: Tensor
    zero_point: Tensor


# a list of calls -> their results
Run = Callable[[list[tuple[Any, ...]]], list[Any]]


def check_fake_quant_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    mask: bool,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("fake_quant_dynamic", "x", x)
    _check.check_granularity("fake_quant_dynamic", x.shape, axis, group_size)
    _check.check_choice("fake_quant_dynamic", "method", method, numeric.METHODS)
    _check.check_choice("fake_quant_dynamic", "clip", clip, numeric.CLIPS)
    _check.check_percentile("fake_quant_dynamic", percentile)


def _fake(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = numeric.params_shape(x.shape, axis, group_size)
    size = numeric.mask_bytes(x.numel()) if mask else 0
    return (
        torch.empty_like(x),
        x.new_empty(shape, dtype=numeric.compute_dtype(x.dtype)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(size, dtype=torch.uint8),
    )


define(
    "fake_quant_dynamic",
    "(Tensor x, int qmin, int qmax, int? axis, int? group_size, bool symmetric, str method, "
    "float percentile, str clip, bool mask, *, str backend='') -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    check_fake_quant_dynamic,
    _fake,
)


def _save(ctx: Any, x: Tensor, group_size: int | None, y: Tensor, mask: Tensor) -> None:
    ctx.save_for_backward(mask)
    ctx.order = mask_order(y, group_size)
    if mask.numel() != numeric.mask_bytes(x.numel()):
        raise ValueError("fake_quant_dynamic: mask must be True when x requires grad, got False")


class FakeQuantDynamic(torch.autograd.Function):
    """The eager carrier of the gradient; scale and zero point are detached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *args, ctx.backend = rest
        y, scale, zp, mask = _registry.run("fake_quant_dynamic", ctx.backend, x, *args, True)
        _save(ctx, x, args[3], y, mask)
        ctx.mark_non_differentiable(scale, zp)
        return y, scale, zp

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return mask_backward(grad, mask, ctx.order, ctx.backend), *(None,) * 9


class ForeachStraightThrough(torch.autograd.Function):
    """What carries the gradients of a list whose results are there already: as FakeQuantDynamic of
    each, but that what needs no gradient saves nothing.

    Args:
        ys: the results.
        places: of those that need a gradient, in the list.
        masks, orders: of these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ys: list[Tensor],
        places: list[int],
        masks: list[Tensor],
        orders: list[list[int]],
        backend: str,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*joined(masks))
        ctx.sizes = [mask.numel() for mask in masks]
        ctx.places, ctx.orders, ctx.backend = places, orders, backend
        ctx.set_materialize_grads(False)
        differentiable = set(places)
        ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in differentiable))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        masks = taken_apart(ctx.saved_tensors, ctx.sizes)
        result: list[Tensor | None] = [None] * len(grads)
        places, calls = [], []
        for i, mask, order in zip(ctx.places, masks, ctx.orders, strict=True):
            if grads[i] is not None:
                places.append(i)
                calls.append((grads[i], mask, order))
        for i, gx in zip(places, mask_backward_list(calls, ctx.backend), strict=True):
            result[i] = gx
        return *(None,) * 5, *result


def run_dynamic(
    calls: list[tuple[Any, ...]], backend: str, run: Run
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(y, scale, zero point) of a list of the schema's checked arguments, less the mask, with
    gradients; `run` runs the op on a list of calls."""
    needs = [args[0].requires_grad and torch.is_grad_enabled() for args in calls]
    with torch.no_grad():
        results = run([(*args, need) for args, need in zip(calls, needs, strict=True)])
    if not any(needs):
        return [result[:3] for result in results]
    places = [i for i, need in enumerate(needs) if need]
    masks = [results[i][3] for i in places]
    orders = [mask_order(results[i][0], calls[i][4]) for i in places]
    ys, xs = [result[0] for result in results], [args[0] for args in calls]
    ys = ForeachStraightThrough.apply(ys, places, masks, orders, backend, *xs)
    return [(y, scale, zp) for y, (_, scale, zp, _) in zip(ys, results, strict=True)]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any
) -> None:
    y, scale, zp, mask = output
    ctx.backend = keyword_only_inputs["backend"]
    _save(ctx, inputs[0], inputs[4], y, mask)
    ctx.mark_non_differentiable(scale, zp, mask)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return mask_backward(grad, mask, ctx.order, ctx.backend), *(None,) * 9


torch.library.register_autograd(
    "qkernels::fake_quant_dynamic", _backward, setup_context=_setup_context
)


def dynamic_with_grad(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, scale, zero point) with the straight-through gradient; arguments are the schema's, less
    the mask, and the backend."""
    args, backend = rest[:-1], rest[-1]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return call("fake_quant_dynamic", backend, x, *args, False)[:3]
    if traced(x):
        return call("fake_quant_dynamic", backend, x, *args, True)[:3]
    check_fake_quant_dynamic(*(x, *args, True))
    return FakeQuantDynamic.apply(x, *args, backend)


def dynamic_args(
    op: str,
    bits: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    narrow_range: bool,
    method: str,
    percentile: float | None,
    clip: str,
) -> Callable[[Tensor], tuple[Any, ...]]:
    """What makes of a tensor the schema's arguments less the mask, and raises on a tensor that no
    row could run; the settings, which a list shares, are looked at once."""
    qmin, qmax = numeric.code_range(op, bits, symmetric, narrow_range)
    p = _check.as_percentile(op, method, percentile)
    _check.check_choice(op, "clip", clip, numeric.CLIPS)

    def args_of(x: Tensor) -> tuple[Any, ...]:
        _check.check_tensor(op, "x", x)
        at = _check.normal_axis(op, x, axis, group_size)
        return x, qmin, qmax, at, group_size, symmetric, method, p, clip

    return args_of


def fake_quant_dynamic(
    x: Tensor,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    clip: str = "code",
    backend: str | None = None,
) -> FakeQuantized:
    """`fake_quant` with the range of x itself, and the scale and zero point that it used.

    Args and errors are those of `fake_quant` and `quant_range`. The gradient of x is
    straight-through; scale and zero point are constants in it.

    Returns:
        FakeQuantized(y, scale, zero_point): y as `fake_quant`, the others as `quant_range`.
    """
    op = "fake_quant_dynamic"
    settings = (bits, axis, group_size, symmetric, narrow_range, method, percentile, clip)
    args = dynamic_args(op, *settings)(x)
    row = _registry.check_backend(backend, f"{op}: backend")
    return FakeQuantized(*dynamic_with_grad(*args, row))
