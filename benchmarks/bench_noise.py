"""Noise ops: what eager torch draws, scales, shifts and adds in one pass each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import assert_same
from harness.clocks import read_ledger
from harness.headline import BYTES, SHAPE
from harness.parity import assert_noise
from harness.record import peak_bytes, saved_bytes, work_of
from harness.rivals import Call, compiled, copies
from harness.sweep import Spot, bytes_of
from harness.timing import Bar, race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

RAMP, P = 0.7, 0.5
READ_WRITE = "read x, write y: 2 N s"


def eager_differential(
    w: Tensor, mean: Tensor, std: Tensor, prev_mean: Tensor, prev_std: Tensor
) -> Tensor:
    """As one writes it by hand: two draws, scaled, shifted, subtracted, added."""
    now = torch.randn_like(w) * std + mean
    before = torch.randn_like(w) * prev_std + prev_mean
    return w + RAMP * (now - before)


def eager_drop_in(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """As one writes it by hand."""
    gate = torch.rand_like(x) < P
    return x + RAMP * gate * (torch.randn_like(x) * std + mean)


def eager_uniform(x: Tensor, scale: Tensor) -> Tensor:
    """As one writes it by hand."""
    return x + (torch.rand_like(x) - 0.5) * scale


class Inputs:
    """A tensor, statistics of its 4-bit error, and those of a step before."""

    def __init__(self) -> None:
        self.x = torch.randn(SHAPE)
        stats = qkernels.error_stats(self.x, bits=4, axis=0)
        self.stats = (stats.mean, stats.std)
        self.previous = (stats.mean * 1.1, stats.std * 0.9)
        self.scale = qkernels.quant_range(self.x, bits=4, axis=0).scale

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(p[:, None] for p in (*self.stats, *self.previous))


def noise_race(
    benchmark: Any, x: Tensor, ours: Callable[..., Tensor], eager: Call, bar: float, op: str
) -> None:
    assert_same(ours(x), ours(x, backend="reference"))
    by_compiler = compiled(eager)
    # another generator: only the size of the noise can be compared
    torch.testing.assert_close((eager() - x).std(), (ours(x) - x).std(), rtol=0.01, atol=0)
    out, own = torch.empty_like(x), x.clone()
    race(
        benchmark,
        lambda: ours(x),
        {
            "copy": lambda: out.copy_(x),
            "eager": eager,
            "torch.compile": by_compiler,
            "ours in place": lambda: ours(own, inplace=True),
        },
        bars=(Bar("eager", bar), Bar("torch.compile", 1)),
        work=work_of(op, x, 2 * BYTES, READ_WRITE, axis=0),
        rounds=5,
    )


@pytest.mark.bar
def bench_differential_noise_bar(benchmark: Any) -> None:
    i = Inputs()
    kw: dict[str, Any] = dict(prev_stats=i.previous, seed=1, step=2, ramp=RAMP)
    ours = partial(qkernels.differential_noise, stats=i.stats, **kw)
    columns = i.columns()
    eager = lambda: eager_differential(i.x, *columns)  # noqa: E731
    noise_race(benchmark, i.x, ours, eager, 10, "differential_noise")


@pytest.mark.bar
def bench_drop_in_noise_bar(benchmark: Any) -> None:
    i = Inputs()
    ours = partial(qkernels.drop_in_noise, stats=i.stats, p=P, seed=1, step=2, ramp=RAMP, axis=0)
    mean, std, _, _ = i.columns()
    noise_race(benchmark, i.x, ours, lambda: eager_drop_in(i.x, mean, std), 5, "drop_in_noise")


@pytest.mark.bar
def bench_uniform_noise_bar(benchmark: Any) -> None:
    i = Inputs()
    ours = partial(qkernels.uniform_noise, scale=i.scale, seed=1, step=2, axis=0)
    column = i.scale[:, None]
    noise_race(benchmark, i.x, ours, lambda: eager_uniform(i.x, column), 5, "uniform_noise")


@pytest.mark.bar
def bench_noise_memory(benchmark: Any) -> None:
    """Bytes that a call allocates beside its result, and that it saves for the backward."""
    i = Inputs()
    x = i.x.requires_grad_()
    calls: dict[str, Call] = {
        "differential_noise": lambda: qkernels.differential_noise(x, i.stats, seed=1, step=2),
        "drop_in_noise": lambda: qkernels.drop_in_noise(x, i.stats, p=P, seed=1, step=2, axis=0),
        "uniform_noise": lambda: qkernels.uniform_noise(x, i.scale, seed=1, step=2, axis=0),
    }
    figures = {}
    for name, call in calls.items():
        taken, _ = peak_bytes(call, "cpu")
        figures[f"{name}: bytes saved for backward"] = str(saved_bytes(call))
        figures[f"{name}: bytes allocated beside the result"] = str(taken - BYTES)
    benchmark.extra_info["figures"] = figures
    benchmark.pedantic(lambda: None, rounds=1)


def statistics(spot: Spot) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the 4-bit error of x."""
    stats = qkernels.error_stats(spot.x, bits=4, axis=spot.axis)
    return stats.mean, stats.std


def sweep_race(
    benchmark: Any,
    spot: Spot,
    ours: Callable[..., Tensor],
    params: Any,
    eager: Callable[..., Tensor],
    asked: tuple[Bar, ...] = (),
) -> None:
    """ours(x, params, axis=, offset=, backend=, inplace=) against eager(x, *params)."""
    x, own = spot.x, spot.x.clone()
    exact = spot.row != "triton" or spot.op == "uniform_noise"
    assert_noise(partial(ours, backend=spot.backend), x, params, spot.axis, exact)
    # in x's dtype: without that a half tensor becomes fp32
    flat = [spot.column(p).to(x.dtype) for p in flattened(params)]
    work: dict[str, Call] = {"eager": lambda: eager(x, *flat)}
    if spot.compiles():
        fused = compiled(eager)
        work["torch.compile"] = lambda: fused(x, *flat)
    # another generator: only the size of the noise can be compared
    size = (ours(x, params, **spot.place()) - x).float().std()
    for name, call in work.items():
        torch.testing.assert_close((call() - x).float().std(), size, rtol=0.15, atol=0, msg=name)
    ideal = 2 * bytes_of(x)
    place = spot.place()
    in_place = lambda: ours(own, params, inplace=True, **place)  # noqa: E731
    race(
        benchmark,
        lambda: ours(x, params, **place),
        {
            **copies(x, ideal),
            **work,
            "ours in place": in_place,
        },
        bars=asked if spot.device == "cuda" and spot.point.size == "64Mi" else (),
        work=spot.work(ideal, READ_WRITE),
    )


def flattened(params: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    return [p for item in params for p in (flattened(item) if isinstance(item, tuple) else (item,))]


@pytest.mark.sweep("differential_noise")
def bench_differential_noise(benchmark: Any, spot: Spot) -> None:
    mean, std = statistics(spot)
    params = ((mean, std), (mean * 1.1, std * 0.9))

    def ours(x: Tensor, params: Any, **kw: Any) -> Tensor:
        return qkernels.differential_noise(x, *params, seed=1, step=2, ramp=RAMP, **kw)

    sweep_race(benchmark, spot, ours, params, eager_differential, (Bar("copy", 0.7),))


@pytest.mark.sweep("drop_in_noise")
def bench_drop_in_noise(benchmark: Any, spot: Spot) -> None:
    def ours(x: Tensor, params: Any, **kw: Any) -> Tensor:
        return qkernels.drop_in_noise(x, params, p=P, seed=1, step=2, ramp=RAMP, **kw)

    sweep_race(benchmark, spot, ours, statistics(spot), eager_drop_in)


@pytest.mark.sweep("uniform_noise")
def bench_uniform_noise(benchmark: Any, spot: Spot) -> None:
    def ours(x: Tensor, params: Any, **kw: Any) -> Tensor:
        return qkernels.uniform_noise(x, params[0], seed=1, step=2, **kw)

    sweep_race(benchmark, spot, ours, (spot.params(bits=4)[0],), eager_uniform)
