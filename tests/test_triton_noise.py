"""The Triton rows of the noise ops and of error_stats: what is their own, against the reference.

On a machine without a GPU the kernels are interpreted, and then every bit is the reference's. The
cases that all rows share are in the parity tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from compare import assert_same, assert_sums, assert_values
from fences import fenced
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference import error_stats as reference_stats
from qkernels.backends.reference import noise as reference_noise
from qkernels.backends.reference import philox as reference_philox
from qkernels.backends.triton import launch
from qkernels.ops import _check

ABSENT = "triton is not installed"
kernels = pytest.importorskip("philox_kernels", reason=ABSENT)
philox = pytest.importorskip("qkernels.backends.triton.philox", reason=ABSENT)
noise = pytest.importorskip("qkernels.backends.triton.noise", reason=ABSENT)
error_stats = pytest.importorskip("qkernels.backends.triton.error_stats", reason=ABSENT)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
LARGEST = numeric.LARGEST_SEED
# around every width that a number passes through
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62 + 12345, LARGEST)


def assert_ulps(got: Tensor, want: Tensor, most: int, what: str) -> None:
    """fp32 values at most `most` steps apart, counted through the integers in their order."""
    a, b = got.contiguous().view(torch.int32).long(), want.contiguous().view(torch.int32).long()
    a, b = (torch.where(v < 0, -(2**31) - v, v) for v in (a, b))
    far = int((a - b).abs().max())
    assert far <= most, f"{what}: {far} ulp apart, at most {most} allowed"


@pytest.mark.parametrize(
    "counter_and_key, words",
    (  # Random123's kat_vectors, philox4x32 of ten rounds
        ("00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ),
    ids=("zeros", "ones", "pi"),
)
def test_known_answers(counter_and_key: str, words: str) -> None:
    given = torch.tensor([int(w, 16) for w in counter_and_key.split()], device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    launch.run(kernels.philox_of, 1, given, out)
    assert [f"{w:08x}" for w in out.tolist()] == words.split()


@pytest.mark.parametrize("seed", NUMBERS)
@pytest.mark.parametrize("step", NUMBERS)
def test_words(seed: int, step: int) -> None:
    for quad, draw in ((2**31 - 1, philox.VALUES), (2**32 - 1, philox.GATES), (2**61 - 2, 0)):
        index = 4 * (quad + torch.arange(2))
        want = torch.stack(reference_philox.words(index, seed, step, int(draw)), 1)
        got = torch.zeros_like(want, device=DEVICE)
        numbers = (philox.as_number(n) for n in (quad, seed, step))
        launch.run(kernels.words_of, 1, got, *numbers, draw=int(draw), size=2)
        assert_same(got.cpu(), want, f"quad {quad}, draw {draw}")


def test_radius_and_turn() -> None:
    edges = [q * 2**21 + d for q in range(9) for d in range(-64, 64)]
    some = torch.cat((torch.tensor(edges), torch.arange(0, 2**24, 521)))
    k = some[(some >= 0) & (some < 2**24)]
    size = launch.power_of_two(k.numel())
    k = torch.cat((k, k.new_full((size - k.numel(),), 2**24 - 1)))
    out = torch.empty(3, size, device=DEVICE)
    launch.run(kernels.polar_of, 1, (k << 8).to(DEVICE), out, size=size)
    want = (reference_philox.radius(k), *reference_philox.turn(k))
    for name, a, b in zip(("radius", "cos", "sin"), out.cpu(), want, strict=True):
        if INTERPRETED:
            assert_same(a, b, name)
        assert_ulps(a, b, 2, name)  # their product is then within 4


# op -> (mean, std or scale, previous mean and std, counter, offset, axis, group_size) -> arguments
Call = tuple[str, Callable[..., tuple[Any, ...]]]
CALLS: dict[str, Call] = {
    "differential": (
        "differential_noise",
        lambda m, s, pm, ps, at, *place: (m, s, pm, ps, *at, 0.7, *place),
    ),
    "differential_same": (
        "differential_noise",
        lambda m, s, pm, ps, at, *place: (m, s, None, None, *at, -1.5, *place),
    ),
    "drop_in": ("drop_in_noise", lambda m, s, pm, ps, at, *place: (m, s, 0.3, *at, 0.7, *place)),
    "drop_in_all": (
        "drop_in_noise",
        lambda m, s, pm, ps, at, *place: (m, s, 1.0, *at, 2.0, *place),
    ),
    "uniform": ("uniform_noise", lambda m, s, pm, ps, at, *place: (s, 0.4, *at, *place)),
    "uniform_all": ("uniform_noise", lambda m, s, pm, ps, at, *place: (s, 1.0, *at, *place)),
}
call_of = pytest.mark.parametrize("call", CALLS)


def stats_for(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, ...]:
    """(mean, std, previous mean, previous std), one entry per channel."""
    generator = torch.Generator().manual_seed(3)
    shape = (4, *numeric.params_shape(x.shape, axis, group_size))
    p = torch.randn(shape, generator=generator).to(x.device, numeric.compute_dtype(x.dtype))
    return p[0], p[1].abs(), p[2], p[3].abs()


def check_noise(
    call: str,
    x: Tensor,
    at: tuple[Any, ...] = (5, 9, None, None),
    offset: int = 0,
    axis: int | None = None,
    group_size: int | None = None,
    inplace: bool = False,
) -> None:
    op, arguments = CALLS[call]
    args = arguments(*stats_for(x, axis, group_size), at, offset, axis, group_size)
    want = getattr(reference_noise, op)(x, *args)
    with fenced():
        got = getattr(noise, op)(x, *args, inplace)
    if inplace:
        assert got is x
        got = torch.empty_like(x).copy_(got)
    if INTERPRETED or op == "uniform_noise":
        assert_same(got, want, call)
    else:
        assert_values(got, want, call)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


@call_of
@pytest.mark.parametrize("offset", (1, 2, 3, 2**34 - 402, LARGEST - 1000))
def test_offset(call: str, offset: int) -> None:
    # quads that begin before x, in the middle of a channel, and where the counter's word overflows
    check_noise(call, randn(5, 160), offset=offset, axis=0)
    check_noise(call, randn(7, 31), offset=offset, axis=1)
    check_noise(call, randn(12, 5, 6).permute(2, 0, 1), offset=offset, axis=0)


@pytest.mark.parametrize("call", ("differential", "drop_in", "uniform"))
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_and_tensors(call: str, number: int) -> None:
    x = randn(6, 9)
    at = torch.tensor(number, device=DEVICE)
    check_noise(call, x, (number, 7, None, None), axis=0)
    check_noise(call, x.t(), (7, number, None, None), axis=0)
    check_noise(call, x, (number, 0, None, at), axis=0)
    check_noise(call, x.t(), (0, 7, at, None), axis=0)


def test_a_negative_number_on_the_device_loses_its_sign() -> None:
    x = randn(40)
    at = [torch.tensor(v, device=DEVICE) for v in (-1, -5)]
    check_noise("drop_in", x, (0, 0, *at))


WALKS = {
    "one_size_apart": lambda: randn(4, 1, 6).permute(2, 1, 0),
    "three_dims": lambda: randn(3, 4, 5).permute(2, 1, 0),
    "channels_last": lambda: randn(2, 5, 3, 16).permute(0, 3, 1, 2),
    "four_dims": lambda: randn(3, 4, 5, 6).permute(3, 1, 2, 0),
    "six_dims": lambda: randn(2, 3, 4, 2, 3, 2).permute(5, 3, 1, 4, 2, 0),
}


@call_of
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("axis", (None, 0, 1))
def test_memory_order(call: str, walk: str, axis: int | None) -> None:
    for inplace in (False, True):
        check_noise(call, WALKS[walk](), axis=axis, inplace=inplace)
    if axis is None:
        check_noise(call, WALKS[walk](), group_size=6)


@call_of
def test_several_programs(call: str) -> None:
    size = 3 * noise.TILE + 5
    check_noise(call, randn(size), offset=3)
    check_noise(call, randn(4, size // 4 // 8 * 8, dtype=torch.bfloat16), axis=0)
    check_noise(call, randn(size // 24, 24).t(), axis=0)


@call_of
def test_64_bit_offsets(call: str) -> None:
    with mock.patch.object(launch, "WIDE_FROM", 0):
        check_noise(call, randn(6, 24), axis=0)
        check_noise(call, randn(5, 3, 7).permute(2, 0, 1), offset=2**33 + 1, axis=1)


@call_of
def test_in_place(call: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        check_noise(call, randn(6, 35, dtype=dtype), axis=0, inplace=True)
    whole = randn(8, 20)
    before = whole.clone()
    check_noise(call, whole[::2, 1::3], axis=1, inplace=True)  # a view with gaps
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[::2, 1::3] = True
    assert_same(whole[~inside], before[~inside], "the gaps")
    dense = randn(4, 6)
    op, arguments = CALLS[call]
    args = arguments(*stats_for(dense, 0, None), (5, 9, None, None), 0, 0, None)
    with mock.patch.object(torch, "empty_like", side_effect=AssertionError("a copy was made")):
        getattr(noise, op)(dense, *args, True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
def test_closed_gates_keep_every_bit(dtype: torch.dtype) -> None:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(-(2**15), 2**15, (2000,), dtype=integer)
    if dtype.itemsize > 2:
        bits = bits * (2 ** (8 * dtype.itemsize - 16) + 7)
    exponent = {torch.float32: 8, torch.float64: 11, torch.float16: 5, torch.bfloat16: 8}[dtype]
    ones = ((1 << exponent) - 1) << (8 * dtype.itemsize - 1 - exponent)
    bits[::2] |= ones  # NaN of every payload
    x = bits.to(DEVICE).view(dtype)
    s = torch.ones((), dtype=numeric.compute_dtype(dtype), device=DEVICE)
    args = (5, 9, None, None, 0, None, None)
    for p in (0.0, 0.5):
        y = noise.uniform_noise(x, s, p, *args)
        index = torch.arange(2000)
        is_open = reference_philox.gate(index, 5, 9, numeric.gate_threshold(p)).to(DEVICE)
        assert int(is_open.sum()) == 0 if p == 0 else 900 < int(is_open.sum()) < 1100
        assert_same(y.view(integer)[~is_open], x.view(integer)[~is_open], f"p={p}")
        assert (
            not bool((y.view(integer) == x.view(integer))[is_open & (x.abs() < 1)].all()) or p == 0
        )


def test_no_gate_is_drawn_unless_p_is_between_0_and_1() -> None:
    x, s = randn(64), torch.ones((), device=DEVICE)
    launched = []

    def note(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        launched.append(constants["GATED"])

    with mock.patch.object(launch, "run", note):
        for p in (0.0, 1e-9, 0.5, 1.0):
            noise.uniform_noise(x, s, p, 1, 2, None, None, 0, None, None)
            noise.drop_in_noise(x, s, s, p, 1, 2, None, None, 1.0, 0, None, None)
    assert launched == [True, True, False, False]


@call_of
def test_invalid_statistics_make_a_channel_nan(call: str) -> None:
    nan, inf = math.nan, math.inf
    x = randn(6, 16)
    std = torch.tensor([1.0, -1.0, nan, inf, 1.0, 0.0], device=DEVICE)
    mean = torch.tensor([0.0, 0.0, 0.0, 0.0, inf, 1.0], device=DEVICE)
    op, arguments = CALLS[call]
    args = arguments(mean, std, mean, std, (5, 9, None, None), 0, 0, None)
    # on the CPU such values are refused before the kernel, on a GPU they are not looked at
    with (
        mock.patch.object(_check, "check_stats"),
    ):
        want = getattr(reference_noise, op)(x, *args)
        got = getattr(noise, op)(x, *args)
    assert bool(got[1].isnan().any())
    assert not bool(got[0].isnan().any() or got[5].isnan().any())
    assert_values(got, want, call)


@call_of
@pytest.mark.parametrize("shape", ((0,), (0, 4), (4, 0)))
def test_empty(call: str, shape: tuple[int, ...]) -> None:
    for inplace in (False, True):
        check_noise(call, randn(*shape), axis=0, offset=2, inplace=inplace)


def stats_args(x: Tensor, axis: int | None, clip: str = "code") -> tuple[Any, ...]:
    """Arguments of error_stats with a scale that clips a few elements of a normal x."""
    shape = numeric.params_shape(x.shape, axis, None)
    scale = torch.full(shape, 0.3, dtype=numeric.compute_dtype(x.dtype), device=x.device)
    return x, scale, None, -8, 7, axis, None, clip


def check_stats(got: Tensor, want: Tensor, what: str) -> None:
    """fp32: one rounding of sums in fp64; the variance is a difference of such sums."""
    assert_same(got.isnan(), want.isnan(), what)
    assert_same(got.isinf(), want.isinf(), what)
    finite = want.isfinite()
    assert_sums(got[finite], want[finite], want[finite].abs(), what)


@pytest.mark.parametrize("clip", numeric.CLIPS)
@pytest.mark.parametrize(
    "make, axis",
    (
        (lambda: randn(40_000), None),  # many parts
        (lambda: randn(3, 4100), 0),
        (lambda: randn(300, 36), 1),
        (lambda: randn(6, 40, 70), 1),
        (lambda: randn(4, 25, 48).permute(0, 2, 1), 1),
        (lambda: randn(9, 1), 0),  # one element a channel
    ),
    ids=("flat", "rows", "columns", "middle", "channels_last", "single"),
)
def test_error_stats(make: Callable[[], Tensor], axis: int | None, clip: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = stats_args(make().to(dtype), axis, clip)
        want = reference_stats.error_stats(*args)
        with fenced():
            got = error_stats.error_stats(*args)
            again = error_stats.error_stats(*args)
        check_stats(got, want, f"{dtype}")
        assert_same(got, again, "run to run")
        if args[0].numel() == 9:
            assert not bool(got[1].any()), "one element has variance 0"


def test_error_stats_where_zero_is_clipped() -> None:
    # what a tile holds beyond the end of a channel must not count
    for shape in ((3, 5), (3, 1100)):
        x, scale, _, *rest = stats_args(randn(*shape), 0)
        args = (x, scale, torch.full((3,), 20, dtype=torch.int32, device=DEVICE), *rest)
        with mock.patch.object(launch, "WIDE_FROM", 0):
            got = error_stats.error_stats(*args)
        check_stats(got, reference_stats.error_stats(*args), f"{shape}")


def test_error_stats_of_a_mean_far_above_the_spread() -> None:
    # all is clipped: e = 7 * 0.3 - x has a mean 1000 times its standard deviation
    x = 1000.0 + randn(2, 5000).double()
    x[1] = 4.1  # the same error everywhere
    for dtype in (torch.float32, torch.float64):
        args = stats_args(x.to(dtype), 0)
        got, want = error_stats.error_stats(*args), reference_stats.error_stats(*args)
        relative = (got.double() - want.double()).abs() / want.double().abs()
        assert bool((relative[:, 0] < 1e-6).all()), relative
        assert 0.0 <= float(got[1, 1]) <= 1e-12 * float(got[0, 1]) ** 2


def test_error_stats_of_an_outlier() -> None:
    x = randn(20_000)
    x[0] = 1e7
    args = stats_args(x, None)
    check_stats(error_stats.error_stats(*args), reference_stats.error_stats(*args), "outlier")


def test_error_stats_of_nan_and_infinity() -> None:
    x = randn(5, 3000)
    x[1, 7], x[2, 2900], x[3, 3] = math.nan, math.inf, -math.inf
    x[4, 1], x[4, 2] = math.inf, -math.inf
    args = stats_args(x, 0)
    check_stats(error_stats.error_stats(*args), reference_stats.error_stats(*args), "not finite")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((3, 40), (3, 4100), (3, 0)))
def test_moving_average(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    got_ema, want_ema = (torch.zeros(5, 3, dtype=dtype, device=DEVICE) for _ in range(2))
    for i in range(3):
        args = stats_args(randn(*shape, dtype=dtype) * (i + 1), 0)
        got = error_stats.error_stats(*args, got_ema, 0.9)
        want = reference_stats.error_stats(*args, want_ema, 0.9)
        assert_sums(got, want, want.abs(), f"statistics {i}")
        assert_sums(got_ema, want_ema, want_ema.abs(), f"average {i}")
        assert_same(got_ema[4], want_ema[4], "weight")


def test_error_stats_dynamic() -> None:
    x = randn(6, 300)
    for method in ("minmax", "lsq"):
        ema = [torch.zeros(5, 6, device=DEVICE) for _ in range(2)]
        args = (x, 0, 15, 0, None, False, method, 99.0, "code")
        want = reference_stats.error_stats_dynamic(*args, ema[0], 0.5)
        with fenced():
            got = error_stats.error_stats_dynamic(*args, ema[1], 0.5)
        assert_values(got[1], want[1], "scale")
        assert_same(got[2], want[2], "zero_point")
        assert_values(got[0], want[0], "statistics")
        assert_values(ema[1], ema[0], "average")
