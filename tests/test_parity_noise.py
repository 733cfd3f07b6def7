"""Every row of the noise ops and of error_stats against the reference, from the table."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from cases import CASES, LARGE_CASES, Case, params_for, special_values
from compare import assert_same, assert_values, assert_where
from fences import fenced
from rows import Runner, reference, run
from test_error_stats import assert_stats, errors
from test_parity import case_of, dtype_of, large_case, ranges_for, row_of
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference import philox
from qkernels.backends.reference.error_stats import move_average
from qkernels.backends.reference.noise import indices
from qkernels.ops import _check

LAST = numeric.LARGEST_SEED
NOISE = ("differential_noise", "drop_in_noise", "uniform_noise")
NORMAL_ULPS = 4  # of Triton's normals, by the contract

# torch refuses to write to memory that elements share
WRITABLE = [c for c in CASES if c.name != "expanded"]


class Counter:
    """What a call's draws depend on, and the rest of its numbers."""

    def __init__(
        self, seed: int, step: int, offset: int, p: float, at: bool = False, prev: bool = True
    ) -> None:
        self.seed, self.step, self.offset, self.p, self.at, self.prev = (
            seed,
            step,
            offset,
            p,
            at,
            prev,
        )

    def fields(self, device: str) -> tuple[Any, ...]:
        """seed, step, seed_at, step_at of the schema."""
        if not self.at:
            return self.seed, self.step, None, None
        return 0, 0, *(torch.tensor(v, device=device) for v in (self.seed, self.step))

    def __repr__(self) -> str:
        return f"Counter({vars(self)})"


COUNTERS = (
    Counter(2**40 + 3, 2**33, 2**34 - 6, 1.0, at=True),  # the quad's number passes 2^32
    Counter(LAST, 0, 5, 0.3, prev=False),  # the step before is 2^63 - 1
    Counter(1, 2, 0, 0.6),
)
RAMP = 0.7


def counters_for(runner: Runner) -> tuple[Counter, ...]:
    return COUNTERS[:2] if runner.slow else COUNTERS


def law_of(x: Tensor, case: Case) -> list[Tensor]:
    """mean, std, earlier mean, earlier std: an entry per channel, all different."""
    shape = numeric.params_shape(x.shape, case.axis, case.group_size)
    n = torch.Size(shape).numel()
    ramp = torch.arange(1, n + 1, dtype=numeric.compute_dtype(x.dtype), device=x.device) / max(n, 1)
    rows = (ramp - 0.4, ramp * 0.3, 0.2 - ramp, ramp.flip(0) * 0.9)
    return [r.reshape(shape) for r in rows]


def arguments(op: str, x: Tensor, case: Case, c: Counter, law: list[Tensor]) -> tuple[Any, ...]:
    """Those of the schema."""
    counter, place = c.fields(x.device.type), (c.offset, case.axis, case.group_size)
    if op == "differential_noise":
        prev = law[2:] if c.prev else [None, None]
        return x, *law[:2], *prev, *counter, RAMP, *place
    if op == "drop_in_noise":
        return x, *law[:2], c.p, *counter, RAMP, *place
    return x, law[1], c.p, *counter, *place


def over(p: Tensor, x: Tensor, case: Case) -> Tensor:
    """One value per element of x, in fp64."""
    p = p.double()
    if case.axis is not None:
        return p.reshape([-1 if d == case.axis else 1 for d in range(x.dim())]).expand(x.shape)
    if case.group_size is not None:
        return p.repeat_interleave(case.group_size).reshape(x.shape)
    return p.expand(x.shape)


def ulp(v: Tensor) -> Tensor:
    """The distance to the next larger fp32 number."""
    return (torch.nextafter(v.abs(), torch.tensor(torch.inf, device=v.device)) - v.abs()).double()


def slack(op: str, x: Tensor, y: Tensor, case: Case, c: Counter, law: list[Tensor]) -> Tensor:
    """By how much y may differ: NORMAL_ULPS of each normal, and a unit of each rounding since."""
    mean, std, *prev = (over(p, x, case) for p in law)
    terms = [(mean, std, c.step)]
    if op == "differential_noise":
        before = (c.step - 1) & LAST
        terms.append((*prev, before) if c.prev else (mean, std, before))
    unit = torch.finfo(numeric.compute_dtype(x.dtype)).eps
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for m, s, step in terms:
        eps = philox.normal(indices(x, c.offset), c.seed, step)
        rounded = (s * eps).abs() + 3 * ((s * eps).abs() + m.abs())
        total += RAMP * (NORMAL_ULPS * s * ulp(eps) + unit * rounded)
    store = torch.finfo(x.dtype)
    return total + max(unit, store.eps) * y.double().abs() + store.smallest_normal * store.eps


def check_noise(
    runner: Runner, op: str, got: Tensor, want: Tensor, x: Tensor, case: Case, c: Counter, law: list
) -> None:
    """To the bit; normals of Triton to NORMAL_ULPS."""
    what = f"{op} at {c}"
    if runner.row.backend != "triton" or op == "uniform_noise":
        assert_same(got, want, what)
        return
    assert got.stride() == want.stride() and got.dtype is want.dtype, what
    finite = want.isfinite()
    assert_same(torch.where(finite, 0, got), torch.where(finite, 0, want), what)
    off = (got.double() - want.double()).abs()
    assert_where(~finite | (off <= slack(op, x, want, case, c, law)), got, want, what)
    if op == "drop_in_noise":
        is_open = philox.gate(indices(x, c.offset), c.seed, c.step, numeric.gate_threshold(c.p))
        assert_same(torch.where(is_open, 0, got), torch.where(is_open, 0, x), f"{what}: closed")


def check_rows(runner: Runner, op: str, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    law = law_of(x, case)
    for c in counters_for(runner):
        args = arguments(op, x, case, c, law)
        want = reference(op, *args)
        before = x.clone()
        for aligned in (c.at,) if runner.slow else (True, False):
            with fenced(aligned):
                got = run(runner, *args)
            check_noise(runner, op, got, want, x, case, c, law)
        assert_same(x.clone(), before, "x itself")


def whole(x: Tensor) -> Tensor:
    """All of the memory that x is a view of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def check_in_place(runner: Runner, op: str, case: Case, dtype: torch.dtype) -> None:
    for c in counters_for(runner)[-1:]:
        x = case.tensor(dtype, device=runner.device)
        law = law_of(x, case)
        args = arguments(op, x, case, c, law)
        want = reference(op, *args)
        before, memory = x.clone(), whole(x).clone()
        got = run(runner, *args, True)
        assert got is x
        like = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(want)
        check_noise(runner, op, x, like, before, case, c, law)
        memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
        assert_same(whole(x), memory, "memory around the view")


@row_of("differential_noise")
@case_of
@dtype_of
def test_differential_noise(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    check_rows(runner, "differential_noise", case, dtype)


@row_of("drop_in_noise")
@case_of
@dtype_of
def test_drop_in_noise(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    check_rows(runner, "drop_in_noise", case, dtype)


@row_of("uniform_noise")
@case_of
@dtype_of
def test_uniform_noise(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    check_rows(runner, "uniform_noise", case, dtype)


@row_of("differential_noise", large=True)
@large_case
def test_differential_noise_large(runner: Runner, case: Case) -> None:
    check_rows(runner, "differential_noise", case, torch.float32)
    check_in_place(runner, "differential_noise", case, torch.bfloat16)


@row_of("drop_in_noise", large=True)
@large_case
def test_drop_in_noise_large(runner: Runner, case: Case) -> None:
    check_rows(runner, "drop_in_noise", case, torch.float32)


@row_of("uniform_noise", large=True)
@large_case
def test_uniform_noise_large(runner: Runner, case: Case) -> None:
    check_rows(runner, "uniform_noise", case, torch.float16)


@pytest.mark.parametrize("case", WRITABLE, ids=lambda c: c.name)
@row_of("differential_noise")
def test_differential_noise_in_place(runner: Runner, case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_in_place(runner, "differential_noise", case, dtype)


@pytest.mark.parametrize("case", WRITABLE, ids=lambda c: c.name)
@row_of("drop_in_noise")
def test_drop_in_noise_in_place(runner: Runner, case: Case) -> None:
    for dtype in (torch.float32, torch.float16):
        check_in_place(runner, "drop_in_noise", case, dtype)


@pytest.mark.parametrize("case", WRITABLE, ids=lambda c: c.name)
@row_of("uniform_noise")
def test_uniform_noise_in_place(runner: Runner, case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        check_in_place(runner, "uniform_noise", case, dtype)


SPECIAL = Case("special", lambda r: special_values().to(r().device, r().dtype))
INVALID = Case("invalid", lambda r: r(6, 12), axis=0)


def rows_of(ops: tuple[str, ...], checked: bool = True) -> pytest.MarkDecorator:
    """Each row of some ops; `checked`: also those that look at values and refuse them."""
    found = [
        pytest.param(op, *p.values, id=f"{op}-{p.id}", marks=p.marks)
        for op in ops
        for p in row_of(op).args[1]
        if checked or p.id != "cpu-native"
    ]
    return pytest.mark.parametrize(("op", "runner"), found)


@rows_of(NOISE)
@dtype_of
def test_special_values(op: str, runner: Runner, dtype: torch.dtype) -> None:
    check_rows(runner, op, SPECIAL, dtype)


@rows_of(NOISE, checked=False)
def test_invalid_channel_is_nan_where_values_are_not_checked(op: str, runner: Runner) -> None:
    x = INVALID.tensor(torch.float32, device=runner.device)
    law = law_of(x, INVALID)
    bad = torch.tensor([-0.1, torch.nan, torch.inf, -torch.inf], device=x.device)
    law[1][1:5] = bad  # std, or the scale of uniform noise
    law[0][5] = torch.inf
    c = Counter(1, 2, 0, 1.0)
    # as on CUDA, where no call waits for the device to look at its values
    with mock.patch.object(_check, "check_stats", lambda *_: None):
        y = run(runner, *arguments(op, x, INVALID, c, law))
    nan = torch.tensor([False, True, True, True, True, op != "uniform_noise"], device=x.device)
    assert_same(y.isnan(), nan[:, None].expand(6, 12).contiguous())


@rows_of(("error_stats",), checked=False)
@pytest.mark.parametrize("axis", (0, 1))
def test_invalid_scale_is_nan_where_values_are_not_checked(
    op: str, runner: Runner, axis: int
) -> None:
    x = torch.randn(6, 90).to(runner.device)
    x = x if axis == 0 else x.t().contiguous()
    scale = torch.tensor([0.3, 0.0, -0.3, torch.nan, torch.inf, 1e-39]).to(runner.device)
    args = (scale, None, -8, 7, axis, None, "code")
    module = importlib.import_module(runner.row.target.partition(":")[0])
    with mock.patch.object(module, "check_values", lambda *_: None):
        stats = run(runner, x, *args)
    assert stats[:3, 1:].isnan().all() and bool((stats[3, 1:] == 1).all())
    e, clipped = errors(x, *args)
    assert_stats(stats[:, :1], e[:1], clipped[:1])


def check_error_stats(runner: Runner, case: Case, dtype: torch.dtype, bits_range: tuple) -> None:
    x = case.tensor(dtype, device=runner.device)
    qmin, qmax = numeric.code_range("test", *bits_range)
    scale, zp = (p.to(runner.device) for p in params_for(x, case, qmin, qmax))
    scale = scale / 2  # more to clip
    for clip, zero_point in (("code", zp), ("value", zp.to(scale.dtype) + 0.3), ("value", None)):
        args = (x, scale, zero_point, qmin, qmax, case.axis, case.group_size, clip)
        # a view with gaps is copied between fences, and CUDA's order of summation depends on
        # the alignment: all runs of a case are behind the same fences
        with fenced(aligned=clip == "code"):
            got = run(runner, *args)
            again = run(runner, *args)
            check_average(runner, args, got)
        assert got.shape == reference("error_stats", *args).shape
        assert_stats(got, *errors(*args), f"clip={clip}")
        assert_same(again, got, "run to run")


def check_average(runner: Runner, args: tuple, stats: Tensor) -> None:
    """The moving average in the same launch follows the statistics of that launch."""
    channels = stats[0].numel()
    start = torch.rand(5, channels, dtype=stats.dtype).to(stats.device)
    start[4] *= 0.9
    want, got = start.clone(), start.clone()
    move_average(want, stats.reshape(4, channels), 0.9)
    assert_same(run(runner, *args, got, 0.9), stats, "statistics with an average")
    if runner.row.backend == "triton":  # whose division need not be IEEE's
        assert_values(got, want, "average")
    else:
        assert_same(got, want, "average")


@row_of("error_stats")
@case_of
@dtype_of
def test_error_stats(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    for bits_range in ranges_for(runner)[:3]:
        check_error_stats(runner, case, dtype, bits_range)


@row_of("error_stats")
def test_error_stats_of_every_small_size(runner: Runner) -> None:
    """Vectors of halves end anywhere, and few lanes share a short channel."""
    for n in range(1, 70, 5 if runner.how == "interpreted" else 1):
        case = Case(f"n={n}", lambda r, n=n: r(n))
        check_error_stats(runner, case, torch.float16, (4, True, False))


@row_of("error_stats", large=True)
@large_case
def test_error_stats_large(runner: Runner, case: Case) -> None:
    check_error_stats(runner, case, torch.float32, (4, True, False))


def check_error_stats_dynamic(
    runner: Runner, case: Case, dtype: torch.dtype, method: str, symmetric: bool
) -> None:
    x = case.tensor(dtype, device=runner.device)
    qmin, qmax = numeric.code_range("test", 4, symmetric, False)
    place = (case.axis, case.group_size)
    args = (x, qmin, qmax, *place, symmetric, method, 98.0, "code")
    want = reference("error_stats_dynamic", *args)
    with fenced():
        stats, scale, zp = run(runner, *args)
        ema = torch.zeros(5, stats[0].numel(), dtype=stats.dtype, device=x.device)
        assert_same(run(runner, *args, ema, 0.75)[0], stats)
    assert stats.shape == want[0].shape
    if method in ("minmax", "percentile"):
        assert_same(scale, want[1], f"{method} scale")
    else:
        assert_values(scale, want[1], f"{method} scale")
    assert_same(zp, want[2], f"{method} zero_point")
    assert_stats(stats, *errors(x, scale, zp, qmin, qmax, *place, "code"), method)
    # the first update is the statistics, whatever the decay
    assert_values(ema[:4], stats.reshape(4, -1) if ema.numel() else ema[:4], "average")
    assert_values(ema[4], torch.full_like(ema[4], 0.25), "weight")


@row_of("error_stats_dynamic")
@case_of
@dtype_of
def test_error_stats_dynamic(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    for method, symmetric in (("minmax", False), ("percentile", True), ("lsq", False))[
        : 2 if runner.slow else 3
    ]:
        check_error_stats_dynamic(runner, case, dtype, method, symmetric)


@row_of("error_stats_dynamic", large=True)
@large_case
def test_error_stats_dynamic_large(runner: Runner, case: Case) -> None:
    check_error_stats_dynamic(runner, case, torch.float32, "minmax", False)


# a case name that is gone would leave nothing out
assert len(WRITABLE) == len(CASES) - 1 and LARGE_CASES
