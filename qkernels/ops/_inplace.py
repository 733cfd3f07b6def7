"""fake_quant written to its input, and what every op that writes to its input tells autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops._check import check_values
from qkernels.ops.fake_quant_bwd import mask_backward


class ToBeWritten(torch.autograd.Function):
    """Tells autograd that x changes in place, before it does: where torch refuses (a leaf that
    requires grad, some views), nothing has been written yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def check_writable(op: str, x: Tensor) -> None:
    """Raise where torch's own ops would not write to x either."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: inplace must be False for an inference tensor outside inference mode, got True"
        )


def written(x: Tensor) -> Tensor:
    """x, after a kernel wrote to it: what autograd saved of it before is stale."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


class Overwrite(torch.autograd.Function):
    """Fake quantization to where x lies; the mask is all that the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, backend: str, args: tuple[Any, ...]) -> Tensor:
        ctx.mark_dirty(x)
        *_, mask = _registry.run(op, backend, *args, True, True)
        ctx.save_for_backward(mask)
        ctx.order, ctx.backend = numeric.memory_order(x), backend
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return mask_backward(grad, mask, ctx.order, ctx.backend), None, None, None


def is_writable(x: Tensor, group_size: int | None) -> bool:
    """Whether the kernels can write where x lies; elsewhere their result is copied there."""
    order = numeric.memory_order(x)
    return order == [] or (order is not None and group_size is None)


def overwrite(op: str, backend: str, args: tuple[Any, ...]) -> Tensor:
    """Run fake_quant or fake_quant_dynamic (checked arguments less the mask) in place on args[0],
    which `is_writable`."""
    x = args[0]
    check_writable("fake_quant", x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        if x.is_cuda and op == "fake_quant":
            check_values(op, args[1], args[2])  # with QKERNELS_CHECK=1; the CPU's kernel looks
        _registry.run(op, backend, *args, False, True)
        return written(x)
    if op == "fake_quant":
        check_values(op, args[1], args[2])  # a refusal leaves autograd's state alone too
    ToBeWritten.apply(x)
    return Overwrite.apply(x, op, backend, args)
