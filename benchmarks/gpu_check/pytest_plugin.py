"""A pytest plugin: runs one share of the tests and leaves what happened as JSON.

    QKERNELS_SHARE="2/8 FILE" python -m pytest -p gpu_check.pytest_plugin ...

A test belongs to the share that the CRC of its id says, so that shares need nothing of each other.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

MOST_FAILURES, TAIL = 10, 1500


class Record:
    """What happened in this process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = round(report.duration, 3)
        if report.skipped:
            place = report.longrepr
            reason = place[2] if isinstance(place, tuple) else str(place)
            self.counts["skipped"] += 1
            self.skips[reason.removeprefix("Skipped: ")] += 1
        elif report.failed:
            self.fail(report.nodeid, report.longreprtext)
        elif report.when == "call":
            self.counts["passed"] += 1

    @pytest.hookimpl
    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.fail(report.nodeid, report.longreprtext)

    def fail(self, test: str, text: str) -> None:
        self.counts["failed"] += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append({"test": test, "tail": text[-TAIL:]})

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:10]
        found = {
            "counts": self.counts,
            "skips": self.skips,
            "failures": self.failures,
            "slowest": slowest,
            "rows": rows_run(),
        }
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(self.file)


def rows_run() -> list[str]:
    """Rows of the table that ran on their device: "op device backend"."""
    rows = sys.modules.get("rows")
    ran = rows.ran if rows else ()
    return sorted({f"{r.row.op} {r.row.device} {r.row.backend}" for r in ran if not r.how})


def share() -> tuple[int, int, Path]:
    """(this share, number of shares, where the record goes)."""
    which, _, file = os.environ["QKERNELS_SHARE"].partition(" ")
    k, _, n = which.partition("/")
    return int(k), int(n), Path(file)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Record(share()[2]))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    k, n, _ = share()
    mine = [item for item in items if zlib.crc32(item.nodeid.encode()) % n == k]
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % n != k]
    config.hook.pytest_deselected(items=others)
    items[:] = mine
