"""Ranges, rounding constants and memory layout: the Python side of the numerics contract.

The C++ side is csrc/math/numeric.h. docs/numerics.md states both in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

# bound once: they are asked for several times in every eager call
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METHODS = ("minmax", "percentile", "mse", "lsq")
CLIPS = ("code", "value")
DEFAULT_PERCENTILE = 99.0

# up to here code - zero_point is exact in fp32 for every code; equal to kLargestZeroPoint in C++
LARGEST_ZERO_POINT = 1 << 23

# the MSE search shrinks the min-max range by k % for k = 0 .. 79
MSE_CANDIDATES = 80
MSE_STEP = 0.01

# seeds and steps are 0 .. 2^63 - 1; the last bit of the counter tells draws apart
LARGEST_SEED = (1 << 63) - 1


# a dense tensor seen in memory order as [outer, channels, inner], one scale per channel
Layout = tuple[int, int, int]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel computes in: fp64 for fp64, fp32 for everything narrower."""
    return _FLOAT64 if dtype is _FLOAT64 else _FLOAT32


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest valid scale: below it 1 / scale is not finite in the compute dtype."""
    return torch.finfo(compute_dtype(dtype)).tiny


def code_range(op: str, bits: int, symmetric: bool, narrow_range: bool) -> tuple[int, int]:
    """(qmin, qmax): signed codes when symmetric, else unsigned; narrow_range drops the lowest."""
    if type(bits) is not int:
        raise TypeError(f"{op}: bits must be an int in 1..16, got {bits!r}")
    if type(symmetric) is not bool or type(narrow_range) is not bool:
        for name, value in (("symmetric", symmetric), ("narrow_range", narrow_range)):
            if type(value) is not bool:
                raise TypeError(f"{op}: {name} must be a bool, got {value!r}")
    if not 1 <= bits <= 16:
        raise ValueError(f"{op}: bits must be in 1..16, got {bits}")
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    if narrow_range:
        if bits == 1:
            raise ValueError(f"{op}: narrow_range must be False for bits=1, got True")
        qmin += 1
    return qmin, qmax


def memory_order(x: Tensor) -> list[int] | None:
    """Dims of a dense x from slowest to fastest in memory; [] means row-major, None not dense."""
    if x.is_contiguous():
        return []
    stride = x.stride()
    # numbers, not bools: those of symbolic sizes cannot be ordered
    order = sorted(range(x.dim()), key=lambda d: (0 if x.size(d) == 1 else 1, -stride[d]))
    return order if x.permute(order).is_contiguous() else None


def dense(x: Tensor) -> tuple[Tensor, list[int]]:
    """x itself when it is dense in some order of dims, else a dense copy; with its memory order."""
    order = memory_order(x)
    if order is None:
        # preserve_format keeps the order of the strides, as torch.empty_like does
        x = torch.empty_like(x).copy_(x)
        order = memory_order(x)
        assert order is not None, "empty_like is always dense"
    return x, order


def to_order(x: Tensor, order: list[int]) -> Tensor:
    """x, or a copy of it, laid out in memory in the given order of dims ([] is row-major)."""
    if not order:
        return x.contiguous()
    return x.permute(order).contiguous().permute(inverse(order))


def inverse(order: list[int]) -> list[int]:
    """The inverse permutation of order."""
    result = [0] * len(order)
    for position, dim in enumerate(order):
        result[dim] = position
    return result


def layout_of(
    shape: torch.Size, order: list[int], axis: int | None, group_size: int | None
) -> Layout:
    """[outer, channels, inner] in memory order; axis is already in 0..ndim-1 (see check_axis)."""
    if axis is None:
        numel = shape.numel()
        return (1, 1, numel) if group_size is None else (1, numel // group_size, group_size)
    if axis == 0 and not order:
        return 1, shape[0], shape[1:].numel()
    outer = inner = 1
    before = True
    for dim in order or range(len(shape)):
        if dim == axis:
            before = False
        elif before:
            outer *= shape[dim]
        else:
            inner *= shape[dim]
    return outer, shape[axis], inner


def plan(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, list[int], Layout]:
    """(dense x, memory order, layout): what a row needs before it can run over raw memory.

    Groups are runs in row-major order, so a grouped x that is not row-major is copied; every other
    dense layout is used as it lies.
    """
    if x.is_contiguous():
        if axis is None and group_size is None:
            return x, [], (1, 1, x.numel())
        return x, [], layout_of(x.shape, [], axis, group_size)
    if group_size is not None:
        return x.contiguous(), [], layout_of(x.shape, [], None, group_size)
    x, order = dense(x)
    return x, order, layout_of(x.shape, order, axis, group_size)


def channel_count(shape: torch.Size, axis: int | None, group_size: int | None) -> int:
    """Number of scales for a tensor of this shape."""
    if axis is not None:
        return shape[axis]
    return 1 if group_size is None else shape.numel() // group_size


def params_shape(shape: torch.Size, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """Shape of scale and zero_point: 0-dim per tensor, else one entry per channel."""
    if axis is None and group_size is None:
        return ()
    return (channel_count(shape, axis, group_size),)


def mask_bytes(numel: int) -> int:
    """Size of the mask saved for the backward: one bit per element."""
    return (numel + 7) // 8


def packed_shape(shape: torch.Size, pack: int) -> list[int]:
    """Shape of the bytes that hold codes of this shape, `pack` bits each; rows fill whole bytes."""
    return [*shape[:-1], (shape[-1] * pack + 7) // 8]


def percentile_ranks(percentile: float, n: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """((k, w) of the lower, (k, w) of the upper bound): the value is x_(k) + w (x_(k+1) - x_(k)).

    The ranks are those of torch.quantile with linear interpolation, q (n - 1), taken in fp64. The
    lower bound is the mirror image of the upper one.
    """
    upper = min(percentile / 100.0, 1.0) * (n - 1)
    k = int(upper)
    w = upper - k
    if w == 0.0:
        return (n - 1 - k, 0.0), (k, 0.0)
    return (n - 2 - k, 1.0 - w), (k, w)


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """The narrowest integer dtype that holds the codes (torch's uint16 has too few ops to use)."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= qmin and qmax <= info.max:
            return dtype
    return torch.int32


def exact_sqrt(x: Tensor) -> Tensor:
    """sqrt(x), correctly rounded (in fp64 down to 1e-290). torch's own root need not be: with MKL 1
    value in 100 is off by a unit, and what is drawn with it would differ from device to device."""
    if x.dtype is not torch.float64:
        return x.to(torch.float64).sqrt().to(x.dtype)
    y = x.sqrt()
    # y^2 = square + rest without error (Dekker 1971), then a step of Newton's method
    upper = y * (2.0**27 + 1)
    upper = upper - (upper - y)
    lower = y - upper
    square = y * y
    rest = (upper * upper - square + 2.0 * upper * lower) + lower * lower
    mended = y + (x - square - rest) / (2.0 * y)
    return torch.where(mended.isfinite(), mended, y)


def gate_threshold(p: float) -> int:
    """A gate is open where its 24-bit uniform is below this: with probability p."""
    return round(p * (1 << 24))


def logical_walk(x: Tensor) -> list[tuple[int, int]]:
    """(size, row-major stride) of each dim of a dense x, from slowest to fastest in memory.

    Walking these in order visits x in memory order and gives each element's row-major index. Dims
    that continue each other are merged, so a row-major x is [(numel, 1)].
    """
    order = memory_order(x)
    assert order is not None, "x must be dense"
    stride, step = [0] * x.dim(), 1
    for d in reversed(range(x.dim())):
        stride[d], step = step, step * x.shape[d]
    walk: list[tuple[int, int]] = []
    for d in order or range(x.dim()):
        size = x.shape[d]
        if size == 1:
            continue
        if walk and walk[-1][1] == size * stride[d]:
            walk[-1] = (walk[-1][0] * size, stride[d])
        else:
            walk.append((size, stride[d]))
    return walk or [(1, 1)]
