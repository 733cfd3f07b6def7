"""Shared fixtures, and the summary of rows that were not run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# `python -m pytest` puts this folder's parent first: without a build in place, its qkernels/ would
# hide the installed one
ROOT = Path(__file__).parent.parent
if not list((ROOT / "qkernels").glob("_C*.so")):
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import torch

# before triton is imported: without a GPU its kernels are interpreted on the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import rows

# what a file imports beyond torch and pytest; a machine without it leaves the file out and says so
NEEDS = {
    "test_bad_input.py": "hypothesis",
    "test_noise_bad_input.py": "hypothesis",
}
LEFT_OUT = {
    name: package for name, package in NEEDS.items() if importlib.util.find_spec(package) is None
}
collect_ignore = list(LEFT_OUT)


def pytest_report_header() -> list[str]:
    return [f"{name} is not run: {package} is not installed" for name, package in LEFT_OUT.items()]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the rows that no parity test ran: green does not mean that they work."""
    lines = rows.not_run()
    if lines and rows.ran:
        terminalreporter.section("rows that were NOT run")
        for line in lines:
            terminalreporter.line(line)
