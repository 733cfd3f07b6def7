"""fake_quant_bwd: the straight-through gradient from the mask of one bit per element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.ops import _check
from qkernels.ops._library import any_traced, call, call_list, define, traced


def check_fake_quant_bwd(grad: Tensor, mask: Tensor, order: list[int]) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("fake_quant_bwd", "grad", grad)
    size = numeric.mask_bytes(grad.numel())
    apart = not (mask.is_cpu and grad.is_cpu) and mask.device != grad.device  # which takes longer
    if mask.dtype is not torch.uint8 or mask.numel() != size or apart:
        raise ValueError(
            f"fake_quant_bwd: mask must be {size} bytes of uint8 on {grad.device}, got "
            f"{mask.numel()} of {mask.dtype} on {mask.device}"
        )
    if not mask.is_contiguous():
        raise ValueError(
            f"fake_quant_bwd: mask must be contiguous, got strides {tuple(mask.stride())}"
        )
    if order and sorted(order) != list(range(grad.dim())):
        raise ValueError(
            f"fake_quant_bwd: order must be [] or a permutation of 0..{grad.dim() - 1}, got {order}"
        )


def _fake_bwd(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    if not order:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad.new_empty([grad.shape[d] for d in order]).permute(numeric.inverse(order))


define(
    "fake_quant_bwd",
    "(Tensor grad, Tensor mask, int[] order, *, str backend='') -> Tensor",
    check_fake_quant_bwd,
    _fake_bwd,
)


def mask_order(y: Tensor, group_size: int | None) -> list[int]:
    """The order of the mask: that of memory, which y shares with the dense form of x (groups:
    row-major)."""
    if group_size is not None or y.is_contiguous():
        return []
    order = numeric.memory_order(y)
    assert order is not None, "a row's result is dense"
    return order


def joined(masks: list[Tensor]) -> list[Tensor]:
    """What to save of a list of masks: the piece of memory that they fill side by side, if they do,
    so that what looks after saved tensors (a hook that writes them to disk) sees it once."""
    piece, end = masks[0]._base, 0
    for mask in masks:
        if piece is None or mask._base is not piece or mask.storage_offset() != end:
            return masks
        end += mask.numel()
    return [piece] if piece is not None and piece.numel() == end else masks


def taken_apart(saved: Sequence[Tensor], sizes: list[int]) -> Sequence[Tensor]:
    """The masks of these sizes from what `joined` gave."""
    return saved[0].split(sizes) if len(saved) < len(sizes) else saved


class MaskGrad(torch.autograd.Function):
    """grad * mask, differentiable again: it is linear in grad."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, mask: Tensor, order: list[int], backend: str) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.order, ctx.backend = order, backend
        return call("fake_quant_bwd", backend, grad, mask, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return mask_backward(grad, mask, ctx.order, ctx.backend), None, None, None


def mask_backward(grad: Tensor, mask: Tensor, order: list[int], backend: str) -> Tensor:
    """grad * mask; keeps the graph only if the backward itself is differentiated."""
    mask = mask.contiguous()  # hooks on saved tensors may give back a view
    if torch.is_grad_enabled() and grad.requires_grad and not traced(grad):
        return MaskGrad.apply(grad, mask, order, backend)
    return call("fake_quant_bwd", backend, grad, mask, order)


def mask_backward_list(calls: list[tuple[Tensor, Tensor, list[int]]], backend: str) -> list[Tensor]:
    """mask_backward of every (grad, mask, order), at once unless the backward is differentiated."""
    if torch.is_grad_enabled() or any_traced(args[0] for args in calls):
        return [mask_backward(*args, backend) for args in calls]
    calls = [(grad, mask.contiguous(), order) for grad, mask, order in calls]
    return call_list("fake_quant_bwd", backend, calls)


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.order, ctx.backend = inputs[2], keyword_only_inputs["backend"]


def _bwd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return call("fake_quant_bwd", ctx.backend, grad, ctx.saved_tensors[0], ctx.order), None, None


torch.library.register_autograd("qkernels::fake_quant_bwd", _bwd_backward, setup_context=_setup_bwd)
