"""Reads pytest-benchmark's JSON with what the benchmarks leave in extra_info."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# what the machine can do, and our own other forms: neither is a peer
NO_PEERS = ("copy", "clone", ", a read", "ours")


class ReportError(Exception):
    """A file that cannot be read, or says what no result says."""


@dataclass(frozen=True)
class Result:
    """One benchmark. `info` is its extra_info; times are medians in microseconds."""

    name: str
    median_us: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What the same benchmark of another run has too."""
        return self.name, self.device

    @property
    def device(self) -> str:
        return str(self.info.get("device_name", self.info.get("device", "unknown")))

    @property
    def op(self) -> str:
        return str(self.info.get("op", self.name))

    def text(self, key: str) -> str:
        return str(self.info.get(key, ""))

    def number(self, key: str) -> float | None:
        value = self.info.get(key)
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def shape(self) -> str:
        if self.text("memory_format") == "list":
            return self.text("size")
        shape = " x ".join(str(n) for n in self.info.get("shape", ()))
        order = self.text("memory_format")
        return shape if order in ("", "contiguous") else f"{shape}, {order}"

    @property
    def times(self) -> dict[str, float]:
        """Rivals' medians."""
        return dict(self.info.get("rivals_us", {}))

    @property
    def peers(self) -> dict[str, float]:
        """Those who do the same work."""
        return {n: us for n, us in self.times.items() if not any(part in n for part in NO_PEERS)}

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=lambda n: self.peers[n]) if self.peers else None

    @property
    def ratio(self) -> float | None:
        """The best peer's time by ours: below 1 is a loss."""
        best = self.best_peer
        return self.peers[best] / self.median_us if best else None

    @property
    def bars(self) -> dict[str, tuple[float, float]]:
        """Rival -> (reached, asked)."""
        asked, got = self.info.get("bars", {}), self.info.get("speedup", {})
        return {name: (float(got[name]), float(bar)) for name, bar in asked.items() if name in got}


@dataclass(frozen=True)
class Figure:
    """Something that is not a time."""

    name: str
    what: str
    value: str


@dataclass(frozen=True)
class Results:
    """All of some files; of a benchmark that several hold for one device, the last."""

    rows: list[Result]
    figures: list[Figure]
    replaced: int = 0  # rows that a later file has too


def read(paths: list[Path]) -> Results:
    """The results of one or more files.

    Raises:
        ReportError: a file is absent, no JSON, or not pytest-benchmark's; nothing is read then.
    """
    rows: dict[tuple[str, str], Result] = {}
    figures: list[Figure] = []
    count = 0
    for path in paths:
        for number, bench in enumerate(benchmarks_of(path)):
            where = f"{path}: benchmark {number}"
            result, found = result_of(bench, where)
            figures += found
            if result is not None:
                rows[result.key] = result
                count += 1
    return Results(list(rows.values()), figures, count - len(rows))


def benchmarks_of(path: Path) -> list[Any]:
    """The list of benchmarks of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: must be JSON, got an error: {error}") from error
    found = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ReportError(f"{path}: must be a result of --benchmark-json, got no 'benchmarks' list")
    if not found:
        raise ReportError(f"{path}: must hold a benchmark, got an empty list")
    return found


def result_of(bench: Any, where: str) -> tuple[Result | None, list[Figure]]:
    """One benchmark as a row, or None if it has no time, and its figures."""
    if not isinstance(bench, dict) or not isinstance(bench.get("name"), str):
        raise ReportError(f"{where}: must be a dict with a name, got {str(bench)[:60]}")
    name = bench["name"].removeprefix("bench_")
    info, stats = bench.get("extra_info", {}), bench.get("stats", {})
    if not isinstance(info, dict) or not isinstance(stats, dict):
        raise ReportError(f"{where} ({name}): extra_info and stats must be dicts")
    figures = [Figure(name, what, str(v)) for what, v in info.get("figures", {}).items()]
    median = info.get("median_us", None)
    if median is None:
        seconds = stats.get("median", 0.0)
        median = seconds * 1e6 if isinstance(seconds, (int, float)) else seconds
    if not isinstance(median, (int, float)) or not math.isfinite(median) or median < 0:
        raise ReportError(f"{where} ({name}): the median must be a time, got {median!r}")
    for key in ("rivals_us", "bars", "speedup"):
        check_numbers(info.get(key, {}), f"{where} ({name}): {key}")
    return (Result(name, float(median), info) if median > 0 else None), figures


def check_numbers(values: Any, what: str) -> None:
    """A dict of finite numbers, or a ReportError."""
    if not isinstance(values, dict):
        raise ReportError(f"{what} must be a dict, got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ReportError(f"{what}[{name!r}] must be a number, got {value!r}")
