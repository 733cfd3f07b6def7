"""fake_quant of a list of tensors, with the gradients of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.ops.fake_quant import (
    fake_quant_args,
    grad_factor,
    kept,
    learned_grads,
    ranged_args,
    wanted,
)
from qkernels.ops.fake_quant_bwd import mask_backward_list
from qkernels.ops.fake_quant_dynamic import Run
from qkernels.ops.lsq_bwd import lsq_backward_list


class Plan(NamedTuple):
    """One tensor of a list: the schema's arguments less the mask, and what its gradient needs."""

    args: tuple[Any, ...]
    needs_grad: bool
    learned: bool
    grad_scale: float


class ForeachFakeQuant(torch.autograd.Function):
    """One call forward, and one each for masks and learned scales backward.

    Tensors are x, scale and zero point of every plan in turn. What needs no gradient saves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        plans: list[Plan],
        backend: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = run([(*p.args, p.needs_grad and not p.learned) for p in plans])
        saved: list[Tensor | None] = []
        ctx.each = []
        for plan, (y, mask) in zip(plans, results, strict=True):
            if not plan.needs_grad:
                ctx.each.append(None)
                continue
            keep, rest = kept(plan.args, plan.learned, y, mask)
            ctx.each.append((plan.learned, rest, plan.grad_scale, len(saved)))
            saved += keep
        ctx.save_for_backward(*saved)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(y for (y, _), each in zip(results, ctx.each, strict=True) if each is None)
        )
        return tuple(y for y, _ in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        result: list[Tensor | None] = [None] * (3 * len(grads))
        straight, learned = [], []  # (place, call)
        for i, (grad, each) in enumerate(zip(grads, ctx.each, strict=True)):
            if grad is None or each is None:
                continue
            is_learned, rest, grad_scale, at = each
            if is_learned:
                learned.append((i, (grad, *saved[at : at + 3], *rest, grad_scale)))
            else:
                straight.append((i, (grad, saved[at], rest)))
        if straight:
            masked = mask_backward_list([call for _, call in straight], ctx.backend)
            for (i, _), gx in zip(straight, masked, strict=True):
                result[3 * i] = gx
        if learned:
            found = lsq_backward_list([call for _, call in learned], ctx.backend)
            for (i, call), three in zip(learned, found, strict=True):
                result[3 * i : 3 * i + 3] = learned_grads(call[3], *three)
        return None, None, None, *result


def run_plans(plans: list[Plan], backend: str, run: Run) -> list[Tensor]:
    """fake_quant of a list, with gradients; `run` runs the op on a list of calls."""
    if not any(p.needs_grad for p in plans):
        return [y for y, _ in run([(*p.args, False) for p in plans])]
    tensors = (tensor for p in plans for tensor in p.args[:3])
    return list(ForeachFakeQuant.apply(run, plans, backend, *tensors))


def list_plan(
    scale: Any, zero_point: Any, *, grad_scale: float | None, **kw: Any
) -> Callable[[Tensor], tuple[str, Any]]:
    """What makes of a tensor of a list (op, Plan or the arguments of run_dynamic), for the other
    arguments of `fake_quant`; raises on those that no row could run."""
    if scale is None:
        args_of = ranged_args(zero_point, grad_scale, **kw)
        return lambda x: ("fake_quant_dynamic", args_of(x))

    def plan(x: Tensor) -> tuple[str, Plan]:
        args = fake_quant_args(x, scale, zero_point, grad_scale=grad_scale, **kw, eager=True)
        needs_grad, learned = wanted(x, args[1], args[2])
        factor = grad_factor(args, learned, grad_scale) if needs_grad else 1.0
        return "fake_quant", Plan(args, needs_grad, learned, factor)

    return plan
