"""Ranges: fp32, 512 x 4608, per channel, 2 threads."""

from __future__ import annotations

from typing import Any

import torch
from compare import assert_same, assert_values
from rivals import kthvalue_percentile
from timing import Bar, race

import qkernels

SHAPE = (512, 4608)
BYTES = SHAPE[0] * SHAPE[1] * 4


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
        ideal_bytes=BYTES,
        copy_bytes=2 * BYTES,
        rounds=5,
    )


def bench_minmax(benchmark: Any) -> None:
    x = torch.randn(SHAPE)
    out = torch.empty_like(x)
    got = qkernels.observe_range(x, bits=8, axis=0)[2]
    assert_same(got, torch.stack(torch.aminmax(x, dim=1)))
    race(
        benchmark,
        lambda: qkernels.quant_range(x, bits=8, axis=0),
        {"copy": lambda: out.copy_(x), "torch.aminmax": lambda: torch.aminmax(x, dim=1)},
        ideal_bytes=BYTES,
        copy_bytes=2 * BYTES,
    )


def bench_mse(benchmark: Any) -> None:
    x = torch.randn(SHAPE)
    out = torch.empty_like(x)
    kw: dict[str, Any] = dict(bits=4, axis=0, symmetric=True, method="mse")
    small = x[:16]
    scale, zp = qkernels.quant_range(small, **kw)
    other, _ = qkernels.quant_range(small, **kw, backend="reference")
    errors = [
        (qkernels.fake_quant(small, s, zp, bits=4, axis=0, symmetric=True) - small).square().sum()
        for s in (scale, other)
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)

    def eager() -> torch.Tensor:
        """Eight of the eighty candidates, one after the other, as observers do it."""
        top = x.abs().amax(1, keepdim=True)
        found = []
        for k in range(0, 80, 10):
            s = top * (1 - 0.01 * k) / 7.5
            y = torch.clamp(torch.round(x / s), -8, 7) * s
            found.append((y - x).square_().sum(1))
        return torch.stack(found).argmin(0)

    race(
        benchmark,
        lambda: qkernels.quant_range(x, **kw),
        {"copy": lambda: out.copy_(x), "eager, 8 of 80 candidates": eager},
        ideal_bytes=BYTES,
        copy_bytes=2 * BYTES,
        rounds=2,
    )
