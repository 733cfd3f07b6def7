"""The scalar formulas as Triton functions.

Keep in step with csrc/math/numeric.h, fake_quant.h, quantize.h and quant_range.h; the formulas in
words are in qkernels/backends/reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels import numeric

SMALLEST_32 = tl.constexpr(2.0**-126)
SMALLEST_64 = tl.constexpr(2.0**-1022)
LARGEST_ZP = tl.constexpr(float(numeric.LARGEST_ZERO_POINT))
# from here on every value is an integer
EXACT_32 = tl.constexpr(2.0**23)
EXACT_64 = tl.constexpr(2.0**52)
MSE_STEP = tl.constexpr(numeric.MSE_STEP)


@triton.jit
def rint(v):
    """Half to even, never -0.0; NaN and infinities come back as they are.

    Adding and taking away 2^23 (2^52) leaves an integer rounded by the addition; nothing may fuse
    or reassociate it. Unlike libdevice.rint it runs at full rate and in the interpreter too.
    """
    if v.dtype == tl.float64:
        exact: tl.constexpr = EXACT_64
    else:
        exact: tl.constexpr = EXACT_32
    shift = tl.where(v < 0, -exact, exact).to(v.dtype)
    return tl.where(tl.abs(v) < exact, (v + shift) - shift, v)


INTERPRETED = tl.constexpr(not isinstance(rint, triton.JITFunction))


@triton.jit
def widen(x):
    """From the storage dtype to the compute dtype, exactly."""
    if x.dtype == tl.float64:
        wide = x
    elif INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter spoils denormal bf16
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """From the compute dtype to the storage dtype, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the low bits off
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        stored = tl.where(is_nan(v), 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = v.to(dtype)
    return stored


@triton.jit
def is_nan(v):
    """Whether v is NaN, which is equal to nothing."""
    return v != v  # noqa: PLR0124


@triton.jit
def divide(a, b):
    """IEEE division; Triton's own / on fp32 is approximate."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def double(bits):
    """The double that launch.float_bits took apart."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def clamp(v, lo, hi):
    """NaN in v wins."""
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)


@triton.jit
def nan_min(a, b):
    """NaN in either wins."""
    return tl.where((a < b) | is_nan(a), a, b)


@triton.jit
def nan_max(a, b):
    """NaN in either wins."""
    return tl.where((a > b) | is_nan(a), a, b)


@triton.jit
def at_least_smallest(scale):
    """A scale below which 1 / scale is not finite is raised; NaN stays."""
    if scale.dtype == tl.float64:
        smallest: tl.constexpr = SMALLEST_64
    else:
        smallest: tl.constexpr = SMALLEST_32
    return tl.where(scale < smallest, smallest, scale)


@triton.jit
def is_valid(scale, zero_point):
    """The scale is positive, finite and normal, and the zero point small enough to be exact."""
    if scale.dtype == tl.float64:
        smallest: tl.constexpr = SMALLEST_64
    else:
        smallest: tl.constexpr = SMALLEST_32
    infinity = float("inf")
    return (scale >= smallest) & (scale < infinity) & (tl.abs(zero_point) <= LARGEST_ZP)


@triton.jit
def make_channel(scale, zero_point, qmin, qmax):
    """-> (1 / scale, scale, lo, hi), the first two NaN if the channel is invalid; lo and hi bound
    code - zero_point."""
    zp = tl.where(tl.abs(zero_point) <= LARGEST_ZP, rint(zero_point), float("nan"))
    s = tl.where(is_valid(scale, zero_point), scale, float("nan"))
    one = tl.full(s.shape, 1.0, s.dtype)
    return divide(one, s), s, qmin.to(s.dtype) - zp, qmax.to(s.dtype) - zp


@triton.jit
def load_channel(scale_ptr, zero_point_ptr, channel, known, qmin, qmax):
    """make_channel of the parameters in memory; without a zero point it is 0."""
    scale = tl.load(scale_ptr + channel, mask=known, other=1.0)
    zero_point = tl.zeros(scale.shape, scale.dtype)
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + channel, mask=known, other=0).to(scale.dtype)
    return make_channel(scale, zero_point, qmin, qmax)


@triton.jit
def quantize_value(x, inv, lo, hi, CLIP_VALUE: tl.constexpr):
    """-> (t = x / scale, q = code - zero_point, where the straight-through gradient passes)"""
    t = x * inv
    r = rint(t)
    q = clamp(r, lo, hi)
    inside = (t >= lo) & (t <= hi) if CLIP_VALUE else r == q
    return t, q, inside


@triton.jit
def code_value(x, inv, lo, hi, qmin):
    """code = q + zero_point; what has no code gets the code of zero."""
    _t, q, _inside = quantize_value(x, inv, lo, hi, False)
    q = tl.where(is_nan(q), clamp(tl.zeros_like(q), lo, hi), q)
    from_qmin = q - lo
    unknown = is_nan(from_qmin)
    # without a finite zero point: 0, or the nearest code to it (unsigned narrow_range starts at 1)
    zero = tl.maximum(0 - qmin, 0)
    return tl.where(unknown, zero, tl.where(unknown, 0.0, from_qmin).to(tl.int32)) + qmin


@triton.jit
def range_to_qparams(lo, hi, qmin, qmax, SYMMETRIC: tl.constexpr):
    """-> (scale, zero point as int32)"""
    bottom = qmin.to(lo.dtype)
    top = qmax.to(lo.dtype)
    levels = tl.zeros_like(lo) + (top - bottom)
    if SYMMETRIC:
        scale = at_least_smallest(divide(nan_max(-lo, hi), levels * 0.5))
        zero_point = tl.zeros(lo.shape, tl.int32)
    else:
        zero = tl.zeros_like(lo)
        low = nan_min(lo, zero)
        scale = at_least_smallest(divide(nan_max(hi, zero) - low, levels))
        zp = clamp(bottom - rint(divide(low, scale)), bottom, top)
        zero_point = tl.where(is_nan(zp), bottom, zp).to(tl.int32)
    return scale, zero_point


@triton.jit
def store_range(
    scale_ptr, zero_point_ptr, range_ptr, c, channels, lo, hi, qmin, qmax, SYMMETRIC: tl.constexpr
):
    """Bounds [C] of the channels c, and the parameters that follow."""
    scale, zero_point = range_to_qparams(lo, hi, qmin, qmax, SYMMETRIC)
    known = c < channels
    tl.store(scale_ptr + c, scale, mask=known)
    tl.store(zero_point_ptr + c, zero_point, mask=known)
    if range_ptr is not None:
        tl.store(range_ptr + c, lo, mask=known)
        tl.store(range_ptr + channels + c, hi, mask=known)


@triton.jit
def mse_shrink(k, dtype: tl.constexpr):
    """1 - k MSE_STEP, the factor of the k-th candidate of the MSE search."""
    return (1.0 - tl.full([1], MSE_STEP, tl.float64) * k).to(dtype)


@triton.jit
def interpolate(a, b, w):
    """a + w (b - a), the linear interpolation between order statistics."""
    return tl.where(w > 0, a + w * (b - a), a)


@triton.jit
def compensated_add(total, lost, value):
    """Knuth's two-sum: total + value, with what rounding took away gathered in lost."""
    new = total + value
    part = new - total
    return new, lost + ((total - (new - part)) + (value - part))


@triton.jit
def row_sum(total, lost):
    """Sum in double over the last axis of what compensated_add gathered; inf and NaN stay."""
    lost = tl.where(is_nan(lost), 0.0, lost)
    return tl.sum(total.to(tl.float64) + lost.to(tl.float64), axis=1)
