"""Counter-based random numbers: Philox4x32-10 and the draws made from its words.

Philox4x32-10 is the generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3",
Random123): ten rounds turn a counter of four words of 32 bits and a key of two into four random
words. Element i of a tensor takes word i mod 4 of

    key     = (seed low, seed high)
    counter = (i/4 low, i/4 high, step low, step high | draw << 31)

so that a draw depends on (seed, step, draw, i) and nothing else. Draw 0 gives values, draw 1 the
gates of a Bernoulli mask. From words to numbers, in fp32 with every operation rounded by itself:

    uniform   k = word >> 8;  u = (2 k + 1 - 2^24) 2^-25        in (-1/2, 1/2), never 0
    gate      k < rint(p 2^24)                                 true with probability p
    normal    Box-Muller on the words (a, b) of a pair: a = words 0, 2; b = words 1, 3
              r = sqrt(-2 ln((k_a + 1) 2^-24)),  angle = 2 pi k_b 2^-24
              even elements r cos(angle), odd elements r sin(angle); at most 5.77 in size

The logarithm, sine and cosine are the polynomials below (least squares reweighted to near minimax,
fitted for this purpose), so that every backend can give the same bits. Keep in step with
csrc/math/philox.h and qkernels/backends/triton/philox.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

# what a counter's last word adds for a draw: steps are below 2^63, so the bit is free
VALUES, GATES = 0, 1 << 31

UNIFORM_BITS = 24
TURN_STEP = 2.0 * torch.pi / 2**UNIFORM_BITS  # angle of one step of a 24-bit uniform
LN2 = 0.69314718055994530942

# ln(1 + f) = f + f^2 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; constant term first
LOG = (
    -0.49999991059303284,
    0.33333951234817505,
    -0.25001755356788635,
    0.19962070882320404,
    -0.165705144405365,
    0.14917989075183868,
    -0.14307482540607452,
    0.08734750747680664,
)
# sin(a) = a + a^3 S(a^2), cos(a) = 1 - a^2/2 + a^4 C(a^2) on [-pi/4, pi/4]
SIN = (-0.16666655242443085, 0.008332177996635437, -0.00019517297914717346)
COS = (0.04166664555668831, -0.001388736767694354, 2.443845005473122e-05)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors that hold words of 32 bits, and two words -> four such tensors.

    A product of two words wraps around in int64; its 64 bits are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & WORD) ^ c1 ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(index: Tensor, seed: int, step: int, draw: int) -> tuple[Tensor, ...]:
    """The four words of the quad of elements that holds each index (int64, any shape)."""
    quad = index >> 2
    high = torch.full_like(quad, (step >> 32) | draw)
    counter = (quad & WORD, quad >> 32, torch.full_like(quad, step & WORD), high)
    return philox(counter, (seed & WORD, seed >> 32))


def own_word(index: Tensor, seed: int, step: int, draw: int) -> Tensor:
    """Word i mod 4 of each index."""
    w = words(index, seed, step, draw)
    lane = index & 3
    low, high = torch.where(lane == 0, w[0], w[1]), torch.where(lane == 2, w[2], w[3])
    return torch.where(lane < 2, low, high)


def uniform(index: Tensor, seed: int, step: int) -> Tensor:
    """fp32 in (-1/2, 1/2)."""
    k = own_word(index, seed, step, VALUES) >> 8
    return (2 * k + 1 - 2**UNIFORM_BITS).to(torch.float32) * 2.0**-25


def gate(index: Tensor, seed: int, step: int, threshold: int) -> Tensor:
    """Booleans, true with probability threshold / 2^24."""
    return (own_word(index, seed, step, GATES) >> 8) < threshold


def normal(index: Tensor, seed: int, step: int) -> Tensor:
    """fp32, standard normal."""
    w = words(index, seed, step, VALUES)
    low = (index & 3) < 2
    r = radius(torch.where(low, w[0], w[2]) >> 8)
    cos, sin = turn(torch.where(low, w[1], w[3]) >> 8)
    return r * torch.where((index & 1) == 0, cos, sin)


def radius(k: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (k + 1) 2^-24."""
    u = (k + 1).to(torch.float32) * 2.0**-24
    bits = u.view(torch.int32)
    # u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    p = horner(LOG, f)
    ln = e.to(torch.float32) * fp32(LN2) + (f + f * f * p)
    return numeric.exact_sqrt(ln * -2.0)


def turn(k: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of 2 pi k 2^-24, by quarter turns from [-pi/4, pi/4]."""
    quarter = (k + (1 << 21)) >> 22
    a = (k - (quarter << 22)).to(torch.float32) * fp32(TURN_STEP)
    z = a * a
    sin = a + a * z * horner(SIN, z)
    cos = 1.0 - z * 0.5 + z * z * horner(COS, z)
    swap = (quarter & 1) != 0
    x, y = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    x = torch.where(((quarter + 1) & 2) != 0, -x, x)
    return x, torch.where((quarter & 2) != 0, -y, y)


def horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """The polynomial at x, a multiplication and an addition at a time."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def fp32(value: float) -> float:
    """A constant as the fp32 kernels hold it."""
    return float(torch.tensor(value, dtype=torch.float32))
