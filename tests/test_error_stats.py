"""Statistics of the quantization error: against fp64, where sums go wrong, and moving averages."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy
import pytest
import torch
from cases import DTYPE_IDS, DTYPES, channels_last
from compare import VALUES, assert_same, assert_sums
from rows import Runner, params, reference, run
from test_noise import threads  # noqa: F401  a fixture
from test_philox import backend_of
from torch import Tensor

import qkernels
from qkernels import ErrorStats, numeric
from qkernels.backends.reference.common import to_channels
from qkernels.backends.reference.error_stats import move_average
from qkernels.backends.reference.fake_quant import quantized
from qkernels.ops.error_stats import stats_call, update_error_stats

NAMES = ErrorStats._fields
INF, NAN = math.inf, math.nan

# what a variance may keep of the square of the mean: some squared units of fp32; fp64 has nothing
# wider, and some rows sum plain squares in it
MEAN_PART = {torch.float32: 1e-12, torch.float64: 1e-14}

row_of = pytest.mark.parametrize(
    "runner", [*params("error_stats"), None], ids=lambda r: r.id if r else "reference"
)


def errors(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """(e as fp64 [channels, n], whether each is clipped) for the arguments of the reference."""
    scale, zero_point, qmin, qmax, axis, group_size, clip = args
    rows = to_channels(x, axis, group_size)
    v = quantized(rows, scale, zero_point, qmin, qmax, clip)
    e = (v.q * v.scale - rows).double()
    return e.movedim(1, 0).flatten(1), (~v.inside).movedim(1, 0).flatten(1)


def expected(e: Tensor, clipped: Tensor) -> Tensor:
    """The statistics in fp64, [4, channels]."""
    n = max(e.shape[1], 1)
    mean = e.sum(1) / n
    var = (e - mean[:, None]).square().sum(1) / n
    return torch.stack((mean, var, e.square().sum(1) / n, clipped.double().sum(1) / n))


def assert_stats(got: Tensor, e: Tensor, clipped: Tensor, what: str = "error_stats") -> None:
    """got: [4] or [4, channels]. To a relative error of the mean of the terms' sizes, whatever the
    data; the variance also to MEAN_PART of the squared mean."""
    got = got.reshape(4, e.shape[0])
    want = expected(e, clipped)
    rtol, _ = VALUES[got.dtype]
    sizes = want.clone()
    sizes[0] = e.abs().sum(1) / max(e.shape[1], 1)
    sizes[1] += want[0].square() * (MEAN_PART[got.dtype] / rtol)
    for i, name in enumerate(NAMES):
        assert_sums(got[i], want[i].to(got.dtype), sizes[i], f"{what}: {name}")
    assert bool((got[1:] >= 0).all()), f"{what}: negative"


def stats_of(runner: Runner | None, x: Tensor, *args: object) -> Tensor:
    """What a row (None: the reference) gives, on the CPU."""
    if runner is None:
        return reference("error_stats", x, *args)
    there = [a.to(runner.device) if isinstance(a, Tensor) else a for a in (x, *args)]
    return run(runner, *there).cpu()


def stacked(stats: ErrorStats) -> Tensor:
    return torch.stack(list(stats))


@backend_of
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("clip", numeric.CLIPS)
@pytest.mark.parametrize("axis", (None, 0, 1, 3))
def test_against_fp64(backend: str, dtype: torch.dtype, clip: str, axis: int | None) -> None:
    torch.manual_seed(1)
    plain = torch.randn(5, 6, 9, 7).to(dtype)
    for x in (plain, channels_last(plain)):
        wide = x.to(numeric.compute_dtype(dtype))
        n = 1 if axis is None else x.shape[axis]
        scale = torch.linspace(0.1, 0.9, n, dtype=wide.dtype)
        zp = torch.arange(n) % 3
        if axis is None:
            scale, zp = scale[0], zp[0]
        args = dict(bits=3, axis=axis, clip=clip, backend=backend)
        got = qkernels.error_stats(x, scale, zp, **args)
        assert isinstance(got, ErrorStats) and got.mean.dtype is wide.dtype
        assert all(s.shape == scale.shape for s in got)
        # the error of Q in the compute dtype: Q(x) is not rounded to a half in between
        y = qkernels.fake_quant(wide, scale, zp, **args)
        e = (y - wide).double().movedim(axis or 0, 0).reshape(n, -1)
        code = (wide / (scale.reshape([-1 if d == axis else 1 for d in range(4)]))).movedim(
            axis or 0, 0
        )
        code = code.reshape(n, -1) + zp.reshape(-1, 1)
        code = code if clip == "value" else code.round()
        assert_stats(stacked(got), e, (code < 0) | (code > 7))
        assert got.std.tolist() == numpy.sqrt(got.var.numpy()).tolist()  # numpy's is IEEE's


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_exact_root(dtype: torch.dtype) -> None:
    """As many values as vector libraries take for many, over the exponents."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(50_000, generator=generator, dtype=torch.float64).mul(15).exp()
    plain = torch.rand(50_000, generator=generator, dtype=torch.float64)
    special = torch.tensor([0.0, 1.0, 4.0, math.inf, math.nan, -1.0])
    x = torch.cat((spread, plain, special)).to(dtype)
    got = numeric.exact_sqrt(x)
    with numpy.errstate(invalid="ignore"):
        want = torch.from_numpy(numpy.sqrt(x.numpy()))  # numpy's is IEEE's
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.isnan(), want.isnan())


@row_of
@pytest.mark.parametrize("n", (1, 2, 3, 63, 64, 65, 513, 1037, 40_001))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_large_mean_and_small_spread(runner: Runner | None, n: int, dtype: torch.dtype) -> None:
    """All elements clip, so that e = bound - x: mean 1000, standard deviations 1, 0 and 1/2."""
    torch.manual_seed(n)
    x = torch.stack((torch.randn(n), torch.zeros(n), torch.arange(n) % 2)).to(dtype) - 1001.3
    scale = torch.ones(3, dtype=dtype)
    for axis in (0, 1):
        laid = x if axis == 0 else x.t().contiguous()
        got = stats_of(runner, laid, scale, None, -2, 1, axis, None, "code")
        e = (-2.0 - x).double()
        assert_stats(got, e, torch.ones_like(e))
        assert float(got[1, 1]) <= MEAN_PART[dtype] * float(got[0, 1]) ** 2
        if n > 1000:
            assert float(got[0, 0]) ** 2 > 9e5 * float(got[1, 0])


@row_of
@pytest.mark.parametrize("where", (0, 17, 2000, 4095, 4096, 4099))
@pytest.mark.parametrize("size", (1e3, 1e6, 1e15))
def test_one_large_error_among_small_ones(runner: Runner | None, where: int, size: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 4100) * 0.1
    x[:, where] = -size
    for axis, scale in ((None, torch.tensor(0.1)), (0, torch.tensor([0.1] * 3))):
        args = (scale, None, -8, 7, axis, None, "code")
        assert_stats(stats_of(runner, x, *args), *errors(x, *args), f"axis={axis}")


@backend_of
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_one_element_and_none(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.3, -7.0, 0.0], dtype=dtype)
    compute = numeric.compute_dtype(dtype)
    for shape, axis in (((3, 1), 0), ((1, 3), 1), ((3, 1, 1), 0)):
        got = qkernels.error_stats(
            x.reshape(shape),
            torch.ones(3, dtype=compute),
            bits=2,
            symmetric=True,
            axis=axis,
            backend=backend,
        )
        e = torch.tensor([0.0, -2.0, 0.0], dtype=compute) - x.to(compute)
        assert_same(got.mean, e)
        assert got.var.tolist() == [0.0, 0.0, 0.0]
        assert_same(got.mean_square, e * e)
        assert got.clip_rate.tolist() == [0.0, 1.0, 0.0]
    args = dict(bits=4, backend=backend)
    for scale in (None, torch.ones(4, dtype=compute)):
        empty = qkernels.error_stats(x.new_empty(4, 0), scale, axis=0, **args)
        assert stacked(empty).tolist() == [[0.0] * 4] * 4
    none = qkernels.error_stats(x.new_empty(0, 4), x.new_empty(0, dtype=compute), axis=0, **args)
    assert stacked(none).shape == (4, 0)
    flat = qkernels.error_stats(x.new_empty(0), 1.0, **args)
    assert stacked(flat).tolist() == [0.0] * 4


@backend_of
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
@pytest.mark.parametrize("place", (0, 500, -1))
def test_values_that_are_not_finite_show_in_their_channel(
    backend: str, bad: float, place: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1037)
    args = dict(bits=4, symmetric=True, axis=0, backend=backend)
    scale = torch.full((3,), 0.3)
    before = stacked(qkernels.error_stats(x, scale, **args))
    x[1, place] = bad
    after = stacked(qkernels.error_stats(x, scale, **args))
    assert_same(after[:, ::2], before[:, ::2])
    assert not after[:3, 1].isfinite().any()
    if math.isnan(bad):
        assert after[:3, 1].isnan().all()
    clipped = (x[1].div(0.3).round().clamp(-8, 7) != x[1].div(0.3).round()).double().mean()
    assert_same(after[3, 1], clipped.float())  # NaN counts as clipped
    # a range that cannot be found makes its channel NaN, without an error
    dynamic = stacked(qkernels.error_stats(x, **args))
    assert dynamic[:3, 1].isnan().all() and dynamic[:, ::2].isfinite().all()


@backend_of
@pytest.mark.parametrize("method", numeric.METHODS)
@pytest.mark.parametrize("axis", (None, 0, 1))
def test_range_in_the_same_call(backend: str, method: str, axis: int | None) -> None:
    torch.manual_seed(4)
    for x in (torch.randn(6, 700), torch.randn(6, 700).half(), torch.randn(700, 6).t()):
        for symmetric in (True, False):
            args = dict(bits=4, axis=axis, symmetric=symmetric, method=method, backend=backend)
            scale, zp = qkernels.quant_range(x, **args)
            want = qkernels.error_stats(x, scale, zp, **args)
            assert_same(stacked(qkernels.error_stats(x, **args)), stacked(want))


@backend_of
@pytest.mark.parametrize("clip", numeric.CLIPS)
def test_clip_rate_is_a_count(backend: str, clip: str) -> None:
    x = torch.tensor([[-2.6, -2.5, -2.4, -2.0, 0.3, 1.0, 1.4, 1.5, 1.6, NAN]]).repeat(3, 1)
    got = qkernels.error_stats(x, 1.0, bits=2, symmetric=True, clip=clip, backend=backend)
    # codes -2 .. 1: -2.5 rounds to -2, 1.5 to 2
    count = {"code": 4, "value": 7}[clip]
    assert_same(got.clip_rate, torch.tensor(count / 10))


@backend_of
def test_var_is_that_of_the_population(backend: str) -> None:
    x = torch.tensor([0.0, 0.25, 0.5, -0.25])
    got = qkernels.error_stats(x, 1.0, bits=4, symmetric=True, backend=backend)
    # e = 0, -1/4, -1/2, 1/4
    assert [float(s) for s in got] == [-0.125, 0.078125, 0.09375, 0.0]


@backend_of
def test_same_bits_for_any_number_of_threads(
    backend: str,
    threads: Callable[[int], None],  # noqa: F811
) -> None:
    torch.manual_seed(2)
    for x, axis in (
        (torch.randn(200_003), None),
        (torch.randn(7, 20_001), 0),
        (torch.randn(3001, 39), 1),
    ):
        results = []
        for n in (1, 2, 7):
            threads(n)
            results.append(stacked(qkernels.error_stats(x, bits=4, axis=axis, backend=backend)))
        assert_same(results[1], results[0], "2 threads")
        assert_same(results[2], results[0], "7 threads")


def test_no_gradient() -> None:
    x, scale = torch.randn(4, 5, requires_grad=True), torch.ones(4, requires_grad=True)
    for got in (qkernels.error_stats(x, scale, bits=4, axis=0), qkernels.error_stats(x, bits=4)):
        assert not any(s.requires_grad for s in got)


class Average:
    """The moving average of one channel in plain Python floats."""

    def __init__(self) -> None:
        self.values, self.weight = [0.0] * 4, 0.0

    def update(self, new: list[float], decay: float) -> None:
        self.weight = decay * self.weight + (1 - decay)
        share = (1 - decay) / self.weight
        self.values = [
            (1 - share) * old + share * v for old, v in zip(self.values, new, strict=True)
        ]


@backend_of
@pytest.mark.parametrize("decay", (0.0, 0.5, 0.9, 0.999))
@pytest.mark.parametrize("given", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_moving_average(backend: str, decay: float, given: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    compute = numeric.compute_dtype(dtype)
    ema, loops = torch.zeros(5, 3, dtype=compute), [Average() for _ in range(3)]
    scale = torch.tensor([0.1, 0.2, 0.3], dtype=compute) if given else None
    for step in range(12):
        x = (torch.randn(3, 50) * (1 + step)).to(dtype)
        version, before = ema._version, ema.clone()
        op, args = stats_call(x, scale, bits=3, axis=0)
        stats = update_error_stats(ema, decay, backend, op, *args)
        assert_same(stats, stacked(qkernels.error_stats(x, scale, bits=3, axis=0, backend=backend)))
        assert ema._version > version
        again = before.clone()
        move_average(again, stats, decay)  # the meaning, and what a compiled call runs
        assert_same(again, ema)
        if step == 0:  # not biased towards the zeros at the start
            assert_same(ema[:4], stats)
        for channel, loop in enumerate(loops):
            loop.update(stats[:, channel].tolist(), decay)
        want = torch.tensor([[*loop.values, loop.weight] for loop in loops], dtype=torch.float64)
        # sizes stay below the largest seen; a dozen updates round some times each
        torch.testing.assert_close(ema.t().double(), want, rtol=2e-6, atol=1e-7)
    assert ema[4].tolist() == pytest.approx([1 - decay**12] * 3, rel=1e-5)


@pytest.mark.parametrize("given", (True, False))
def test_moving_average_when_traced(given: bool) -> None:
    torch.compiler.reset()
    scale = torch.full((4,), 0.3) if given else None

    def update(ema: Tensor, x: Tensor) -> Tensor:
        op, args = stats_call(x, scale, bits=3, axis=0)
        return update_error_stats(ema, 0.9, "", op, *args)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    plain, traced = torch.zeros(5, 4), torch.zeros(5, 4)
    for _ in range(3):
        x = torch.randn(4, 30)
        assert_same(compiled(traced, x), update(plain, x))
        assert_same(traced, plain)
    assert bool((plain[4] > 0.2).all())


MEMORY = """
import torch, qkernels
from qkernels import differential_noise, drop_in_noise, error_stats, uniform_noise

MB = 64

def status(name):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

def peak():
    return status("VmHWM")

def use(x, **kw):
    kw = dict(seed=1, step=2, backend="native", **kw)
    differential_noise(x, (0.1, 0.2), **kw)
    drop_in_noise(x, (0.1, 0.2), p=0.5, **kw)
    uniform_noise(x, 0.1, **kw)
    error_stats(x, 0.1, bits=4, symmetric=True, backend="native")
    error_stats(x, bits=4, axis=0, backend="native")

torch.randn(8, 300) * 0.5 + 1
use(torch.randn(8, 300))
use(torch.randn(8, 300), inplace=True)
x = torch.randn(4096, MB * 64)
start = peak()
resident = status("VmRSS")
use(x, inplace=True)
inplace = peak() - start
use(x.requires_grad_())
outofplace = peak() - start
x = x.detach()
y = x + 0.5 * torch.randn_like(x)
print(start - resident, inplace, outofplace, peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_peak_memory_is_the_output() -> None:
    command = [sys.executable, "-c", MEMORY]  # on its own: the peak of a process never falls
    folder = tempfile.gettempdir()  # not here, where qkernels/ would hide an installed one
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    slack, inplace, outofplace, eager = (float(v) for v in done.stdout.split())
    assert slack < 2, "the peak before the first call hides what follows"
    assert inplace < 2, "in place, or reading only, takes no memory of x's 64 MB"
    assert 62 < outofplace < 66, "out of place, the output and no more"
    assert eager > 120, "eager torch needs a temporary: the test can tell"
