"""Range, scale and fake quantization of a tensor.

Channels that lie in one piece and fit in a tile are read once, in one launch; otherwise the range
comes first and fake_quant follows. Formula: reference/fake_quant_dynamic.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import numeric
from qkernels.backends.triton import launch
from qkernels.backends.triton.fake_quant import fake_quant_unchecked
from qkernels.backends.triton.index import mask_bytes
from qkernels.backends.triton.numeric import (
    is_nan,
    make_channel,
    narrow,
    quantize_value,
    range_to_qparams,
    widen,
)
from qkernels.backends.triton.quant_range import quant_range

# bytes of a channel, in the compute dtype, that one program holds in registers: 32 values of fp32 a
# thread of sixteen warps, or of fp64 a thread of eight (of sixteen they would be spilled)
HELD_BYTES = 1 << 16


# ideal bytes an element: reads 4, writes 4 (+ 1/8 of a mask) in fp32; 2 and 2 in fp16 and bf16
@triton.jit(do_not_specialize=["qmin", "qmax"])
def fake_quant_dynamic_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    scale_ptr,
    zero_point_ptr,
    qmin,
    qmax,
    channels,
    n,
    SYMMETRIC: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Min-max and fake quantization of C channels of n elements each; a mask needs whole bytes."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    group = tl.arange(0, GROUPS)
    e = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    row = c
    if WIDE:
        row = c.to(tl.int64)
    offset = row[:, None, None] * n + e
    exists = (c[:, None, None] < channels) & (e < n)
    x = widen(tl.load(x_ptr + offset, mask=exists, other=0.0))
    nans = is_nan(x).to(tl.int32)
    nan = tl.max(tl.max(nans, axis=2), axis=1) != 0
    least = tl.min(tl.min(tl.where(exists, x, float("inf")), axis=2), axis=1)
    most = tl.max(tl.max(tl.where(exists, x, float("-inf")), axis=2), axis=1)
    least = tl.where(nan, float("nan"), least)
    most = tl.where(nan, float("nan"), most)
    scale, zero_point = range_to_qparams(least, most, qmin, qmax, SYMMETRIC)
    tl.store(scale_ptr + c, scale, mask=c < channels)
    tl.store(zero_point_ptr + c, zero_point, mask=c < channels)
    inv, scale, lo, hi = make_channel(scale, zero_point.to(scale.dtype), qmin, qmax)
    inv, scale = inv[:, None, None], scale[:, None, None]
    lo, hi = lo[:, None, None], hi[:, None, None]
    _t, q, inside = quantize_value(x, inv, lo, hi, CLIP_VALUE)
    tl.store(y_ptr + offset, narrow(q * scale, y_ptr.dtype.element_ty), mask=exists)
    if mask_ptr is not None:
        byte = row[:, None] * (n // 8) + group[None, :]
        in_mask = (c[:, None] < channels) & (group[None, :] * 8 < n)
        tl.store(mask_ptr + byte, mask_bytes(inside & exists), mask=in_mask)


def held_warps(elements: int) -> int:
    """Warps of a program that holds a tile: up to 16 elements a thread with four, else 32."""
    return 4 if elements <= launch.TILE else 8 if elements <= 8192 else 16


def fake_quant_dynamic(
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
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (y, or x in place; scale, zero point as int32, mask bytes; empty unless asked for)."""
    flat, _, layout = numeric.plan(x, axis, group_size)
    outer, channels, n = launch.simplified(layout)
    compute = numeric.compute_dtype(x.dtype)
    held = HELD_BYTES // compute.itemsize
    whole_bytes = n % 8 == 0 or channels == 1 or not mask
    if method != "minmax" or outer != 1 or not 0 < n <= held or not whole_bytes:
        scale, zp, _ = quant_range(x, qmin, qmax, axis, group_size, symmetric, method, percentile)
        args = (x, scale, zp, qmin, qmax, axis, group_size, clip, mask, inplace)
        y, bits = fake_quant_unchecked(*args)
        return y, scale, zp, bits
    shape = numeric.params_shape(x.shape, axis, group_size)
    scale = x.new_empty(shape, dtype=compute)
    zp = x.new_empty(shape, dtype=torch.int32)
    y = launch.output(flat, x, inplace)
    bits = x.new_empty(numeric.mask_bytes(x.numel()) if mask else 0, dtype=torch.uint8)
    groups = launch.power_of_two(launch.ceil_div(n, 8))
    block = min(launch.power_of_two(channels), max(1, launch.TILE // (8 * groups)))
    launch.run(
        fake_quant_dynamic_kernel,
        launch.ceil_div(channels, block),
        flat,
        y,
        bits if mask else None,
        scale,
        zp,
        qmin,
        qmax,
        channels,
        n,
        SYMMETRIC=symmetric,
        CLIP_VALUE=clip == "value",
        C=block,
        GROUPS=groups,
        WIDE=launch.is_wide(x.numel()),
        num_warps=held_warps(8 * groups),
    )
    return launch.result(y, x, group_size, inplace), scale, zp, bits
