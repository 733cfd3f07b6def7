"""Alternating timings: in every round each rival runs once, then ours.

Machines are noisy and their clocks drift. Times taken in turn share the drift, so that the ratio
of their medians says more than two medians taken one after the other. Ours is timed by
pytest-benchmark, the rivals in its untimed set-up. Each timed call comes right after an untimed one
of the same kind: all find their inputs in the same cache, and memory that they freed themselves,
not the traces of the rival before them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Call = Callable[[], Any]


class Bar(NamedTuple):
    """What is asked: `speedup` times as fast as a rival (below 1: at most that much slower)."""

    rival: str
    speedup: float


def race(
    benchmark: Any,
    ours: Call,
    rivals: dict[str, Call],
    *,
    bars: tuple[Bar, ...] = (),
    ideal_bytes: int | None = None,
    copy_bytes: int | None = None,
    rounds: int = 60,
    before: Call | None = None,
) -> None:
    """Time ours against its rivals and leave the figures in benchmark.extra_info.

    Args:
        bars: what is asked; reported, never asserted.
        ideal_bytes: bytes that the op must move; with a rival named "copy" that moves copy_bytes,
            the fraction of copy speed is reported.
        before: runs untimed before each timed call, of ours and of the rivals (to clear gradients).
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    prepare = before or (lambda: None)

    def setup() -> None:
        for name, call in rivals.items():
            prepare()
            call()
            prepare()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        prepare()
        ours()
        prepare()

    for call in (*rivals.values(), ours):  # compiles, allocates, wakes threads
        for _ in range(3):
            prepare()
            call()
    benchmark.pedantic(ours, setup=setup, rounds=rounds, iterations=1)
    median = benchmark.stats.stats.median
    medians = {name: statistics.median(t[-rounds:]) for name, t in times.items()}
    info = benchmark.extra_info
    info["median_us"] = round(median * 1e6, 2)
    info["rivals_us"] = {name: round(t * 1e6, 2) for name, t in medians.items()}
    info["speedup"] = {name: round(t / median, 3) for name, t in medians.items()}
    info["bars"] = {bar.rival: bar.speedup for bar in bars}
    if ideal_bytes is not None and copy_bytes is not None and "copy" in medians:
        fraction = (ideal_bytes / median) / (copy_bytes / medians["copy"])
        info["fraction_of_copy"] = round(fraction, 3)


def batched(call: Call, times: int) -> Call:
    """`times` calls as one, so that a call of some microseconds is long against the clock."""

    def many() -> None:
        for _ in range(times):
            call()

    return many
