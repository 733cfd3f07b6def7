"""The machine in the JSON, and one table at the end: every row, losses included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels

THREADS = 2


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    """The figures of README are for two threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    info = qkernels.build_info()
    machine_info["qkernels"] = {k: v for k, v in info.items() if k != "rows"}


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = getattr(session, "benchmarks", [])
    if not benchmarks:
        return
    terminalreporter.section("ratio of medians (above 1: ours is faster); fraction of copy speed")
    terminalreporter.line("| what | us | against | us | faster | asked | copy speed |")
    terminalreporter.line("|---|---|---|---|---|---|---|")
    for bench in benchmarks:
        for line in table_rows(bench.name.removeprefix("bench_"), dict(bench.extra_info)):
            terminalreporter.line(line)


def table_rows(name: str, info: dict[str, Any]) -> list[str]:
    """One line per rival, and one per figure that is not a time."""
    lines = []
    fraction = info.get("fraction_of_copy")
    copy = f"{fraction:.0%}" if fraction is not None else ""
    for rival, speedup in info.get("speedup", {}).items():
        asked = info["bars"].get(rival)
        verdict = ""
        if asked is not None:
            verdict = f"{asked:g}x: {'met' if speedup >= asked else 'MISSED'}"
        lines.append(
            f"| {name} | {info['median_us']:.1f} | {rival} | {info['rivals_us'][rival]:.1f} | "
            f"{speedup:.2f}x | {verdict} | {copy} |"
        )
    for what, value in info.get("figures", {}).items():
        lines.append(f"| {name} | {value} | {what} | | | | |")
    return lines
