"""fake_quant and its straight-through backward. Formula: reference/fake_quant.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import load_params, locate, locate_mask, mask_bytes
from qkernels.backends.triton.numeric import narrow, quantize_value, widen
from qkernels.ops._check import check_values


@triton.jit
def fake_quant_tile(
    pid,
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
    """Tile pid: y, and one bit per element where the gradient passes."""
    offset, exists, row, group = locate(pid, outer, period, ROWS, GROUPS, WIDE)
    x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
    inv, scale, lo, hi = load_params(
        scale_ptr,
        zero_point_ptr,
        row,
        group,
        qmin,
        qmax,
        outer,
        period,
        inner,
        channels,
        MODE,
        WRAP,
    )
    _t, q, inside = quantize_value(x, inv, lo, hi, CLIP_VALUE)
    tl.store(y_ptr + offset, narrow(q * scale, y_ptr.dtype.element_ty), mask=exists)
    if mask_ptr is not None:
        byte, in_mask = locate_mask(outer, period, row, group)
        tl.store(mask_ptr + byte, mask_bytes(inside & exists), mask=in_mask)


# ideal bytes an element: reads 4, writes 4 (+ 1/8 of a mask) in fp32; 2 and 2 in fp16 and bf16
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
    """A tile a program."""
    fake_quant_tile(
        tl.program_id(0),
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
        CLIP_VALUE,
        ROWS,
        GROUPS,
        MODE,
        WRAP,
        WIDE,
    )


@triton.jit
def fake_quant_bwd_tile(
    pid, grad_ptr, mask_ptr, out_ptr, numel, GROUPS: tl.constexpr, WIDE: tl.constexpr
):
    """Tile pid: grad where the bit is set, +0 elsewhere."""
    if WIDE:
        pid = pid.to(tl.int64)
    group = pid * GROUPS + tl.arange(0, GROUPS)
    offset = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists = offset < numel
    byte = tl.load(mask_ptr + group, mask=group * 8 < numel, other=0).to(tl.int32)
    inside = (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_ptr + offset, mask=exists, other=0.0)
    tl.store(out_ptr + offset, tl.where(inside != 0, grad, 0.0), mask=exists)


# ideal bytes an element: reads 4 + 1/8 of the mask, writes 4 in fp32; 2 and 2 in fp16 and bf16
@triton.jit
def fake_quant_bwd_kernel(
    grad_ptr, mask_ptr, out_ptr, numel, GROUPS: tl.constexpr, WIDE: tl.constexpr
):
    """A tile a program."""
    fake_quant_bwd_tile(tl.program_id(0), grad_ptr, mask_ptr, out_ptr, numel, GROUPS, WIDE)


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
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> (y, or x itself in place; mask bytes; empty unless asked for)."""
    check_values("fake_quant", scale, zero_point)
    args = (x, scale, zero_point, qmin, qmax, axis, group_size, clip, mask, inplace)
    return fake_quant_unchecked(*args)


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
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """fake_quant with parameters that may be NaN, as those of a dynamic range."""
    flat, _, layout = numeric.plan(x, axis, group_size)
    y = launch.output(flat, x, inplace)
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
    return launch.result(y, x, group_size, inplace), bits


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
