"""ErrorEMA: the averages against a plain loop, once a step, other ranks, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_nn_graph import NoReadBack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels import ErrorStats
from qkernels.nn import ErrorEMA, QuantSpec

SPECS = {
    "tensor": QuantSpec(3),
    "channel": QuantSpec(3, axis=0, symmetric=True),
    "last": QuantSpec(4, axis=-1, clip="value", narrow_range=True),
    "group": QuantSpec(2, group_size=4, method="percentile", percentile=90.0),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*(shape or (5, 8)), generator=generator, dtype=torch.float64) * (1 + seed)
    return x.to(dtype)


def options(spec: QuantSpec) -> dict[str, Any]:
    names = ("bits", "axis", "group_size", "symmetric", "narrow_range", "method", "percentile")
    return {name: getattr(spec, name) for name in (*names, "clip")}


def plain_average(stats: list[ErrorStats], decay: float) -> list[list[float]]:
    """The bias-corrected moving average, in Python's numbers: [4][channels]."""
    average = [[0.0] * max(part.numel(), 1) for part in stats[0]]
    weight = 0.0
    for each in stats:
        weight += (1 - decay) * (1 - weight)
        for row, part in zip(average, each, strict=True):
            for c, value in enumerate(part.double().reshape(-1).tolist()):
                row[c] += (1 - decay) / weight * (value - row[c])
    return average


def assert_average(found: ErrorStats, stats: list[ErrorStats], decay: float, rtol: float) -> None:
    for part, row in zip(found, plain_average(stats, decay), strict=True):
        assert part.shape == stats[0].mean.shape
        expected = torch.tensor(row, dtype=torch.float64)
        # a mean is a sum with cancellation: its rounding is that of its greatest summand
        atol = rtol * max(abs(v) for v in row) + 1e-30
        torch.testing.assert_close(part.double().reshape(-1), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_average_is_that_of_a_plain_loop(
    spec: QuantSpec, decay: float, dtype: torch.dtype
) -> None:
    ema, by_torch = ErrorEMA(spec, decay=decay), ErrorEMA(spec, decay=decay)
    seen = []
    for seed in range(6):
        x = batch(seed, dtype=dtype)
        found = ema(x, step=seed)
        by_torch(x, step=torch.tensor(seed))
        seen.append(qkernels.error_stats(x, **options(spec)))
        # fp32: a few roundings a step
        rtol = 1e-13 if dtype is torch.float64 else 3e-6
        assert_average(found, seen, decay, rtol)
        assert_average(by_torch.stats, seen, decay, rtol)
    assert int(ema.updates) == 6 and int(ema.last_step) == 5
    assert found.var.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


def test_the_first_update_is_taken_as_it_is() -> None:
    ema = ErrorEMA(SPECS["channel"], decay=0.999)
    x = batch(1)
    for found, expected in zip(ema(x), qkernels.error_stats(x, **options(ema.spec)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_given_scale_is_used() -> None:
    ema = ErrorEMA(QuantSpec(3, axis=0))
    scale, zero_point = torch.rand(5) + 0.1, torch.arange(5)
    expected = qkernels.error_stats(batch(0), scale, zero_point, bits=3, axis=0)
    torch.testing.assert_close(ema(batch(0), scale, zero_point), expected)
    assert not torch.equal(ema.stats.var, ErrorEMA(ema.spec)(batch(0)).var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_recorded_statistics_move_it_as_their_tensor_does(
    spec: QuantSpec, dtype: torch.dtype
) -> None:
    ema, other = ErrorEMA(spec), ErrorEMA(spec)
    for step in range(3):
        x = batch(step, dtype=dtype)
        stats = qkernels.error_stats(x, **options(spec))
        other.record(stats, x.numel() // stats.mean.numel(), step=step)
        other.record(
            ErrorStats(*(part * 2 for part in stats)), 1, step=step
        )  # the step had its own
        ema.update(x, step=step)
    for found, expected in zip((*other.at(2), *other.at(3)), (*ema.at(2), *ema.at(3)), strict=True):
        torch.testing.assert_close(list(found), list(expected), rtol=3e-6, atol=1e-9)
    assert int(other.updates) == 3 and int(other.last_step) == 2


def test_bad_records() -> None:
    ema = ErrorEMA(QuantSpec(3, axis=0))
    stats = qkernels.error_stats(batch(0), bits=3, axis=0)
    with pytest.raises(ValueError, match="ErrorEMA: count must be an int of at least 1, got 0"):
        ema.record(stats, 0)
    with pytest.raises(TypeError, match="ErrorEMA: step must be an int or None for record"):
        ema.record(stats, 8, step=torch.tensor(1))
    with pytest.raises(ValueError, match="ErrorEMA: step must be in 0"):
        ema.record(stats, 8, step=-1)
    ema.record(stats, 8)
    with pytest.raises(ValueError, match="ErrorEMA: x must have 5 channels as before, got 3"):
        ema.record(ErrorStats(*(part[:3] for part in stats)), 8)
    assert int(ema.updates) == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_at_most_one_update_a_step(as_tensor: bool) -> None:
    ema = ErrorEMA(SPECS["channel"])

    def at(step: int) -> Any:
        return torch.tensor(step) if as_tensor else step

    def state() -> list[Tensor]:
        return [t.clone() for t in ema.state_dict().values()]

    ema(batch(0), step=at(3))
    first = state()
    ema(batch(1), step=at(3))
    assert_same(state(), first)
    ema(batch(1), step=at(4))
    assert int(ema.updates) == 2 and not torch.equal(state()[0], first[0])
    before = ema.previous
    ema.update(batch(2), step=at(4), again=True)
    assert int(ema.updates) == 3
    assert_same(list(ema.previous), list(before))
    for expected in (4, 5):  # without a step each call is one
        ema(batch(expected))
        assert int(ema.updates) == expected


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_previous_is_the_average_of_the_step_before(as_tensor: bool) -> None:
    ema = ErrorEMA(SPECS["channel"])
    history = []
    for step in range(4):
        history.append(ema(batch(step), step=torch.tensor(step) if as_tensor else step))
        now, before = ema.at(torch.tensor(step) if as_tensor else step)
        assert_same(list(now), list(history[-1]))
        assert_same(list(before), list(history[max(step - 1, 0)]))
        assert_same(list(ema.previous), list(before))
    # a step without an update has the statistics of the one before
    now, before = ema.at(torch.tensor(7) if as_tensor else 7)
    assert_same(list(now), list(history[-1]))
    assert_same(list(before), list(now))
    # what was returned is not the buffer
    assert not torch.equal(history[0].var, history[1].var)


def test_differential_noise_telescopes_over_moving_statistics() -> None:
    ema = ErrorEMA(SPECS["channel"])
    noise = qkernels.Noise(3, step=1)
    zeros = torch.zeros(5, 8, dtype=torch.float64)
    total = torch.zeros_like(zeros)

    def delta(stats: ErrorStats, step: int) -> Tensor:
        at = {**noise.at("w"), "step": step}
        return qkernels.drop_in_noise(zeros, (stats.mean, stats.std), p=1.0, axis=0, **at)

    start = None
    for seed in range(6):
        step = int(noise.step)
        ema(batch(seed, dtype=torch.float64), step=step)
        now, before = ema.at(step)
        total += qkernels.differential_noise(zeros, now, before, **noise.at("w"))
        start = delta(before, step - 1) if start is None else start
        noise.advance()
    torch.testing.assert_close(total, delta(now, step) - start, rtol=0, atol=1e-14)
    assert total.abs().max() > 0.1


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_leaves_its_channel_alone(bad: float, as_tensor: bool) -> None:
    ema, clean = ErrorEMA(SPECS["channel"]), ErrorEMA(SPECS["channel"])
    for step in range(4):
        x = batch(step)
        clean(x, step=step)
        if step in (0, 2):  # the first one too
            x[1, 3] = bad
        ema(x, step=torch.tensor(step) if as_tensor else step)
        assert all(bool(part.isfinite().all()) for part in ema.stats)
    others = [0, 2, 3, 4]
    torch.testing.assert_close(ema.stats.var[others], clean.stats.var[others])
    alone = ErrorEMA(SPECS["channel"])
    for step in (1, 3):
        alone(batch(step))
    torch.testing.assert_close(ema.stats.var[1], alone.stats.var[1])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_batch_without_elements_changes_no_average(as_tensor: bool) -> None:
    ema = ErrorEMA(QuantSpec(4, axis=1))
    ema(batch(0), step=torch.tensor(0) if as_tensor else 0)
    before = ema.stats
    at = torch.tensor(1) if as_tensor else 1
    ema(torch.zeros(0, 8), step=at)
    assert_same(list(ema.stats), list(before))
    assert int(ema.updates) == 1
    ema(batch(1), step=at)  # it did not begin the step: this does
    assert int(ema.updates) == 2
    assert_same(list(ema.previous), list(before))


def test_eval_mode_changes_nothing() -> None:
    ema = ErrorEMA(SPECS["tensor"])
    before = ema(batch(0))
    assert_same(list(ema.eval()(batch(1))), list(before))
    assert int(ema.updates) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant: bool) -> None:
    ema = ErrorEMA(SPECS["tensor"])
    layer = nn.Linear(8, 8)

    def part(x: Tensor) -> Tensor:
        ema(x)
        return layer(x)

    x = batch(0).requires_grad_()
    checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    assert int(ema.updates) == 1


@pytest.mark.parametrize("with_step", [True, False])
def test_compiled_updates_are_the_eager_ones(with_step: bool) -> None:
    ema, plain = (ErrorEMA(SPECS["channel"], channels=5) for _ in range(2))
    step = torch.zeros((), dtype=torch.int64)
    at = {"step": step} if with_step else {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: ema(x, **at), fullgraph=True, backend="aot_eager")
    for count, seed in enumerate((0, 1, 1, 2)):
        step.fill_(seed)
        x = batch(count)
        assert_same(list(compiled(x)), list(plain(x, **at)))
    assert_same(list(ema.state_dict().values()), list(plain.state_dict().values()))
    assert int(ema.updates) == (3 if with_step else 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_eager_code_sees_what_compiled_code_did() -> None:
    ema = ErrorEMA(SPECS["channel"], channels=5)
    torch._dynamo.reset()
    compiled = torch.compile(ema, fullgraph=True, backend="aot_eager")
    ema(batch(0), step=0)
    compiled(batch(1), step=torch.tensor(1))
    average = ema.stats
    ema(batch(2), step=1)
    assert int(ema.updates) == 2
    assert_same(list(ema.at(1)[0]), list(average))
    assert not torch.equal(ema.at(1)[1].var, average.var)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_nothing_is_read_back_after_the_first_update(as_tensor: bool) -> None:
    ema = ErrorEMA(SPECS["channel"])
    ema(batch(0), step=0)
    x = batch(1)
    with NoReadBack():
        for step in (1, 1, 2):
            ema(x, step=torch.tensor(step) if as_tensor else step)
            ema.at(torch.tensor(step) if as_tensor else step)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("channels", [None, 5])
def test_a_state_loads_into_a_fresh_or_a_used_module(channels: int | None, used: bool) -> None:
    source = ErrorEMA(SPECS["channel"])
    for step in range(3):
        source(batch(step), step=step)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    other = ErrorEMA(SPECS["channel"], channels=channels)
    if used:
        other(batch(7), step=9)
    other.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    assert_same(list(other.stats), list(source.stats))
    assert_same([*other.at(2)[1]], [*source.at(2)[1]])
    for ema in (source, other):
        ema(batch(8), step=2)  # the step had its update before it was saved
        ema(batch(4), step=3)
    assert_same(list(other.state_dict().values()), list(source.state_dict().values()))


def test_other_peoples_checkpoints_change_nothing() -> None:
    holder = nn.Sequential(nn.Linear(8, 8), ErrorEMA(SPECS["tensor"]))
    holder[1](batch(0))
    before = holder[1].stats
    plain = nn.Sequential(nn.Linear(8, 8)).state_dict()
    holder.load_state_dict(plain, strict=True)
    assert_same(list(holder[1].stats), list(before))
    half = {k: v for k, v in holder.state_dict().items() if not k.endswith("updates")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.updates"'):
        holder.load_state_dict(half)


def test_copies_go_on_by_themselves() -> None:
    ema = ErrorEMA(SPECS["channel"])
    ema(batch(0), step=0)
    for other in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        other(batch(5), step=0)
        assert int(other.updates) == 1
        other(batch(1), step=1)
        assert int(other.updates) == 2 and int(ema.updates) == 1
    assert "3 bits, symmetric, axis=0, minmax, decay=0.9" in repr(ema)


def test_the_average_is_never_narrowed() -> None:
    ema = ErrorEMA(SPECS["channel"], channels=5).half()
    assert ema.stats.var.dtype is torch.float32
    ema(batch(0, dtype=torch.float16))
    assert ema.to(torch.bfloat16).stats.var.dtype is torch.float32
    assert ema.double().stats.var.dtype is torch.float64
    expected = ema.stats.mean
    ema.update(torch.zeros(5, 0))  # fp32 again
    assert ema.stats.mean.dtype is torch.float32
    torch.testing.assert_close(ema.stats.mean, expected.float())


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ErrorEMA(4), TypeError, r"^ErrorEMA: spec must be a QuantSpec, got 4$"),  # type: ignore[arg-type]
    (
        lambda: ErrorEMA(QuantSpec(4), decay=1.0),
        ValueError,
        r"^ErrorEMA: decay must be in \[0, ",
    ),
    (lambda: ErrorEMA(QuantSpec(4), decay=-0.1), ValueError, r"decay must be in \[0, 1\)"),
    (lambda: ErrorEMA(QuantSpec(4), decay="x"), TypeError, r"decay must be a number"),  # type: ignore[arg-type]
    (lambda: ErrorEMA(QuantSpec(4), channels=3), ValueError, r"channels must be 1 without axis"),
    (lambda: ErrorEMA(QuantSpec(4, axis=0), channels=-1), ValueError, r"channels must be an int"),
    (lambda: ErrorEMA(QuantSpec(4)).stats, RuntimeError, r"stats must be asked after the first"),
    (lambda: ErrorEMA(QuantSpec(4)).previous, RuntimeError, r"previous must be asked after"),
    (lambda: ErrorEMA(QuantSpec(4))(batch(0), step=-1), ValueError, r"step must be in 0.."),
    (lambda: ErrorEMA(QuantSpec(4))(batch(0), step=1.5), TypeError, r"step must be an int or a 0-"),  # type: ignore[arg-type]
    (lambda: ErrorEMA(QuantSpec(4))(batch(0), step=torch.ones(1)), TypeError, r"got torch.float32"),
    (lambda: ErrorEMA(QuantSpec(4))([1.0]), TypeError, r"^error_stats: x must be a Tensor"),  # type: ignore[arg-type]
    (lambda: ErrorEMA(QuantSpec(4, axis=2))(batch(0)), ValueError, r"axis must be in -2\.\.1"),
    (
        lambda: ErrorEMA(QuantSpec(4, axis=0), channels=4)(batch(0)),
        ValueError,
        r"^ErrorEMA: x must have 4 channels as before, got 5$",
    ),
    (
        lambda: ErrorEMA(QuantSpec(4), channels=1)(torch.zeros(2, device="meta")),
        ValueError,
        r"^ErrorEMA: x must be on cpu like the average, got meta$",
    ),
]


@pytest.mark.parametrize(("act", "error", "text"), BAD)
def test_bad_input(act: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        act()
