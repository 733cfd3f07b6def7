"""Alternating timings: rivals and ours take turns, a few calls each, for many rounds.

Machines are noisy and their clocks drift. Times taken in turn share the drift, so that the ratio
of their medians says more than two medians taken one after the other. A turn begins with untimed
calls of the same kind: what is timed is the steady state of a loop over one op, with its inputs in
whatever cache holds them and memory that it freed itself, not the traces of the rival before it.
Ours is timed by pytest-benchmark, the rivals in its untimed set-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Call = Callable[[], Any]
WARM, TIMED = 8, 5  # calls in a turn


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
    rounds: int = 15,
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

    def timed(call: Call) -> float:
        prepare()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    calls = 0

    def setup() -> None:
        nonlocal calls
        if calls % TIMED == 0:  # ours has had its turn
            for name, call in rivals.items():
                turn = [timed(call) for _ in range(WARM + TIMED)]
                times[name] += turn[WARM:]
            for _ in range(WARM):
                timed(ours)
        calls += 1
        prepare()

    for call in (*rivals.values(), ours):  # compiles, allocates, wakes threads
        for _ in range(3):
            prepare()
            call()

    def run() -> None:
        ours()  # its result is dropped, as the rivals' are: a kept one takes the memory of the next

    benchmark.pedantic(run, setup=setup, rounds=rounds * TIMED, iterations=1)
    median = benchmark.stats.stats.median
    medians = {name: statistics.median(t) for name, t in times.items()}
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
