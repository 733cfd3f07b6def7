"""The rows of the table as the tests run them: on the device, interpreted, or under the shim."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from qkernels import _native, _registry
from qkernels._table import ROWS, STEMS, Row

HAS_GPU = torch.cuda.is_available()
NO_GPU = "no GPU here"
ON_GPU = "runs on the GPU itself"


class Runner(NamedTuple):
    """A row and the way to run it here."""

    row: Row
    how: str  # "" on its device; "interpreted": Triton on the CPU; "shim": CUDA code on the CPU

    @property
    def id(self) -> str:
        return f"{self.row.device}-{self.row.backend}" + (f"-{self.how}" if self.how else "")

    @property
    def device(self) -> str:
        return "cuda" if self.row.device == "cuda" and not self.how else "cpu"

    @property
    def slow(self) -> bool:
        """Interpreted and shimmed kernels take a millisecond and more for each block."""
        return bool(self.how)


ran: set[Runner] = set()  # what the parity tests ran


def why_not(runner: Runner) -> str | None:
    """Why the row cannot be run here in this way, or None."""
    row, how = runner
    if how == "shim":
        if HAS_GPU:
            return ON_GPU
        return None if shutil.which("g++") else "the host shim needs g++"
    if row.backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if how == "interpreted":
        return ON_GPU if HAS_GPU else None
    if row.device == "cuda" and not HAS_GPU:
        return NO_GPU
    return _registry.unavailable(row)


def runners(op: str) -> list[Runner]:
    """Every way to run every row of an op but the reference."""
    found = []
    for row in ROWS:
        if row.op != op or row.backend == "reference":
            continue
        if row.backend == "triton" and row.device == "cpu":
            found.append(Runner(row, "interpreted"))
        else:
            found.append(Runner(row, ""))
        if row.device == "cuda" and row.backend == "native":
            found.append(Runner(row, "shim"))
    return found


def params(op: str, large: bool = False) -> list[Any]:
    """runners(op) as pytest parameters. Rows of absent devices are left out, and named once in the
    summary; others that cannot run are skipped with the reason. Interpreted rows take no large
    cases, which would last minutes each."""
    result = []
    for runner in runners(op):
        why = why_not(runner)
        if why in (NO_GPU, ON_GPU) or (large and runner.how == "interpreted"):
            continue
        marks = [pytest.mark.skip(reason=f"{op} {runner.id}: {why}")] if why else []
        result.append(pytest.param(runner, id=runner.id, marks=marks))
    return result


@contextmanager
def shimmed() -> Iterator[None]:
    """The native rows run the CUDA kernels, compiled for the host, on CPU memory."""
    from shim import build

    module = build.load()
    with mock.patch.object(_native, "target", lambda x: (module, 0, 0)):
        yield


def run(runner: Runner, *args: Any) -> Any:
    """Run the row; args[0] lies on runner.device."""
    ran.add(runner)
    function = _registry.resolve(runner.row.target)
    if runner.how == "shim":
        with shimmed():
            return function(*args)
    return function(*args)


def run_list(runner: Runner, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run the list form of the row."""
    ran.add(runner)
    assert runner.row.foreach is not None, f"{runner.id} has no list form"
    function = _registry.resolve(runner.row.foreach)
    if runner.how == "shim":
        with shimmed():
            return function(calls)
    return function(calls)


def reference(op: str, *args: Any) -> Any:
    """Run the reference row."""
    return _registry.resolve(f"qkernels.backends.reference.{STEMS[op]}:{op}")(*args)


def not_run() -> list[str]:
    """The rows that no parity test ran on their device, with the reason and what ran instead."""
    instead = {
        "native": "the same kernels ran on the CPU under the host shim",
        "triton": "the same kernels ran in Triton's interpreter",
    }
    lines = []
    for row in ROWS:
        ways = {r.how for r in ran if r.row == row}
        if row.backend == "reference" or "" in ways or "interpreted" in ways:
            continue
        reasons = [why_not(r) for r in runners(row.op) if r.row == row and r.how != "shim"]
        why = "; ".join(dict.fromkeys(r for r in reasons if r)) or "not selected"
        twin = {r.how for r in ran if r.row.op == row.op and r.row.backend == row.backend}
        if why == NO_GPU and twin & {"shim", "interpreted"}:
            why = f"{why}; {instead[row.backend]}"
        lines.append(f"{row.op} {row.device} {row.backend}: {why}")
    return lines
