"""fake_quant: quantize and dequantize with a given, learned or dynamic scale, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops import _check
from qkernels.ops._inplace import is_writable, overwrite
from qkernels.ops._library import call, check, define, traced
from qkernels.ops.fake_quant_bwd import mask_backward, mask_order
from qkernels.ops.fake_quant_dynamic import dynamic_args, dynamic_with_grad
from qkernels.ops.lsq_bwd import lsq_backward


def check_fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    mask: bool,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("fake_quant", "x", x)
    _check.check_choice("fake_quant", "clip", clip, numeric.CLIPS)
    _check.check_granularity("fake_quant", x.shape, axis, group_size)
    _check.check_params("fake_quant", x, scale, zero_point, axis, group_size)


def _fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    size = numeric.mask_bytes(x.numel()) if mask else 0
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8)


define(
    "fake_quant",
    "(Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis, int? group_size, "
    "str clip, bool mask, *, float grad_scale=1.0, str backend='') -> (Tensor, Tensor)",
    check_fake_quant,
    _fake,
)


def kept(
    args: tuple[Any, ...], learned: bool, y: Tensor, mask: Tensor
) -> tuple[tuple[Tensor | None, ...], Any]:
    """(tensors, rest) for the backward: what the LSQ gradient reads, or the mask and its order."""
    if learned:
        return args[:3], args[3:]  # x, scale, zero point
    return (mask,), mask_order(y, args[6])


def learned_grads(
    zero_point: Tensor | None, gx: Tensor, gs: Tensor, gz: Tensor
) -> tuple[Tensor | None, ...]:
    """(grad_x, grad_scale, grad_zero_point) from what lsq_bwd returned."""
    if zero_point is None or not zero_point.is_floating_point():
        return gx, gs, None
    return gx, gs, gz.reshape(zero_point.shape)


def save(
    ctx: Any, args: tuple[Any, ...], learned: bool, y: Tensor, mask: Tensor, backend: str
) -> None:
    """Keep for the backward the mask, or what the LSQ gradient reads."""
    ctx.backend = backend
    ctx.learned = learned
    tensors, ctx.rest = kept(args, learned, y, mask)
    ctx.save_for_backward(*tensors)


def grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(grad_x, grad_scale, grad_zero_point) from what `save` kept."""
    if not ctx.learned:
        (mask,) = ctx.saved_tensors
        return mask_backward(grad, mask, ctx.rest, ctx.backend), None, None
    x, scale, zero_point = ctx.saved_tensors
    args = (grad, x, scale, zero_point, *ctx.rest, ctx.grad_scale)
    return learned_grads(zero_point, *lsq_backward(*args, backend=ctx.backend))


class StraightThrough(torch.autograd.Function):
    """The eager carrier of the gradient of x alone; each tensor that autograd sees costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, args: tuple[Any, ...], backend: str) -> Tensor:
        y, mask = _registry.run_call("fake_quant", backend, (*args, True))
        ctx.save_for_backward(mask)
        ctx.order, ctx.backend = mask_order(y, args[6]), backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return mask_backward(grad, mask, ctx.order, ctx.backend), None, None


class Learned(torch.autograd.Function):
    """The eager carrier of the gradients of x, scale and zero point."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, rest: tuple[Any, ...]
    ) -> Tensor:
        args, ctx.grad_scale, backend = rest
        y, mask = _registry.run("fake_quant", backend, *args, False)
        save(ctx, args, True, y, mask, backend)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *grads(ctx, grad), None


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any
) -> None:
    ctx.grad_scale = keyword_only_inputs["grad_scale"]
    y, mask = output
    # without a mask there is nothing else to go by, and with a learned scale it is not enough
    learned = not inputs[8] or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    save(ctx, inputs[:8], learned, y, mask, keyword_only_inputs["backend"])


def _op_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *grads(ctx, grad), *(None,) * 6


torch.library.register_autograd("qkernels::fake_quant", _op_backward, setup_context=_setup_context)


def lsq_grad_scale(x: Tensor, qmax: int, axis: int | None, group_size: int | None) -> float:
    """1 / sqrt(N Qp) of the LSQ paper, N the elements that share one scale, Qp = max(qmax, 1)."""
    n = x.numel() // max(numeric.channel_count(x.shape, axis, group_size), 1)
    return 1.0 / math.sqrt(max(n, 1) * max(qmax, 1))


def fake_quant_args(
    x: Tensor,
    scale: Tensor | float | None,
    zero_point: Tensor | int | None,
    bits: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    narrow_range: bool,
    method: str,
    percentile: float | None,
    clip: str,
    grad_scale: float | None,
    eager: bool,
) -> tuple[Any, ...]:
    """The schema's arguments less the mask; without a scale, those of fake_quant_dynamic."""
    if scale is None:
        settings = (bits, axis, group_size, symmetric, narrow_range, method, percentile, clip)
        return ranged_args(zero_point, grad_scale, *settings)(x)
    _check.check_tensor("fake_quant", "x", x)
    qmin, qmax = numeric.code_range("fake_quant", bits, symmetric, narrow_range)
    if axis is not None or group_size is not None:
        axis = _check.normal_axis("fake_quant", x, axis, group_size)
    if grad_scale is not None:
        _check.check_number("fake_quant", "grad_scale", grad_scale, "a number or None")
    if method != "minmax" or percentile is not None:
        _check.as_percentile("fake_quant", method, percentile)
    if clip not in numeric.CLIPS:
        _check.check_choice("fake_quant", "clip", clip, numeric.CLIPS)
    if not eager or not _check.fit(x, scale, zero_point, axis, group_size):
        scale = _check.as_scale("fake_quant", x, scale)
        zero_point = _check.as_zero_point("fake_quant", x, zero_point)
        if eager:  # else the op checks
            _check.check_entries("fake_quant", x, scale, zero_point, axis, group_size)
    return x, scale, zero_point, qmin, qmax, axis, group_size, clip


def ranged_args(
    zero_point: Any, grad_scale: Any, *settings: Any, **others: Any
) -> Callable[[Tensor], tuple[Any, ...]]:
    """`dynamic_args` for fake_quant without a scale."""
    if grad_scale is not None:
        _check.check_number("fake_quant", "grad_scale", grad_scale, "a number or None")
    if zero_point is not None:
        raise ValueError("fake_quant: zero_point must be None when scale is None, got a value")
    return dynamic_args("fake_quant", *settings, **others)


def wanted(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[bool, bool]:
    """(whether a gradient is wanted, whether it is that of a learned scale or zero point)."""
    learned = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
    return torch.is_grad_enabled() and (learned or x.requires_grad), learned


def grad_factor(args: tuple[Any, ...], learned: bool, grad_scale: float | None) -> float:
    """The factor of the gradients of scale and zero point; args are the schema's."""
    if grad_scale is not None:
        return grad_scale
    return lsq_grad_scale(args[0], *args[4:7]) if learned else 1.0


def _run(
    args: tuple[Any, ...], dynamic: bool, grad_scale: float | None, backend: str, eager: bool
) -> Tensor:
    """fake_quant with the arguments of `fake_quant_args`."""
    if dynamic:
        return dynamic_with_grad(*args, backend)[0]
    x, scale, zero_point = args[:3]
    needs_grad, learned = wanted(x, scale, zero_point)
    if eager and not needs_grad:
        return _registry.run("fake_quant", backend, *args, False)[0]
    if eager and not learned:
        return StraightThrough.apply(x, args, backend)
    factor = grad_factor(args, learned, grad_scale) if needs_grad else 1.0
    if not eager:
        return call("fake_quant", backend, *args, needs_grad and not learned, grad_scale=factor)[0]
    return Learned.apply(x, scale, zero_point, (args, factor, backend))


def _overwrite(
    args: tuple[Any, ...], dynamic: bool, group_size: int | None, backend: str
) -> Tensor:
    """The same in place; see `fake_quant`."""
    x = args[0]
    if not dynamic and all(wanted(*args[:3])):
        raise ValueError(
            "fake_quant: inplace must be False where scale or zero_point requires grad, got True"
        )
    if traced(x) or not is_writable(x, group_size):
        return x.copy_(_run(args, dynamic, None, backend, not traced(x)))
    op = "fake_quant_dynamic" if dynamic else "fake_quant"
    check(op, *args, True)
    return overwrite(op, backend, args)


def fake_quant(
    x: Tensor,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    clip: str = "code",
    grad_scale: float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Quantize x to `bits` bits and back, with a straight-through (STE) gradient.

    code = clamp(rint(x / scale) + zero_point, qmin, qmax);  y = (code - zero_point) * scale

    Codes are -2^(bits-1) .. 2^(bits-1)-1 if symmetric, else 0 .. 2^bits-1. The gradient of x passes
    where the code was not clipped; one bit per element is saved for it. A scale (or a floating zero
    point) that requires grad gets the gradient of LSQ (Esser et al. 2019, arXiv 1902.08153) and
    LSQ+ (Bhalgat et al. 2020); then x is saved instead.

    Args:
        x: any shape and strides; float32, float64, float16 or bfloat16. Computed in fp32 (fp64 for
            fp64).
        scale: 0-dim per tensor, 1-D with one entry per channel or group; positive. fp32 or narrower
            (fp64 for fp64 x). A float is taken per tensor. None: the range of x, see `method`.
        zero_point: like scale, integer or float (rounded half to even); None is 0.
        bits: 1 .. 16.
        axis: dimension of x that holds the channels; None: one scale for the tensor.
        group_size: one scale per run of group_size elements in row-major order; must divide the
            elements of one x[0]. Not together with axis.
        symmetric: signed codes, and for scale=None a range symmetric about 0 (at bits=1 the codes
            are -1 and 0, and a min-max range of twice max|x| rounds all of x to 0: give a scale).
        narrow_range: leave out the lowest code.
        method: for scale=None (else not used): "minmax", "percentile", "mse" or "lsq"; see
            `quant_range`.
        percentile: for method="percentile": in (50, 100], default 99.
        clip: "code": an element is clipped iff its rounded code is out of range (as torch);
            "value": iff x / scale + zero_point is (LSQ paper). Both gradients follow it.
        grad_scale: factor of the gradients of scale and zero_point. None: 1 / sqrt(N Qp) as in LSQ,
            N the elements per scale, Qp = qmax; 1.0: the plain gradient.
        inplace: write to x and return it; not with a learned scale, whose gradient reads x. torch
            refuses it where another op saved x for its backward (a ReLU saves its result).
        backend: "native", "triton" or "reference" for this call; None: the table's choice.

    Returns:
        A tensor of x's shape and dtype; x's strides if they are dense, else their dense order. NaN
        stays NaN with gradient 0; +-inf go to the ends of the range.

    Raises:
        TypeError: dtype of x, scale or zero_point.
        ValueError: bits, axis, group_size, clip, method, percentile, backend, the size or device of
            scale or zero_point; a scale that is not positive and finite (checked on the CPU; on
            CUDA such a channel is NaN, and QKERNELS_CHECK=1 checks there too).
    """
    eager = not traced(x)
    args = fake_quant_args(
        x,
        scale,
        zero_point,
        bits,
        axis,
        group_size,
        symmetric,
        narrow_range,
        method,
        percentile,
        clip,
        grad_scale,
        eager,
    )
    row = _registry.check_backend(backend, "fake_quant: backend") if backend else ""
    if inplace:
        return _overwrite(args, scale is None, group_size, row)
    return _run(args, scale is None, grad_scale, row, eager)
