"""QAT tax: a training step with fake quantization over the same step without, whole nets, W4A4.

    pytest benchmarks/bench_step.py [--full | --short] [--device cpu|cuda] [-k resnet18]

A step is forward, cross-entropy, backward and SGD with momentum, at 3x32x32. All contenders live
in one process, each with its own copy of the net, and take turns step by step; the tax is the
median of the ratios within a round. `--full` adds torch core's ops, torchao and torch.compile
(which compiles for minutes). Bars are reported, never asserted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness.clocks import read_ledger
from harness.record import environment
from harness.sweep import OPTIONS
from harness.timing import hand_over, micro, percentile
from step.check import assert_backends_agree, assert_same_codes
from step.nets import CLASSES, NETS
from step.race import PEAK_HOW, Step, captured, peak_bytes, race, saved_bytes
from step.rows import (
    BARS,
    BWRF,
    DNQ,
    FULL_ROWS,
    GRAPH_ROWS,
    PLAIN_QAT,
    ROWS,
    base,
    make_step,
    why_not,
)

# pictures a step: on a CPU for some 0.3 s on two cores, on a GPU so that kernels outlast launches
BATCH = {"cpu": 32, "cuda": 256}
ROUNDS, SHORT_ROUNDS = 15, 5
IN_A_ROW = {"cpu": 1, "cuda": 3}  # a GPU's queue is filled as in a training loop
PARITY_BATCH = 8


class Outcome(NamedTuple):
    """What was measured of one row."""

    times: list[float]  # seconds
    loss: float
    peak: int | None  # bytes
    saved: int | None
    first: float  # seconds of the first step, which compiles if anything does


def rows_of(config: Any) -> list[str]:
    """The contenders of this run."""
    options = config.stash[OPTIONS]
    rows = [*ROWS, DNQ, *BWRF]
    if options.device == "cuda":
        rows += GRAPH_ROWS
    return [*rows, *FULL_ROWS] if options.level == "full" else rows


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("row", rows_of(metafunc.config))
    metafunc.parametrize("net", NETS)


def wanted(request: Any, net: str) -> list[str]:
    """The rows of a net that this run has selected, and the rows that they are held against."""
    chosen = [
        item.callspec.params["row"]
        for item in request.session.items
        if getattr(item, "module", None) is request.module and item.callspec.params["net"] == net
    ]
    chosen = [row for row in chosen if why_not(row) is None]
    plain = [PLAIN_QAT] if any(row in BWRF for row in chosen) else []
    return list(dict.fromkeys(["float", *(base(row) for row in chosen), *plain, *chosen]))


def assert_parity(net: str, rows: list[str], device: str) -> None:
    """Nothing is timed unless ours equals the reference, and others ours but for ties. BWRF has the
    quantizers of ours LSQ, which runs beside it."""
    torch.manual_seed(1)
    model = NETS[net]().to(device)
    x = torch.randn(PARITY_BATCH, 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (PARITY_BATCH,), device=device)
    for row in ("ours STE", "ours LSQ", DNQ):
        if row in rows:
            assert_backends_agree(row, model, x, labels)
    for row in ("torch.ao", "composite", "torch core"):
        if row in rows:
            build = (ROWS | FULL_ROWS)[row]
            assert_same_codes(ROWS["ours STE"](model), build(model), x)


def measure(net: str, rows: list[str], device: str, rounds: int) -> dict[str, Outcome]:
    """Every row's steps in turn, then its memory."""
    assert_parity(net, rows, device)
    torch.manual_seed(0)
    model = NETS[net]().to(device)
    x = torch.randn(BATCH[device], 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (BATCH[device],), device=device)
    steps = {row: make_step(row, model, x, labels) for row in rows}
    calls: dict[str, Callable[[], Any]] = {}
    losses, first = {}, {}
    for row, step in steps.items():
        start = time.perf_counter()
        losses[row] = step().item()
        first[row] = time.perf_counter() - start
        step()  # its memory has been asked for once
        calls[row] = captured(step) if row in GRAPH_ROWS else step
    times = race(calls, rounds, IN_A_ROW[device], device)
    return {row: outcome(row, steps[row], times[row], losses, first, device) for row in rows}


def outcome(
    row: str,
    step: Step,
    times: list[float],
    losses: dict[str, float],
    first: dict[str, float],
    device: str,
) -> Outcome:
    """The times with the memory of one more step; hooks and graphs do not see compiled steps."""
    peak = saved = None
    if "," not in row:
        saved, peak = saved_bytes(step), peak_bytes(step, device)
    return Outcome(times, losses[row], peak, saved, first[row])


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Outcome]]:
    """What was measured, by net; all rows of a net are measured together."""
    return {}


@pytest.mark.benchmark(timer=read_ledger)
def bench_step(
    benchmark: Any, request: Any, measured: dict[str, dict[str, Outcome]], net: str, row: str
) -> None:
    reason = why_not(row)
    if reason:
        pytest.skip(reason)
    options = request.config.stash[OPTIONS]
    device = options.device
    if net not in measured:
        rounds = SHORT_ROUNDS if options.level == "short" else ROUNDS
        measured[net] = measure(net, wanted(request, net), device, rounds)
    got = measured[net]
    benchmark.group = f"{net}, {device}"
    hand_over(benchmark, got[row].times)
    benchmark.extra_info.update(figures(net, row, got, device))


def ratios(times: list[float], to: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(times, to, strict=True)]


def figures(net: str, row: str, got: dict[str, Outcome], device: str) -> dict[str, Any]:
    """One row's entry of the JSON; times in us, memory in bytes."""
    own = got[row]
    taxes = ratios(own.times, got[base(row)].times)
    low, tax, high = (round(percentile(taxes, p), 4) for p in (20, 50, 80))
    info: dict[str, Any] = {
        "op": "qat_step",
        "clock": "wall clock" if device == "cpu" else "CUDA events",
        "row": row,
        "net": net,
        "batch": BATCH[device],
        "shape": [BATCH[device], 3, 32, 32],
        "dtype": "float32",
        "granularity": "W4 per channel, A4 per tensor, first and last layer 8 bits",
        "memory_format": "contiguous",
        "median_us": micro(statistics.median(own.times)),
        "p20_us": micro(percentile(own.times, 20)),
        "p80_us": micro(percentile(own.times, 80)),
        "calls": len(own.times),
        "tax": tax,
        "tax_p20": low,
        "tax_p80": high,
        "tax_against": base(row),
        "first_step_s": round(own.first, 2),
        "load": [round(v, 2) for v in os.getloadavg()],  # above the threads: a busy machine
        "loss": own.loss,
    } | environment(device)
    if own.peak is not None:
        info |= {"peak_bytes": own.peak, "saved_bytes": own.saved, "peak_how": PEAK_HOW[device]}
    if row in BWRF:
        beside = ratios(own.times, got[PLAIN_QAT].times)
        info |= {"beside": PLAIN_QAT, "times_beside": round(statistics.median(beside), 4)}
    return info | {"figures": verdict(net, row, tax, got, device)}


def verdict(
    net: str, row: str, tax: float, got: dict[str, Outcome], device: str
) -> dict[str, float]:
    """The tax, its bar and torch.ao's tax in words for the table at the end."""
    if row.startswith("float") and row == base(row):
        return {"ms, step": round(statistics.median(got[row].times) * 1e3, 2)}
    text = f"times {base(row)}"
    asked = BARS.get((row, device)) if net == "resnet18" else None
    if asked is not None:
        text += f" (asked {asked:g}: {'met' if tax <= asked else 'MISSED'})"
    if row in BWRF:
        text += (
            f" ({statistics.median(ratios(got[row].times, got[PLAIN_QAT].times)):.3f} {PLAIN_QAT})"
        )
    elif row.startswith("ours") and row != DNQ and "," not in row and "torch.ao" in got:
        other = statistics.median(ratios(got["torch.ao"].times, got["float"].times))
        text += f" (torch.ao {other:.3f}: {'lower' if tax < other else 'NOT lower'})"
    return {text: tax}
