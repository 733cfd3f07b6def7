"""Cold memory on the CPU: what a call costs when nothing of it lies in a cache.

The other benchmarks repeat a call on one tensor, which the last-level cache holds at 2.25 Mi
elements. Here every call, ours and the rivals' alike, takes the next of a set of inputs four times
as large as the cache, and its result takes the place of the one as many calls before it: when
memory comes round again it has long left the cache. (On a GPU the cache is flushed anyway.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.clocks import MIB, Call, read_ledger
from harness.headline import BYTES, QMAX, QMIN, SHAPE, assert_parity
from harness.record import Work, work_of
from harness.rivals import compiled, composite
from harness.timing import race
from torch import Tensor

import qkernels

pytestmark = [pytest.mark.benchmark(timer=read_ledger), pytest.mark.bar]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 * MIB  # where the system does not tell


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core."""
    sizes = []
    for file in CACHES.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": MIB}.get(text[-1], 0)
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes, default=UNKNOWN_CACHE)


class Rotation:
    """Calls on inputs that follow each other; each result lives until its place comes round."""

    def __init__(self, xs: list[Tensor]) -> None:
        self.xs = xs

    def over(self, call: Callable[[Tensor], Any]) -> Call:
        results: list[Any] = [None] * len(self.xs)
        places = itertools.cycle(range(len(self.xs)))

        def turn() -> None:
            i = next(places)
            results[i] = None
            results[i] = call(self.xs[i])

        return turn


def cold_inputs() -> Rotation:
    count = max(4, -(-4 * last_level_cache() // BYTES))
    return Rotation([torch.randn(SHAPE) for _ in range(count)])


def work(op: str, ideal: int, formula: str) -> Work:
    return work_of(
        op, torch.empty(SHAPE), ideal, formula, axis=0, copied=2 * BYTES, suite="cold", size="cold"
    )


def bench_cold_fake_quant(benchmark: Any) -> None:
    turns = cold_inputs()
    x = turns.xs[0]
    scale, zp = qkernels.quant_range(x, bits=8, axis=0)
    column, offset = scale[:, None], zp[:, None]
    by_hand = compiled(composite)
    core = torch.fake_quantize_per_channel_affine
    assert_parity(x, scale, zp, core(x, scale, zp, 0, QMIN, QMAX))
    assert_parity(x, scale, zp, by_hand(x, column, offset, QMIN, QMAX))
    outs = itertools.cycle([torch.empty_like(t) for t in turns.xs])
    race(
        benchmark,
        turns.over(lambda t: qkernels.fake_quant(t, scale, zp, bits=8, axis=0)),
        {
            "copy": turns.over(lambda t: next(outs).copy_(t)),
            "clone": turns.over(lambda t: t.clone()),
            "torch core": turns.over(lambda t: core(t, scale, zp, 0, QMIN, QMAX)),
            "torch.compile": turns.over(lambda t: by_hand(t, column, offset, QMIN, QMAX)),
        },
        work=work("fake_quant, no gradient", 2 * BYTES, "read x, write y: 2 N s"),
        rounds=15,
        memory=False,
    )


def bench_cold_quant_range(benchmark: Any) -> None:
    turns = cold_inputs()
    x = turns.xs[0]
    scale, _ = qkernels.quant_range(x, bits=8, axis=0)
    assert torch.equal(scale, qkernels.quant_range(x, bits=8, axis=0, backend="reference")[0])
    outs = itertools.cycle([torch.empty_like(t) for t in turns.xs])
    race(
        benchmark,
        turns.over(lambda t: qkernels.quant_range(t, bits=8, axis=0)),
        {
            "copy": turns.over(lambda t: next(outs).copy_(t)),
            "torch core": turns.over(lambda t: torch.aminmax(t, dim=1)),
            "amin and amax": turns.over(lambda t: (t.amin(1), t.amax(1))),
        },
        work=work("quant_range minmax", BYTES, "read x once: N s"),
        rounds=15,
        memory=False,
    )
