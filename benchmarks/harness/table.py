"""The table at the end of a run: one line per result, the best rival and every bar, losses too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from report.read import NO_PEERS

HEAD = ("what", "us", "p20-p80", "GB/s", "of copy", "best rival", "its us", "ours is", "bars")


def lines(benchmarks: Iterable[Any]) -> list[str]:
    """Markdown with even columns; empty if nothing was timed."""
    rows, figures = [], []
    for bench in benchmarks:
        name, info = bench.name.removeprefix("bench_"), dict(bench.extra_info)
        if "median_us" in info:
            rows.append(row(name, info))
        figures += [f"{name}: {what}: {value}" for what, value in info.get("figures", {}).items()]
    if not rows and not figures:
        return []
    widths = [max(len(line[i]) for line in (HEAD, *rows)) for i in range(len(HEAD))]
    rule = tuple("-" * w for w in widths)
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
             for r in (HEAD, rule, *rows)]  # fmt: skip
    return [*table, "", *figures] if figures else table


def row(name: str, info: dict[str, Any]) -> tuple[str, ...]:
    """One result."""
    best, best_us = best_rival(info)
    fraction, speed = info.get("fraction_of_copy"), info.get("gb_per_s")
    spread = f"{info['p20_us']:.1f}-{info['p80_us']:.1f}" if "p20_us" in info else ""
    ratio = best_us / info["median_us"] if best else 0.0
    return (
        name,
        f"{info['median_us']:.1f}",
        spread,
        f"{speed:.1f}" if speed is not None else "",
        f"{fraction:.0%}" if fraction is not None else "",
        best,
        f"{best_us:.1f}" if best else "",
        f"{ratio:.2f}x{'' if ratio >= 1 else ' LOSS'}" if best else "",
        "; ".join(verdict(rival, asked, info) for rival, asked in info.get("bars", {}).items()),
    )


def best_rival(info: dict[str, Any]) -> tuple[str, float]:
    """(name, microseconds) of the fastest rival that does the work; ("", 0.0) without one."""
    times = {n: us for n, us in info.get("rivals_us", {}).items() if is_rival(n)}
    if not times:
        return "", 0.0
    best = min(times, key=lambda name: times[name])
    return best, times[best]


def is_rival(name: str) -> bool:
    return not any(part in name for part in NO_PEERS)


def verdict(rival: str, asked: float, info: dict[str, Any]) -> str:
    """Whether a bar was met: "torch core 29.1x of 20x met"."""
    got = info["speedup"][rival]
    return f"{rival} {got:.2f}x of {asked:.3g}x {'met' if got >= asked else 'MISSED'}"
