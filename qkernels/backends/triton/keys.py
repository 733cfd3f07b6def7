"""Floating-point values as unsigned integers in the same order, for selection by digits."""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.backends.triton.numeric import double, interpolate, is_nan, widen


@triton.jit
def to_key(x, BITS: tl.constexpr):
    """Unsigned integers in the order of x; NaN is the greatest. Keys of 16 bits are kept in 32."""
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    SIGN: tl.constexpr = 1 << (BITS - 1)
    NAN: tl.constexpr = (1 << BITS) - 1
    if BITS == 64:
        bits = x.to(tl.uint64, bitcast=True)
    elif BITS == 32:
        bits = x.to(tl.uint32, bitcast=True)
    else:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    key = tl.where((bits & SIGN) != 0, bits ^ NAN, bits | SIGN)
    return tl.where(is_nan(widen(x)), tl.full([1, 1], NAN, KEY), key)


@triton.jit
def from_key(key, dtype: tl.constexpr, BITS: tl.constexpr):
    """The value of a key [C] in the compute dtype; dtype is the storage dtype."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    NAN: tl.constexpr = (1 << BITS) - 1
    bits = tl.where((key & SIGN) != 0, key ^ SIGN, key ^ NAN)
    if BITS == 16:
        value = bits.to(tl.uint16).to(dtype, bitcast=True)
    else:
        value = bits.to(dtype, bitcast=True)
    return widen(value)


@triton.jit
def bound(key, after, w_bits, nan, dtype: tl.constexpr, BITS: tl.constexpr):
    """Interpolation between two order statistics; NaN if the channel holds one."""
    a = from_key(key, dtype, BITS)
    b = from_key(after, dtype, BITS)
    value = interpolate(a, b, double(w_bits).to(a.dtype))
    return tl.where(nan, float("nan"), value)
