"""Ranges: min-max, percentile and mean-square error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same, assert_values
from harness.clocks import read_ledger
from harness.headline import BYTES, SHAPE
from harness.parity import assert_mse
from harness.record import work_of
from harness.rivals import Call, compiled, copies, kthvalue_percentile, minmax_composite
from harness.sweep import Spot, bytes_of
from harness.timing import Bar, race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

READ = "read x once: N s"


@pytest.mark.bar
def bench_percentile(benchmark: Any) -> None:
    x = torch.randn(SHAPE)
    out = torch.empty_like(x)
    kw: dict[str, Any] = dict(bits=8, axis=0, method="percentile", percentile=99.0)
    got = qkernels.observe_range(x, **kw)[2]
    assert_same(got, qkernels.observe_range(x, **kw, backend="reference")[2])
    want = torch.quantile(x, torch.tensor([0.01, 0.99], dtype=x.dtype), dim=1)
    assert_values(got, want, "torch.quantile")
    race(
        benchmark,
        lambda: qkernels.quant_range(x, **kw),
        {"copy": lambda: out.copy_(x), "two kthvalue": lambda: kthvalue_percentile(x, 99.0)},
        bars=(Bar("two kthvalue", 10),),
        work=work_of("quant_range percentile", x, BYTES, READ, axis=0, copied=2 * BYTES),
        rounds=5,
    )


@pytest.mark.bar
def bench_minmax(benchmark: Any) -> None:
    x = torch.randn(SHAPE)
    out = torch.empty_like(x)
    got = qkernels.observe_range(x, bits=8, axis=0)[2]
    assert_same(got, torch.stack(torch.aminmax(x, dim=1)))
    race(
        benchmark,
        lambda: qkernels.quant_range(x, bits=8, axis=0),
        {"copy": lambda: out.copy_(x), "torch.aminmax": lambda: torch.aminmax(x, dim=1)},
        work=work_of("quant_range minmax", x, BYTES, READ, axis=0, copied=2 * BYTES),
        rounds=15,
    )


@pytest.mark.bar
def bench_mse(benchmark: Any) -> None:
    x = torch.randn(SHAPE)
    out = torch.empty_like(x)
    kw: dict[str, Any] = dict(bits=4, symmetric=True)
    assert_mse(x, 0, **kw)
    race(
        benchmark,
        lambda: qkernels.quant_range(x, axis=0, method="mse", **kw),
        {"copy": lambda: out.copy_(x), "eager, 8 of 80 candidates": lambda: eager_mse(x, [1])},
        work=work_of("quant_range mse", x, BYTES, READ, axis=0, copied=2 * BYTES),
        rounds=2,
    )


def eager_mse(x: Tensor, dims: list[int]) -> Tensor:
    """Eight of the eighty candidates, one after the other, as observers do it."""
    x = x.float()
    top = x.abs().amax(dims, keepdim=True)
    found = []
    for k in range(0, 80, 10):
        s = top * (1 - 0.01 * k) / 7.5
        y = torch.clamp(torch.round(x / s), -8, 7) * s
        found.append((y - x).square_().sum(dims))
    return torch.stack(found).argmin(0)


@pytest.mark.sweep("quant_range", large=True)
def bench_quant_range_minmax(benchmark: Any, spot: Spot) -> None:
    x = spot.x
    got = qkernels.observe_range(x, bits=8, **spot.place())
    want = qkernels.observe_range(x, bits=8, axis=spot.axis, backend="reference")
    for name, a, b in zip(("scale", "zero point", "range"), got, want, strict=True):
        assert_same(a, b, name)
    work: dict[str, Call] = {"eager composite": lambda: minmax_composite(x, 0, 255, spot.dims)}
    torch.testing.assert_close(got[0].flatten(), work["eager composite"]()[0].flatten())
    if spot.axis in (None, 0):
        rows = x.flatten(1) if spot.axis == 0 else x
        work["torch core"] = (
            (lambda: torch.aminmax(rows, dim=1)) if spot.axis == 0 else (lambda: torch.aminmax(x))
        )
    if spot.compiles():
        fused = compiled(minmax_composite)
        work["torch.compile"] = lambda: fused(x, 0, 255, spot.dims)
        torch.testing.assert_close(got[0].flatten(), work["torch.compile"]()[0].flatten())
    if "torch core" in work:
        assert_same(torch.stack(tuple(work["torch core"]())).float(), got[2])
    on_gpu = spot.device == "cuda" and spot.point.size == "64Mi"
    peers = tuple(Bar(n, 1) for n in ("torch core", "torch.compile") if n in work)
    race(
        benchmark,
        lambda: qkernels.quant_range(x, bits=8, **spot.place()),
        {**copies(x, bytes_of(x)), **work},
        bars=(Bar("copy", 0.85), *peers) if on_gpu else (),
        work=spot.work(bytes_of(x), READ, "quant_range minmax"),
    )


@pytest.mark.sweep("quant_range")
def bench_quant_range_percentile(benchmark: Any, spot: Spot) -> None:
    """The rival kthvalue takes the nearest rank; torch.quantile refuses more than 16 Mi."""
    x = spot.x
    kw: dict[str, Any] = dict(bits=8, method="percentile", percentile=99.0)
    got = qkernels.observe_range(x, **kw, **spot.place())[2]
    assert_same(got, qkernels.observe_range(x, **kw, axis=spot.axis, backend="reference")[2])
    work: dict[str, Call] = {}
    if spot.axis in (None, 0):
        rows = x.flatten(1) if spot.axis == 0 else x.reshape(1, -1)
        work["two kthvalue"] = lambda: kthvalue_percentile(rows, 99.0)
        theirs = torch.stack(work["two kthvalue"]()).float().reshape(got.shape)
        torch.testing.assert_close(theirs, got, rtol=0, atol=0.5)  # at most a rank apart
    race(
        benchmark,
        lambda: qkernels.quant_range(x, **kw, **spot.place()),
        {**copies(x, bytes_of(x)), **work},
        work=spot.work(bytes_of(x), READ, "quant_range percentile"),
    )


@pytest.mark.sweep("quant_range")
def bench_quant_range_mse(benchmark: Any, spot: Spot) -> None:
    x = spot.x
    kw: dict[str, Any] = dict(bits=4, symmetric=True)
    assert_mse(x, spot.axis, backend=spot.backend, **kw)
    race(
        benchmark,
        lambda: qkernels.quant_range(x, method="mse", **kw, **spot.place()),
        {**copies(x, bytes_of(x)), "eager, 8 of 80 candidates": lambda: eager_mse(x, spot.dims)},
        work=spot.work(bytes_of(x), READ, "quant_range mse"),
    )
