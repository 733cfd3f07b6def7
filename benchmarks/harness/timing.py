"""Alternating timings: rivals and ours take turns, a few calls each, for many rounds.

Machines are noisy and their clocks drift. Times taken in turn share the drift, so that the ratio
of their medians says more than two medians taken one after the other. A turn begins with untimed
calls of the same kind: what is timed is the steady state of a loop over one op, with its inputs in
whatever cache holds them and memory that it freed itself, not the traces of the rival before it.
(`cold.py` is the other extreme. On a GPU the L2 cache is flushed before every call.)

The bars are timed in `rounds` turns of 8 untimed and 5 timed calls. A sweep has a budget of seconds
per contender instead: 2 to 15 rounds in the same turns, of fewer calls where a call is long, at
least 1 untimed and 2 timed. So no median is of fewer than 4 calls; `calls` in the results says of
how many.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from .clocks import Call, Clock, CudaClock, clock_for, ledger, nothing
from .record import Work, environment, peak_bytes, saved_bytes

WARM, TIMED = 8, 5  # calls in a turn
LONG_WARM, LONG_TIMED = 1, 2  # where a call takes longer than LONG seconds
LONG = 0.01
FEWEST, MOST = 2, 15  # rounds of a sweep
SMALL = 1 << 20  # elements below which the eager wall clock on a GPU is told too

_settings = {"budget": 0.15}


def set_budget(seconds: float) -> None:
    """Seconds per contender of a sweep."""
    _settings["budget"] = seconds


class Bar(NamedTuple):
    """What is asked: `speedup` times as fast as a rival (below 1: at most that much slower)."""

    rival: str
    speedup: float


class Turn(NamedTuple):
    """Calls of one contender before the next has its turn."""

    warm: int
    timed: int


def race(
    benchmark: Any,
    ours: Call,
    rivals: dict[str, Call],
    *,
    work: Work | None = None,
    bars: tuple[Bar, ...] = (),
    rounds: int | None = None,
    before: Call = nothing,
    memory: bool = True,
    one: Call | None = None,
) -> None:
    """Time ours against its rivals and leave the figures in benchmark.extra_info.

    Args:
        work: what is done, for the results; with a rival named "copy" that moves `copied` bytes
            the fraction of copy speed is reported.
        bars: what is asked; reported, never asserted.
        rounds: so many turns of 8 untimed and 5 timed calls; None: as the budget allows.
        before: runs untimed before each timed call, of ours and of the rivals (to clear gradients).
        memory: measure saved bytes and peak memory of a call, after the timing.
        one: the call whose memory that is, where ours is many.
    """
    contenders = {"ours": ours, **rivals}
    for call in (*rivals.values(), ours):  # compiles, allocates, wakes threads
        for _ in range(1 if benchmark.disabled else 3 if rounds else 2):
            before()
            call()
    if benchmark.disabled:
        return
    clock = clock_for(work.device if work else "cpu")
    turns, rounds = plan(clock, contenders, before, rounds)
    times = take_turns(clock, contenders, turns, rounds, before)
    hand_over(benchmark, times["ours"])
    info = benchmark.extra_info
    info |= figures(times, bars)
    info["clock"] = clock.how
    info |= environment(work.device if work else "cpu")
    if work is None:
        return
    info |= work.describe()
    info |= speed(times, work)
    if isinstance(clock, CudaClock) and work.numel < SMALL:
        walls = {name: clock.wall(call, prepare=before) for name, call in contenders.items()}
        info["wall_us"] = micro(walls.pop("ours"))
        info["rivals_wall_us"] = {name: micro(t) for name, t in walls.items()}
    if memory:
        before()
        info["saved_bytes"] = saved_bytes(one or ours)
        before()
        info["peak_bytes"], info["peak_how"] = peak_bytes(one or ours, work.device)


def plan(
    clock: Clock, contenders: dict[str, Call], before: Call, rounds: int | None
) -> tuple[dict[str, Turn], int]:
    """How many calls each contender has in a turn, and how many rounds there are."""
    if rounds is not None:
        return dict.fromkeys(contenders, Turn(WARM, TIMED)), rounds
    turns, total = {}, 0.0
    for name, call in contenders.items():
        seconds = min(clock.times(call, 2, before))
        long = seconds > LONG
        turns[name] = Turn(LONG_WARM, LONG_TIMED) if long else Turn(WARM, TIMED)
        total += seconds * sum(turns[name])
    budget = _settings["budget"] * len(contenders)
    return turns, max(FEWEST, min(MOST, int(budget / max(total, 1e-9))))


def take_turns(
    clock: Clock, contenders: dict[str, Call], turns: dict[str, Turn], rounds: int, before: Call
) -> dict[str, list[float]]:
    """Seconds of the timed calls of each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            warm, timed = turns[name]
            times[name] += clock.times(call, warm + timed, before)[warm:]
    return times


def hand_over(benchmark: Any, times: list[float]) -> None:
    """Give pytest-benchmark times that were measured: they become its statistics."""
    left = iter(times)
    benchmark.pedantic(lambda: ledger.spend(next(left)), rounds=len(times), iterations=1)
    told, measured = benchmark.stats.stats.median, statistics.median(times)
    if abs(told - measured) > 1e-3 * measured:
        raise RuntimeError(
            "race: the module must have pytestmark = pytest.mark.benchmark(timer=read_ledger), "
            f"got a median of {told:g} s for {measured:g} s"
        )


def micro(seconds: float) -> float:
    """Microseconds, rounded to a hundredth."""
    return round(seconds * 1e6, 2)


def percentile(times: list[float], percent: int) -> float:
    """The value below which `percent` % of the times lie."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def figures(times: dict[str, list[float]], bars: tuple[Bar, ...]) -> dict[str, Any]:
    """Medians, their spread, and how they compare."""
    own = times["ours"]
    rivals = {name: t for name, t in times.items() if name != "ours"}
    median = statistics.median(own)
    medians = {name: statistics.median(t) for name, t in rivals.items()}
    missing = [bar.rival for bar in bars if bar.rival not in rivals]
    if missing:
        raise ValueError(f"race: the rival of a bar must be timed, got none of {missing}")
    return {
        "median_us": micro(median),
        "p20_us": micro(percentile(own, 20)),
        "p80_us": micro(percentile(own, 80)),
        "calls": len(own),
        "rivals_us": {name: micro(t) for name, t in medians.items()},
        "rivals_calls": {name: len(t) for name, t in rivals.items()},
        "speedup": {name: round(t / median, 3) for name, t in medians.items()},
        "bars": {bar.rival: bar.speedup for bar in bars},
    }


def speed(times: dict[str, list[float]], work: Work) -> dict[str, Any]:
    """GB/s on the ideal bytes, and as a fraction of what the copy moves in a second."""
    own = work.ideal_bytes / statistics.median(times["ours"])
    found: dict[str, Any] = {"gb_per_s": round(own / 1e9, 3)}
    if "copy" in times:
        copy = work.copied / statistics.median(times["copy"])
        found["copy_gb_per_s"] = round(copy / 1e9, 3)
        found["fraction_of_copy"] = round(own / copy, 3)
    return found


def batched(call: Call, times: int) -> Call:
    """`times` calls as one, so that a call of some microseconds is long against the clock."""

    def many() -> None:
        for _ in range(times):
            call()

    return many
