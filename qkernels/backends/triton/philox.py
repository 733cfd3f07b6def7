"""Philox4x32-10 and the draws made from its words, as Triton functions.

The counter layout and the formulas in words are in reference/philox.py, which also holds the
constants. Keep in step with csrc/math/philox.h and qkernels/backends/reference/philox.py.

Every operation is in fp32 and rounded by itself: no library logarithm, sine or cosine, and no
multiply fused with an add, so that the words, the uniforms and the normals are the reference's.
A draw has two forms. By quads, a program turns one counter into the four elements that share it;
by elements (EACH), an element works out its own counter and keeps one of the four words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels import numeric
from qkernels.backends.reference import philox as contract

MULTIPLIER_0 = tl.constexpr(contract.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(contract.MULTIPLIERS[1])
WEYL_0 = tl.constexpr(contract.WEYL[0])
WEYL_1 = tl.constexpr(contract.WEYL[1])
ROUNDS = tl.constexpr(contract.ROUNDS)
VALUES = tl.constexpr(contract.VALUES)
GATES = tl.constexpr(contract.GATES)
LARGEST_SEED = tl.constexpr(numeric.LARGEST_SEED)

LN2 = tl.constexpr(contract.LN2)
TURN_STEP = tl.constexpr(contract.TURN_STEP)
LOG = tl.constexpr(contract.LOG)
SIN = tl.constexpr(contract.SIN)
COS = tl.constexpr(contract.COS)
LOG_DEGREE = tl.constexpr(len(contract.LOG) - 1)
TURN_DEGREE = tl.constexpr(len(contract.SIN) - 1)


def as_number(value: int) -> int:
    """A number of 63 bits as a kernel's argument: with the sign bit set, so that it has the same
    type whatever its size (but for the last 2^31), and kernels are not compiled for each."""
    return value - (1 << 63)


@triton.jit
def load_number(number):
    """An argument of as_number, or the number behind a pointer to int64, as int64."""
    value = tl.load(number) if number.dtype.is_ptr() else number.to(tl.int64)
    return value & LARGEST_SEED


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on a counter of four words and a key of two, all uint32 -> four words."""
    for _ in tl.static_range(ROUNDS):
        low_0, high_0 = c0 * MULTIPLIER_0, tl.umulhi(c0, MULTIPLIER_0)
        low_1, high_1 = c2 * MULTIPLIER_1, tl.umulhi(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


@triton.jit
def words(quad, seed, step, DRAW: tl.constexpr):
    """The four words of each quad; quad, seed and step are int64 and not negative."""
    c0, c1 = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
    c2, c3 = step.to(tl.uint32), (step >> 32).to(tl.uint32) | DRAW
    return philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def in_order(v0, v1, v2, v3):
    """[.., Q] values of elements 0 to 3 of each quad -> [.., 4 Q] values of the elements."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def own_words(place, seed, step, DRAW: tl.constexpr, EACH: tl.constexpr):
    """Word i mod 4 of every element. place: int64, quads [.., Q], or elements if EACH."""
    if EACH:
        w0, w1, w2, w3 = words(place >> 2, seed, step, DRAW)
        lane = place & 3
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    else:
        w0, w1, w2, w3 = words(place, seed, step, DRAW)
        word = in_order(w0, w1, w2, w3)
    return word


@triton.jit
def uniform(place, seed, step, EACH: tl.constexpr):
    """fp32 in (-1/2, 1/2). place: as own_words."""
    k = (own_words(place, seed, step, VALUES, EACH) >> 8).to(tl.int32)
    return (2 * k + (1 - (1 << 24))).to(tl.float32) * (2.0**-25)


@triton.jit
def gate(place, seed, step, threshold, EACH: tl.constexpr):
    """Booleans, true with probability threshold / 2^24. place: as own_words."""
    k = (own_words(place, seed, step, GATES, EACH) >> 8).to(tl.int32)
    return k < threshold


@triton.jit
def normal(place, seed, step, EACH: tl.constexpr):
    """fp32, standard normal: Box-Muller on the words (0, 1) and (2, 3). place: as own_words."""
    if EACH:
        w0, w1, w2, w3 = words(place >> 2, seed, step, VALUES)
        low = (place & 3) < 2
        cos, sin = turn(tl.where(low, w1, w3))
        z = radius(tl.where(low, w0, w2)) * tl.where((place & 1) == 0, cos, sin)
    else:
        w0, w1, w2, w3 = words(place, seed, step, VALUES)
        r, q = radius(w0), radius(w2)
        r_cos, r_sin = turn(w1)
        q_cos, q_sin = turn(w3)
        z = in_order(r * r_cos, r * r_sin, q * q_cos, q * q_sin)
    return z


@triton.jit
def radius(word):
    """sqrt(-2 ln u), u = (k + 1) 2^-24 of the upper 24 bits k."""
    u = ((word >> 8).to(tl.int32) + 1).to(tl.float32) * (2.0**-24)
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    ln = e.to(tl.float32) * LN2 + (f + f * f * horner(f, LOG, LOG_DEGREE))
    return tl.sqrt_rn(ln * -2.0)


@triton.jit
def turn(word):
    """(cos, sin) of 2 pi k 2^-24 of the upper 24 bits k, by quarter turns from [-pi/4, pi/4]."""
    k = (word >> 8).to(tl.int32)
    quarter = (k + (1 << 21)) >> 22
    a = (k - (quarter << 22)).to(tl.float32) * TURN_STEP
    z = a * a
    sin = a + a * z * horner(z, SIN, TURN_DEGREE)
    cos = 1.0 - z * 0.5 + z * z * horner(z, COS, TURN_DEGREE)
    swap = (quarter & 1) != 0
    x, y = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return flip(x, (quarter + 1) & 2), flip(y, quarter & 2)


@triton.jit
def flip(v, two):
    """-v where two is 2, v where it is 0; Triton's own -v is 0 - v, which loses the sign of 0."""
    return (v.to(tl.int32, bitcast=True) ^ (two << 30)).to(tl.float32, bitcast=True)


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """The polynomial at x, constant term first, a multiplication and an addition at a time."""
    total = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        total = total * x + COEFFICIENTS[DEGREE - i]
    return total
