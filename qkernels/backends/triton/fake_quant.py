"""fake_quant and its straight-through backward. Formula: reference/fake_quant.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import locate, mask_bytes
from qkernels.backends.triton.numeric import load_channel, narrow, quantize_value, widen
from qkernels.ops._check import check_values


@triton.jit(do_not_specialize=["qmin", "qmax"])
def fake_quant_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    qmax,
    outer,
    period,
    inner,
    channels,
    CLIP_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y, and one bit per element where the gradient passes."""
    offset, exists, channel, known, byte, in_mask = locate(
        outer, period, inner, channels, ROWS, GROUPS, MODE, WRAP, WIDE
    )
    x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
    inv, scale, lo, hi = load_channel(scale_ptr, zero_point_ptr, channel, known, qmin, qmax)
    _t, q, inside = quantize_value(x, inv, lo, hi, CLIP_VALUE)
    tl.store(y_ptr + offset, narrow(q * scale, y_ptr.dtype.element_ty), mask=exists)
    if mask_ptr is not None:
        tl.store(mask_ptr + byte, mask_bytes(inside & exists), mask=in_mask)


@triton.jit
def fake_quant_bwd_kernel(
    grad_ptr, mask_ptr, out_ptr, numel, GROUPS: tl.constexpr, WIDE: tl.constexpr
):
    """grad where the bit is set, +0 elsewhere."""
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    group = pid * GROUPS + tl.arange(0, GROUPS)
    offset = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists = offset < numel
    byte = tl.load(mask_ptr + group, mask=group * 8 < numel, other=0).to(tl.int32)
    inside = (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_ptr + offset, mask=exists, other=0.0)
    tl.store(out_ptr + offset, tl.where(inside != 0, grad, 0.0), mask=exists)


def fake_quant(
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
    """-> (y, mask bytes; empty unless asked for)."""
    check_values("fake_quant", scale, zero_point)
    return fake_quant_unchecked(x, scale, zero_point, qmin, qmax, axis, group_size, clip, mask)


def fake_quant_unchecked(
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
    """fake_quant with parameters that may be NaN, as those of a dynamic range."""
    flat, _, layout = numeric.plan(x, axis, group_size)
    y = torch.empty_like(flat)
    bits = x.new_empty(numeric.mask_bytes(x.numel()) if mask else 0, dtype=torch.uint8)
    grid = launch.elementwise(layout, mask)
    launch.run(
        fake_quant_kernel,
        grid.programs,
        flat,
        y,
        bits if mask else None,
        scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(),
        qmin,
        qmax,
        *grid.sizes,
        CLIP_VALUE=clip == "value",
        **grid.constants,
    )
    return launch.like(y, x, group_size), bits


def fake_quant_bwd(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """grad where the mask is set, +0 elsewhere (even where grad is NaN or infinite)."""
    grad = numeric.to_order(grad, order)
    out = torch.empty_like(grad)
    numel = grad.numel()
    groups = launch.TILE // 8
    launch.run(
        fake_quant_bwd_kernel,
        launch.ceil_div(numel, launch.TILE),
        grad,
        mask.contiguous(),
        out,
        numel,
        GROUPS=groups,
        WIDE=launch.is_wide(numel),
    )
    return out
