"""pytest in several processes, without pytest-xdist, its results as one JSON.

    gpu_check/tests.py FILE --jobs N --seconds S [--every-row] -- PYTEST ARGUMENTS

Exit code 0 if all passed, at least one test did, and (--every-row) every row of the table for CUDA
ran on the device; 3 if all that was chosen was skipped; else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

NO_TESTS = 5  # pytest's exit code where a share is empty
GRACE = 6  # seconds in which an interrupted process writes its record
GIB_EACH = 1.5  # of GPU memory: a context, Triton's modules, and the tensors of a test
MOST = 10  # processes that take turns on one GPU


def processes(jobs: int) -> int:
    """Not more than the GPU has memory for."""
    import torch

    if not torch.cuda.is_available():
        return min(jobs, 4)
    free = torch.cuda.mem_get_info()[0] / 2**30
    return max(1, min(jobs, int(free / GIB_EACH), MOST))


def start(k: int, n: int, folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """One share of the tests in a process of its own."""
    env = dict(os.environ, QKERNELS_SHARE=f"{k}/{n} {folder / f'{k}.json'}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_check.pytest_plugin", "-p"]
    command += ["no:cacheprovider", "--tb=short", *arguments]
    with (folder / f"{k}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)


def wait(running: list[subprocess.Popen[str]], seconds: float) -> bool:
    """Until all have ended, or interrupt them; whether they ended by themselves."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.poll() is None for p in running):
        time.sleep(0.1)
    late = [p for p in running if p.poll() is None]
    for p in late:
        p.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for p in late:
        try:
            p.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
    return not late


def merged(folder: Path, codes: list[int]) -> dict[str, Any]:
    """The records of all shares as one; a process that died without one is a failure."""
    counts: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    slowest: list[tuple[str, float]] = []
    rows: set[str] = set()
    for k, code in enumerate(codes):
        file = folder / f"{k}.json"
        log = (folder / f"{k}.log").read_text(errors="replace")
        if not file.exists() or code not in (0, 1, NO_TESTS):
            counts["failed"] += 1
            failures.append({"test": f"process {k}, exit code {code}", "tail": log[-3000:]})
        if file.exists():
            record = json.loads(file.read_text())
            counts += Counter(record["counts"])
            skips += Counter(record["skips"])
            failures += record["failures"]
            slowest += record["slowest"]
            rows |= set(record["rows"])
    return {
        "counts": dict(counts),
        "skips": dict(skips),
        "failures": failures[:20],
        "slowest": sorted(slowest, key=lambda item: -item[1])[:10],
        "rows": sorted(rows),
    }


def missing_rows(ran: list[str]) -> list[str]:
    """Rows of the table for CUDA, other than the reference, that no test ran on the device."""
    from qkernels._table import ROWS

    wanted = [f"{r.op} cuda {r.backend}" for r in ROWS if r.device == "cuda"]
    return [w for w in wanted if not w.endswith("reference") and w not in ran]


def verdict(found: dict[str, Any]) -> int:
    counts = found["counts"]
    if counts.get("failed") or found["missing_rows"] or not found["finished"]:
        return 1
    if counts.get("passed"):
        return 0
    return 3 if counts.get("skipped") else 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--every-row", action="store_true")
    cut = sys.argv.index("--")
    asked, arguments = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    n = processes(asked.jobs)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        running = [start(k, n, Path(name), arguments) for k in range(n)]
        finished = wait(running, asked.seconds)
        found = merged(Path(name), [p.wait() for p in running])
    found["processes"], found["finished"] = n, finished
    found["seconds"] = round(time.monotonic() - began, 1)
    found["missing_rows"] = missing_rows(found["rows"]) if asked.every_row else []
    asked.file.write_text(json.dumps(found, indent=1))
    report(found)
    return verdict(found)


def report(found: dict[str, Any]) -> None:
    """For the log."""
    lines = [f"{found['processes']} processes, {found['seconds']} s: {found['counts']}"]
    lines += [f"FAILED {f['test']}\n{f['tail']}" for f in found["failures"]]
    lines += [f"no test ran the row {row}" for row in found["missing_rows"]]
    if not found["finished"]:
        lines.append("interrupted: out of time")
    lines += [f"{seconds} s {test}" for test, seconds in found["slowest"]]
    lines += [f"skipped {n}: {reason}" for reason, n in found["skips"].items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
