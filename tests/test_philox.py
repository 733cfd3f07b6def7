"""The generator, the laws of the numbers made from its words, and what docs/noise.md says of them.

Thresholds of the statistics: seeds are fixed, so a test passes always or never. A limit of 5
standard deviations would fail a right generator for one seed in 1.7 million; it is 5.5 where
hundreds of figures are looked at.
"""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from compare import assert_same
from rows import Runner, params, run
from torch import Tensor

import qkernels
from qkernels import numeric
from qkernels.backends.reference import philox

LAST = numeric.LARGEST_SEED
MILLION = 1_000_000
BACKENDS = ("native", "reference")
backend_of = pytest.mark.parametrize("backend", BACKENDS)
DOC = Path(__file__).parent.parent / "docs" / "noise.md"

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, words
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox_of_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Salmon et al. 2011 in Python's own integers."""
    c, (k0, k1) = counter, key
    for r in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        a, b = (k0 + r * 0x9E3779B9) % 2**32, (k1 + r * 0xBB67AE85) % 2**32
        c = (hi1 ^ c[1] ^ a, lo1, hi0 ^ c[3] ^ b, lo0)
    return c


def word_of_ints(i: int, seed: int, step: int, gate: bool) -> int:
    """The word of element i, by the contract's layout of counter and key."""
    quad, low = i // 4, 2**32
    counter = (quad % low, quad // low, step % low, step // low + (gate << 31))
    return philox_of_ints(counter, (seed % low, seed // low))[i % 4]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=("zeros", "ones", "pi"))
def test_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    assert philox_of_ints(counter, key) == words
    got = philox.philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in got) == words


# the corners of the counter: both halves of every number, and carries between them
COUNTERS = [
    (0, 0, 0),
    (0, 3, 5),
    (2**34 - 6, 2**32 - 1, 2**32 - 1),
    (2**40 + 1, 2**32, 2**32),
    (LAST - 16, LAST, LAST),
    (123456789123, 0x0123456789ABCDEF, 0x7EDCBA9876543210),
]


@pytest.mark.parametrize(("start", "seed", "step"), COUNTERS)
@pytest.mark.parametrize("draw", (philox.VALUES, philox.GATES))
def test_counter_layout(start: int, seed: int, step: int, draw: int) -> None:
    index = torch.arange(16) + start
    got = philox.own_word(index, seed, step, draw).tolist()
    want = [word_of_ints(start + i, seed, step, draw != 0) for i in range(16)]
    assert got == want


@pytest.mark.parametrize("runner", params("uniform_noise"))
@pytest.mark.parametrize(("start", "seed", "step"), COUNTERS)
def test_words_of_every_row(runner: Runner, start: int, seed: int, step: int) -> None:
    x = torch.zeros(16, device=runner.device)
    # 2^25 u = 2 k + 1 - 2^24 is whole and below 2^24: fp32 holds it, and k is seen as it is
    scale = torch.full((), 2.0**25, device=runner.device)
    p = 0.5
    shown = run(runner, x, scale, 1.0, seed, step, None, None, start, None, None)
    gated = run(runner, x, scale, p, seed, step, None, None, start, None, None)
    k = [(int(v) - 1 + 2**24) // 2 for v in shown.tolist()]
    assert k == [word_of_ints(start + i, seed, step, False) >> 8 for i in range(16)]
    is_open = [word_of_ints(start + i, seed, step, True) >> 8 < p * 2**24 for i in range(16)]
    assert (gated != 0).tolist() == is_open


def test_uniform_and_gate_of_the_extreme_words() -> None:
    index = torch.arange(4)
    words = tuple(torch.full((4,), w) for w in (0, 0xFF, 0xFFFFFF00, 0xFFFFFFFF))
    with mock.patch.object(philox, "words", lambda *_: words):
        u = philox.uniform(index, 0, 0)
        gates = [philox.gate(index, 0, 0, t).tolist() for t in (0, 1, 2**24 - 1, 2**24)]
    least = 0.5 - 2.0**-25
    assert u.tolist() == [-least, -least, least, least]
    assert gates == [
        [False] * 4,
        [True, True, False, False],
        [True, True, False, False],
        [True] * 4,
    ]


def test_gate_threshold() -> None:
    for p, want in (
        (0.0, 0),
        (1.0, 2**24),
        (0.5, 2**23),
        (2.0**-24, 1),
        (2.0**-26, 0),
        (1 / 3, 5592405),
    ):
        assert numeric.gate_threshold(p) == want


def chunks() -> list[Tensor]:
    """All 24-bit numbers."""
    return list(torch.arange(2**24).split(2**21))


def test_radius_of_every_word() -> None:
    worst = 0.0
    for k in chunks():
        got = philox.radius(k)
        want = (-2.0 * ((k + 1).double() * 2.0**-24).log()).sqrt()
        assert bool(got.isfinite().all())
        worst = max(worst, float(((got.double() - want).abs() / want.clamp(min=1e-30)).max()))
    # 2^-24 is half a unit in the last place: a unit or so of the logarithm, whose relative size the
    # root halves, and the root's own rounding
    assert worst < 2.0**-23
    assert float(philox.radius(torch.tensor(2**24 - 1))) == 0.0
    largest = float(philox.radius(torch.tensor(0)))
    assert largest == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-7)


def test_turn_of_every_word() -> None:
    worst = 0.0
    for k in chunks():
        angle = k.double() * (2 * math.pi / 2**24)
        for got, want in zip(philox.turn(k), (angle.cos(), angle.sin()), strict=True):
            worst = max(worst, float((got.double() - want).abs().max()))
    # half a unit in the last place near 1 is 2^-25; the angle and the sums round three times more
    assert worst < 2.0**-23
    quarters = torch.arange(4) << 22
    cos, sin = philox.turn(quarters)
    assert cos.tolist() == [1.0, 0.0, -1.0, 0.0] and sin.tolist() == [0.0, 1.0, 0.0, -1.0]


def test_normals_use_the_words_of_their_pair() -> None:
    seed, step = 7, 11
    got = philox.normal(torch.arange(8), seed, step)
    for i, value in enumerate(got.tolist()):
        first = i & ~1  # the pair's even element
        a, b = (word_of_ints(j, seed, step, False) >> 8 for j in (first, first + 1))
        r, angle = math.sqrt(-2 * math.log((a + 1) / 2**24)), 2 * math.pi * b / 2**24
        want = r * (math.sin(angle) if i & 1 else math.cos(angle))
        assert value == pytest.approx(want, abs=2e-6)


def normals(n: int | tuple, seed: int, step: int, **kwargs: object) -> Tensor:
    """eps itself: 0 + 1 * (0 + 1 * eps)."""
    args = dict(p=1.0, seed=seed, step=step, **kwargs)
    return qkernels.drop_in_noise(torch.zeros(n), (0.0, 1.0), **args)


def uniforms(n: int | tuple, seed: int, step: int, **kwargs: object) -> Tensor:
    return qkernels.uniform_noise(torch.zeros(n), 1.0, seed=seed, step=step, **kwargs)


def gates(n: int, p: float, seed: int, step: int, **kwargs: object) -> Tensor:
    """Where gates are open; u is never 0."""
    return uniforms(n, seed, step, p=p, **kwargs) != 0


def correlations(rows: Tensor) -> Tensor:
    """The correlation matrix of rows, without its diagonal."""
    c = torch.corrcoef(rows.double())
    return c[~torch.eye(len(rows), dtype=torch.bool)]


def kolmogorov(levels: Tensor) -> float:
    """The largest distance of an empirical distribution function from the law of the draws, from
    the law's own distribution function at each draw."""
    n = len(levels)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    ordered = levels.sort().values
    return float(torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))


@backend_of
def test_normals_of_a_million(backend: str) -> None:
    x = normals(MILLION, 1, 2, backend=backend).double()
    # variances of x, x^2, x^3, x^4 for a standard normal x
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = float((x**power).mean())
        assert abs(moment - want) < 5 * math.sqrt(variance / MILLION), f"moment {power}"
    for lane in (
        slice(0, None, 4),
        slice(1, None, 4),
        slice(2, None, 4),
        slice(3, None, 4),
        slice(None),
    ):
        part = x[lane]
        distance = kolmogorov(torch.special.ndtr(part))
        # the Kolmogorov distribution is beyond 1.95 with probability 0.001; at a million draws
        # this sees a distribution function that is off by 0.002
        assert distance * math.sqrt(len(part)) < 1.95, f"lane {lane.start}"
    assert float(x.abs().max()) < 5.77  # sqrt(48 ln 2), for the smallest 24-bit uniform


@backend_of
def test_uniforms_of_a_million(backend: str) -> None:
    u = uniforms(MILLION, 3, 4, backend=backend).double()
    assert float(u.abs().max()) < 0.5 and bool((u != 0).all())
    # variances of u, u^2, u^3: 1/12, 1/80 - 1/144, 1/448
    for power, want, variance in ((1, 0, 1 / 12), (2, 1 / 12, 1 / 180), (3, 0, 1 / 448)):
        moment = float((u**power).mean())
        assert abs(moment - want) < 5 * math.sqrt(variance / MILLION), f"moment {power}"
    distance = kolmogorov(u + 0.5)
    assert distance * math.sqrt(MILLION) < 1.95


@backend_of
@pytest.mark.parametrize("p", (0.0, 1e-3, 0.25, 0.5, 0.9, 1.0))
def test_share_of_open_gates(backend: str, p: float) -> None:
    n = 400_000
    share = float(gates(n, p, 5, 6, backend=backend).double().mean())
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n)  # exact where p is 0 or 1


@backend_of
def test_gates_open_for_every_larger_p(backend: str) -> None:
    some, more = (gates(50_000, p, 5, 6, backend=backend) for p in (0.3, 0.6))
    assert bool((some <= more).all()) and int(more.sum()) > int(some.sum())


@backend_of
def test_the_four_words_of_a_quad_are_independent(backend: str) -> None:
    n = 250_000
    for draws in (normals(4 * n, 8, 9, backend=backend), uniforms(4 * n, 8, 9, backend=backend)):
        lanes = draws.reshape(n, 4).t()
        # the squares too: the two normals of a pair share their radius
        for rows in (lanes, lanes**2):
            assert float(correlations(rows).abs().max()) < 5 / math.sqrt(n)


# neighbours in either half of the words, swapped pairs, and the step before 0
STREAMS = [
    (0, 0), (0, 1), (0, 2), (0, LAST), (1, 0), (2, 0), (1, 2), (2, 1), (0, 2**32), (2**32, 0),
    (0, 2**31), (2**31, 0), (2**32, 2**32), (2**62, 0), (0, 2**62), (LAST, 0), (LAST, LAST),
    (LAST - 1, LAST),
]  # fmt: skip


@backend_of
@pytest.mark.parametrize("draw", (normals, uniforms))
def test_streams_and_steps_are_independent(backend: str, draw: Callable[..., Tensor]) -> None:
    n = 40_000
    rows = torch.stack([draw(n, seed, step, backend=backend) for seed, step in STREAMS])
    for some in (rows, rows**2, rows.roll(1, dims=1) * rows):
        assert float(correlations(some).abs().max()) < 5.5 / math.sqrt(n)


@backend_of
def test_channels_are_independent(backend: str) -> None:
    n = 10_000
    x = qkernels.differential_noise(
        torch.zeros(32, n), (torch.arange(32.0), torch.ones(32)), seed=3, step=1, backend=backend
    )
    assert float(correlations(x).abs().max()) < 5.5 / math.sqrt(n)
    lags = torch.stack([x.reshape(-1)[k : 31 * n + k] for k in range(12)])
    assert float(correlations(lags).abs().max()) < 5.5 / math.sqrt(31 * n)


@backend_of
def test_values_and_gates_are_independent(backend: str) -> None:
    n = 400_000
    is_open = gates(n, 0.5, 5, 6, backend=backend).float()
    eps, u = normals(n, 5, 6, backend=backend), uniforms(n, 5, 6, backend=backend)
    for values in (eps, eps**2, u, u**2):
        rows = torch.stack((values, is_open))
        assert float(correlations(rows).abs().max()) < 5 / math.sqrt(n)
    kept = qkernels.drop_in_noise(
        torch.zeros(n), (0.0, 1.0), p=0.5, seed=5, step=6, backend=backend
    )
    assert_same(kept, torch.where(is_open != 0, eps, 0.0))


def code_blocks(language: str) -> list[str]:
    """The blocks of the page in a language."""
    text = DOC.read_text(encoding="utf-8")
    return [part.split("\n```\n")[0] + "\n" for part in text.split(f"\n```{language}\n")[1:]]


def reader() -> dict[str, Any]:
    """What a reader has who pastes the page's program: nothing of qkernels or torch."""
    names: dict[str, Any] = {"__name__": "reader"}
    exec(compile(code_blocks("python")[0], str(DOC), "exec"), names)
    return names


def test_the_program_of_the_page() -> None:
    (program,) = code_blocks("python")
    assert "torch" not in program and "qkernels" not in program
    names = reader()
    for start, seed, step in COUNTERS:
        zeros, at = torch.zeros(16), range(start, start + 16)
        counter = dict(seed=seed, step=step, offset=start)
        eps = qkernels.drop_in_noise(zeros, (0.0, 1.0), p=1.0, **counter)
        u = qkernels.uniform_noise(zeros, 1.0, **counter)
        is_open = qkernels.uniform_noise(zeros, 1.0, p=0.3, **counter) != 0
        want = [names["normal"](seed, step, i) for i in at]
        assert_same(eps, torch.tensor(want, dtype=torch.float64).float(), "normal")
        want = [names["uniform"](seed, step, i) for i in at]
        assert_same(u, torch.tensor(want, dtype=torch.float64).float(), "uniform")
        assert is_open.tolist() == [names["gate"](seed, step, i, 0.3) for i in at]


def test_the_examples_of_the_page() -> None:
    names = reader() | {"torch": torch, "qkernels": qkernels}
    blocks = code_blocks("pycon")
    assert len(blocks) == 2
    report: list[str] = []
    for block in blocks:
        example = doctest.DocTestParser().get_doctest(block, names, "example", str(DOC), 0)
        doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not report, "".join(report)
