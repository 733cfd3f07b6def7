"""error_stats: fp32, 512 x 4608, per channel, 2 threads."""

from __future__ import annotations

from typing import Any

import torch
from compare import assert_sums
from rivals import compiled, composite
from timing import Bar, race
from torch import Tensor

import qkernels

SHAPE = (512, 4608)
BYTES = SHAPE[0] * SHAPE[1] * 4


def error_composite(
    x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the error of each row, as one writes it by hand."""
    e = composite(x, scale, zp, qmin, qmax) - x
    return e.mean(1), e.var(1, unbiased=False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(x, scale, zero point)."""
    x = torch.randn(SHAPE)
    return x, *qkernels.quant_range(x, bits=4, axis=0)


def assert_parity(x: Tensor, scale: Tensor | None, zp: Tensor | None) -> None:
    """Nothing is timed unless the statistics are those of the reference."""
    ours = qkernels.error_stats(x, scale, zp, bits=4, axis=0)
    theirs = qkernels.error_stats(x, scale, zp, bits=4, axis=0, backend="reference")
    size = theirs.mean_square.sqrt()
    for name, terms in zip(ours._fields, (size, size.square(), size.square(), 1), strict=True):
        one, two = getattr(ours, name), getattr(theirs, name)
        assert_sums(one, two, torch.as_tensor(terms).expand_as(two), name)


def bench_error_stats(benchmark: Any) -> None:
    x, scale, zp = inputs()
    column, offset = scale[:, None], zp[:, None]
    by_hand = compiled(error_composite)
    assert_parity(x, scale, zp)
    mean, var = by_hand(x, column, offset, 0, 15)
    ours = qkernels.error_stats(x, scale, zp, bits=4, axis=0)
    # one code in 100 000 is another next to a tie (x / scale + zp is rounded, not x / scale)
    torch.testing.assert_close(mean, ours.mean, rtol=0, atol=float(scale.max()) * 1e-3)
    torch.testing.assert_close(var, ours.var, rtol=1e-2, atol=0)
    out = torch.empty_like(x)
    race(
        benchmark,
        lambda: qkernels.error_stats(x, scale, zp, bits=4, axis=0),
        {
            "copy": lambda: out.copy_(x),
            "x.sum()": x.sum,
            "torch.compile": lambda: by_hand(x, column, offset, 0, 15),
        },
        bars=(Bar("x.sum()", 1 / 2.5), Bar("torch.compile", 2)),
        ideal_bytes=BYTES,
        copy_bytes=2 * BYTES,
    )


def bench_error_stats_dynamic(benchmark: Any) -> None:
    x, _, _ = inputs()
    assert_parity(x, None, None)

    def two_calls() -> Any:
        scale, zp = qkernels.quant_range(x, bits=4, axis=0)
        return qkernels.error_stats(x, scale, zp, bits=4, axis=0)

    out = torch.empty_like(x)
    race(
        benchmark,
        lambda: qkernels.error_stats(x, bits=4, axis=0),
        {"copy": lambda: out.copy_(x), "quant_range, then error_stats": two_calls},
        ideal_bytes=BYTES,
        copy_bytes=2 * BYTES,
    )
