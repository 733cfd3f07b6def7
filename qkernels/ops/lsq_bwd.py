"""lsq_bwd: the gradients of x, of a learned scale and of a learned zero point, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.ops import _check
from qkernels.ops._library import any_traced, call, call_list, define, traced


def check_lsq_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    grad_scale: float,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("lsq_bwd", "x", x)
    if grad.shape != x.shape or grad.dtype is not x.dtype or grad.device != x.device:
        raise ValueError(
            f"lsq_bwd: grad must be of shape {tuple(x.shape)}, {x.dtype} on {x.device} like x, got "
            f"{tuple(grad.shape)}, {grad.dtype} on {grad.device}"
        )
    _check.check_choice("lsq_bwd", "clip", clip, numeric.CLIPS)
    _check.check_granularity("lsq_bwd", x.shape, axis, group_size)
    _check.check_params("lsq_bwd", x, scale, zero_point, axis, group_size)


def _fake(grad: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


define(
    "lsq_bwd",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis, "
    "int? group_size, str clip, float grad_scale, *, str backend='') -> (Tensor, Tensor, Tensor)",
    check_lsq_bwd,
    _fake,
)


def _refuse_second_order(*_: Any) -> Any:
    raise NotImplementedError(
        "lsq_bwd: the gradient of a learned scale must not be differentiated again, got a double "
        "backward"
    )


class LsqBackward(torch.autograd.Function):
    """Carries lsq_bwd in an eager double backward, only to say that there is none."""

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return call("lsq_bwd", backend, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _refuse_second_order()


torch.library.register_autograd("qkernels::lsq_bwd", _refuse_second_order)


def lsq_backward(grad: Tensor, *args: Any, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """lsq_bwd for a backward formula."""
    args = (args[0].resolve_neg(), *args[1:])  # grad may be plain while x is a negated view
    if torch.is_grad_enabled() and not traced(grad):
        return LsqBackward.apply(backend, grad, *args)
    return call("lsq_bwd", backend, grad, *args)


def lsq_backward_list(
    calls: list[tuple[Any, ...]], backend: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """lsq_backward of every call, at once unless the backward is differentiated."""
    if torch.is_grad_enabled() or any_traced(args[0] for args in calls):
        return [lsq_backward(*args, backend=backend) for args in calls]
    calls = [(grad, x.resolve_neg(), *rest) for grad, x, *rest in calls]
    return call_list("lsq_bwd", backend, calls)
