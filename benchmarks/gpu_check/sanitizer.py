"""The cases that compute-sanitizer watches: `gpu_check/sanitizer.py all|some`.

Every native kernel, on tensors of every shape and layout of tests/cases.py, as single calls and as
lists, and a few calls of the Triton rows. Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor
is then an allocation of its own, and an access outside of it is seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TESTS = str(Path(__file__).resolve().parents[2] / "tests")
STATS = ("error_stats", "error_stats_dynamic")
NOISE = ("differential_noise", "drop_in_noise", "uniform_noise")
Call = tuple[Any, ...]


def stats_calls(op: str, s: Any) -> list[Call]:
    """error_stats of a sample, without and with a moving average."""
    if op == "error_stats":
        args = (s.x, s.scale, s.zp, *s.range, *s.place, s.clip)
    else:
        args = (s.x, *s.range, *s.place, s.symmetric, "minmax", 99.0, s.clip)
    ema = torch.zeros(5, max(s.scale.numel(), 1), dtype=s.scale.dtype).to(s.x.device)
    return [args, (*args, ema, 0.9)] if s.scale.numel() else [args]


def noise_calls(op: str, s: Any) -> list[Call]:
    """Noise of a sample with a seed and a step as numbers and on the device."""
    mean, std = torch.zeros_like(s.scale), s.scale
    calls = []
    for counter in ((3, 2**40, None, None), (0, 0, *torch.tensor([3, 5]).to(s.x.device))):
        if op == "differential_noise":
            calls.append((s.x, mean, std, mean, std, *counter, 0.5, 3, *s.place))
        elif op == "drop_in_noise":
            calls.append((s.x, mean, std, 0.5, *counter, 0.5, 3, *s.place))
        else:
            calls.append((s.x, std, 0.5, *counter, 3, *s.place))
    return calls


def calls_of(op: str, chosen: list[Any]) -> list[Call]:
    """The calls of an op on all samples."""
    from lists import ARGUMENTS

    if op in ARGUMENTS:
        return [ARGUMENTS[op](s) for s in chosen]
    make = stats_calls if op in STATS else noise_calls
    return [call for s in chosen for call in make(op, s)]


def work(which: str, device: str) -> Iterator[str]:
    """Run the cases of every row for the device, a name after each."""
    from lists import samples

    from qkernels import _registry
    from qkernels._table import ROWS

    for row in ROWS:
        if row.device != device or row.backend == "reference":
            continue
        if device == "cpu" and _registry.unavailable(row):  # Triton, unless it is interpreted
            continue
        native = row.backend == "native"
        count = (99 if which == "all" else 10) if native else 3
        calls = calls_of(row.op, samples(count, large=native, device=device))
        function = _registry.resolve(row.target)
        for call in calls:
            function(*call)
            yield f"{row.op} {row.backend}"
        if row.foreach:
            _registry.resolve(row.foreach)(calls)
            yield f"{row.op} {row.backend}, list"
    if device == "cuda":
        torch.cuda.synchronize()  # an error of the last launch is raised here


def main() -> None:
    which = sys.argv[1]
    if which not in ("all", "some"):
        raise SystemExit(f"gpu_check: cases must be one of all, some, got {which}")
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch finds no CUDA device")
    sys.path.insert(0, TESTS)
    done = Counter(work(which, "cuda"))
    sys.stdout.write(f"all cases were run: {sum(done.values())} of {len(done)} rows and lists\n")


if __name__ == "__main__":
    main()
