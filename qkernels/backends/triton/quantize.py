"""Integer codes and back, packed or not. Formula: reference/quantize.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.index import load_params, locate
from qkernels.backends.triton.numeric import code_value, load_channel, narrow, widen
from qkernels.ops._check import check_values


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16; writes 1 (2 or 4 for wider codes)
@triton.jit(do_not_specialize=["qmin", "qmax"])
def quantize_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    qmax,
    outer,
    period,
    inner,
    channels,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One code per element, where the element was."""
    offset, exists, row, group = locate(tl.program_id(0), outer, period, ROWS, GROUPS, WIDE)
    x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
    inv, _scale, lo, hi = load_params(
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
    code = code_value(x, inv, lo, hi, qmin)
    tl.store(code_ptr + offset, code.to(code_ptr.dtype.element_ty), mask=exists)


@triton.jit
def locate_packed(
    length, row_bytes, rows, inner, channels, BITS: tl.constexpr, BYTES: tl.constexpr, WIDE
):
    """The codes [BYTES, 8 / BITS] of this program in row-major order.

    -> (byte [BYTES], whether it exists, element, whether it exists, channel)
    """
    PER: tl.constexpr = 8 // BITS
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    byte = pid * BYTES + tl.arange(0, BYTES)
    row = byte // row_bytes
    column = (byte % row_bytes)[:, None] * PER + tl.arange(0, PER)[None, :]
    element = row[:, None] * length + column
    known = row < rows
    return byte, known, element, known[:, None] & (column < length), (element // inner) % channels


# ideal bytes an element: reads 4 in fp32, 2 in fp16 and bf16; writes BITS / 8
@triton.jit(do_not_specialize=["qmin", "qmax"])
def quantize_packed_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    qmax,
    length,
    row_bytes,
    rows,
    inner,
    channels,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Codes of BITS bits side by side, every row of `length` codes padded with 0 to whole bytes."""
    byte, known, element, exists, channel = locate_packed(
        length, row_bytes, rows, inner, channels, BITS, BYTES, WIDE
    )
    x = widen(tl.load(x_ptr + element, mask=exists, other=0.0))
    inv, _scale, lo, hi = load_channel(scale_ptr, zero_point_ptr, channel, exists, qmin, qmax)
    code = tl.where(exists, code_value(x, inv, lo, hi, qmin), 0) & ((1 << BITS) - 1)
    packed = tl.sum(code << (tl.arange(0, 8 // BITS) * BITS)[None, :], axis=1)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=known)


# ideal bytes an element: reads 1 (2 or 4 for wider codes), writes 4 in fp32, 2 in fp16 and bf16
@triton.jit(do_not_specialize=["qmin"])
def dequantize_kernel(
    code_ptr,
    y_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    outer,
    period,
    inner,
    channels,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = (code - zero_point) * scale, where the code was."""
    offset, exists, row, group = locate(tl.program_id(0), outer, period, ROWS, GROUPS, WIDE)
    code = tl.load(code_ptr + offset, mask=exists, other=0).to(tl.int32)
    _inv, scale, lo, _hi = load_params(
        scale_ptr,
        zero_point_ptr,
        row,
        group,
        qmin,
        qmin,
        outer,
        period,
        inner,
        channels,
        MODE,
        WRAP,
    )
    y = ((code - qmin).to(scale.dtype) + lo) * scale
    tl.store(y_ptr + offset, narrow(y, y_ptr.dtype.element_ty), mask=exists)


# ideal bytes an element: reads BITS / 8, writes 4 in fp32, 2 in fp16 and bf16
@triton.jit(do_not_specialize=["qmin"])
def dequantize_packed_kernel(
    packed_ptr,
    y_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    length,
    row_bytes,
    rows,
    inner,
    channels,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """As dequantize_kernel, of codes side by side in bytes, in two's complement if SIGNED."""
    byte, known, element, exists, channel = locate_packed(
        length, row_bytes, rows, inner, channels, BITS, BYTES, WIDE
    )
    packed = tl.load(packed_ptr + byte, mask=known, other=0).to(tl.int32)
    shift = (tl.arange(0, 8 // BITS) * BITS)[None, :]
    code = (packed[:, None] >> shift) & ((1 << BITS) - 1)
    if SIGNED:
        code -= (code >> (BITS - 1)) << BITS
    _inv, scale, lo, _hi = load_channel(scale_ptr, zero_point_ptr, channel, exists, qmin, qmin)
    y = ((code - qmin).to(scale.dtype) + lo) * scale
    tl.store(y_ptr + element, narrow(y, y_ptr.dtype.element_ty), mask=exists)


def packed_sizes(packed: Tensor, x: Tensor, axis: int | None, group_size: int | None) -> tuple:
    """(programs, (length, row_bytes, rows, inner, channels), constants) of a row-major x."""
    _, channels, inner = numeric.layout_of(x.shape, [], axis, group_size)
    bytes_ = 256
    rows = packed.shape[:-1].numel()
    sizes = (x.shape[-1], packed.shape[-1], rows, inner, channels)
    constants = {"BYTES": bytes_, "WIDE": launch.is_wide(x.numel())}
    return launch.ceil_div(packed.numel(), bytes_), sizes, constants


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
) -> Tensor:
    """-> codes in code_dtype(qmin, qmax) with x's strides, or packed bytes if pack is 1, 2 or 4."""
    check_values("quantize", scale, zero_point)
    scale = scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    if pack:
        x = x.contiguous()  # codes are packed in row-major order
        shape = (*x.shape[:-1], (x.shape[-1] * pack + 7) // 8)
        packed = x.new_empty(shape, dtype=torch.uint8)
        programs, sizes, constants = packed_sizes(packed, x, axis, group_size)
        args = (x, packed, scale, zero_point, qmin, qmax, *sizes)
        launch.run(quantize_packed_kernel, programs, *args, BITS=pack, **constants)
        return packed
    flat, _, layout = numeric.plan(x, axis, group_size)
    codes = torch.empty_like(flat, dtype=numeric.code_dtype(qmin, qmax))
    grid = launch.elementwise(layout, False)
    args = (flat, codes, scale, zero_point, qmin, qmax, *grid.sizes)
    launch.run(quantize_kernel, grid.programs, *args, **grid.constants)
    return launch.like(codes, x, group_size)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> (code - zp) * scale in dtype; size is the length of the last dim of packed codes."""
    check_values("dequantize", scale, zero_point)
    scale = scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    if pack:
        codes = codes.contiguous()
        y = codes.new_empty((*codes.shape[:-1], size), dtype=dtype)
        programs, sizes, constants = packed_sizes(codes, y, axis, group_size)
        args = (codes, y, scale, zero_point, qmin, *sizes)
        launch.run(
            dequantize_packed_kernel, programs, *args, SIGNED=qmin < 0, BITS=pack, **constants
        )
        return y
    flat, _, layout = numeric.plan(codes, axis, group_size)
    y = torch.empty_like(flat, dtype=dtype)
    grid = launch.elementwise(layout, False)
    args = (flat, y, scale, zero_point, qmin, *grid.sizes)
    launch.run(dequantize_kernel, grid.programs, *args, **grid.constants)
    return launch.like(y, codes, group_size)
