"""error_stats: mean and variance of the quantization error, with a given range and its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.clocks import read_ledger
from harness.headline import BYTES, SHAPE
from harness.parity import assert_statistics
from harness.record import work_of
from harness.rivals import Call, compiled, copies, error_composite, minmax_composite
from harness.sweep import Spot, bytes_of
from harness.timing import Bar, race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

READ = "read x once: N s"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(x, scale, zero point)."""
    x = torch.randn(SHAPE)
    return x, *qkernels.quant_range(x, bits=4, axis=0)


def assert_parity(x: Tensor, scale: Tensor | None, zp: Tensor | None, **place: Any) -> Any:
    """Nothing is timed unless the statistics are those of the reference."""
    ours = qkernels.error_stats(x, scale, zp, bits=4, **place)
    place["backend"] = "reference"
    assert_statistics(ours, qkernels.error_stats(x, scale, zp, bits=4, **place))
    return ours


def assert_close(theirs: tuple[Tensor, Tensor], ours: Any, scale: Tensor) -> None:
    """One code in 100 000 is another next to a tie (x / scale + zp is rounded, not x / scale)."""
    mean, var = theirs
    off = float(scale.max()) * 1e-3
    torch.testing.assert_close(mean.reshape_as(ours.mean), ours.mean, rtol=0, atol=off)
    torch.testing.assert_close(var.reshape_as(ours.var), ours.var, rtol=1e-2, atol=0)


@pytest.mark.bar
def bench_error_stats_bar(benchmark: Any) -> None:
    x, scale, zp = inputs()
    column, offset = scale[:, None], zp[:, None]
    by_hand = compiled(error_composite)
    ours = assert_parity(x, scale, zp, axis=0)
    assert_close(by_hand(x, column, offset, 0, 15), ours, scale)
    out = torch.empty_like(x)
    race(
        benchmark,
        lambda: qkernels.error_stats(x, scale, zp, bits=4, axis=0),
        {
            "copy": lambda: out.copy_(x),
            "x.sum(), a read": x.sum,
            "torch.compile": lambda: by_hand(x, column, offset, 0, 15),
        },
        bars=(Bar("x.sum(), a read", 1 / 2.5), Bar("torch.compile", 2)),
        work=work_of("error_stats", x, BYTES, READ, axis=0, copied=2 * BYTES),
        rounds=15,
    )


@pytest.mark.bar
def bench_error_stats_dynamic_bar(benchmark: Any) -> None:
    x, _, _ = inputs()
    assert_parity(x, None, None, axis=0)

    def two_calls() -> Any:
        scale, zp = qkernels.quant_range(x, bits=4, axis=0)
        return qkernels.error_stats(x, scale, zp, bits=4, axis=0)

    out = torch.empty_like(x)
    race(
        benchmark,
        lambda: qkernels.error_stats(x, bits=4, axis=0),
        {"copy": lambda: out.copy_(x), "two calls of ours": two_calls},
        work=work_of("error_stats_dynamic", x, BYTES, READ, axis=0, copied=2 * BYTES),
        rounds=15,
    )


@pytest.mark.sweep("error_stats")
def bench_error_stats(benchmark: Any, spot: Spot) -> None:
    x, (scale, zp) = spot.x, spot.params(bits=4)
    by = (spot.column(scale), spot.column(zp), 0, 15, spot.dims)
    ours = assert_parity(x, scale, zp, **spot.place())
    work: dict[str, Call] = {"eager composite": lambda: error_composite(x, *by)}
    assert_close(work["eager composite"](), ours, scale)
    if spot.compiles():
        fused = compiled(error_composite)
        work["torch.compile"] = lambda: fused(x, *by)
        assert_close(work["torch.compile"](), ours, scale)
    on_gpu = spot.device == "cuda" and spot.point.size == "64Mi"
    bars = (Bar("copy", 0.85), *(Bar(name, 1) for name in work))
    race(
        benchmark,
        lambda: qkernels.error_stats(x, scale, zp, bits=4, **spot.place()),
        {**copies(x, bytes_of(x)), "x.sum(), a read": x.sum, **work},
        bars=bars if on_gpu else (),
        work=spot.work(bytes_of(x), READ),
    )


@pytest.mark.sweep("error_stats_dynamic")
def bench_error_stats_dynamic(benchmark: Any, spot: Spot) -> None:
    x = spot.x
    assert_parity(x, None, None, **spot.place())

    def by_hand() -> Any:
        return error_composite(x, *minmax_composite(x, 0, 15, spot.dims), 0, 15, spot.dims)

    scale, _ = spot.params(bits=4)
    assert_close(by_hand(), qkernels.error_stats(x, bits=4, **spot.place()), scale)
    race(
        benchmark,
        lambda: qkernels.error_stats(x, bits=4, **spot.place()),
        {**copies(x, bytes_of(x)), "eager composite": by_hand},
        work=spot.work(bytes_of(x), READ),
    )
