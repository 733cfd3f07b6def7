"""benchmarks/gpu_check.sh without a GPU: its calls and verdicts, and the helpers that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from gpu_check import sanitizer, summary, tests

from qkernels._table import STEMS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.sh"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the parts would run")


def call(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script, with a work folder of its own."""
    environment = dict(os.environ, PYTHON=sys.executable)
    environment["QKERNELS_GPU_CHECK_WORK"] = str(tmp_path / "work")
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**environment, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_is_bash() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        ((), "OUTDIR must be a folder, got nothing"),
        (("OUT", "tests", "speed"), "part must be one of build tests sanitizer graph large bench"),
        (("--quick", "OUT"), "option must be --dry-run, got --quick"),
    ),
)
def test_a_wrong_call(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    given = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    done = call(tmp_path, *given)
    assert done.returncode == 2
    assert text in done.stderr and "usage: gpu_check.sh" in done.stderr
    assert not (tmp_path / "work").exists()


@no_gpu
def test_without_a_gpu_a_part_is_not_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(tmp_path, str(out), "graph", "bench")
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((out / "gpu_check.json").read_text())
    assert list(found["parts"]) == ["graph", "bench"]
    for part in found["parts"].values():
        assert part["verdict"] == "not run"
        assert part["reason"] == "no GPU: torch finds no CUDA device"
    assert found["info"]["torch"] == torch.__version__
    page = (out / "summary.md").read_text()
    assert "no GPU; nothing below was measured on one" in page and page in done.stdout
    assert {f.name for f in out.iterdir()} == {"summary.md", "gpu_check.json", "log.txt"}


@no_gpu
def test_a_dry_run_forgives_what_needs_a_gpu(tmp_path: Path) -> None:
    done = call(tmp_path, "--dry-run", str(tmp_path / "out"), "large")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not run" in done.stdout


def test_no_part_begins_without_time(tmp_path: Path) -> None:
    done = call(tmp_path, str(tmp_path / "out"), "build", QKERNELS_GPU_CHECK_SECONDS="10")
    assert done.returncode == 1
    assert "| build | not run | 0 |" in done.stdout and "no time left" in done.stdout


def test_a_failing_build_is_told(tmp_path: Path) -> None:
    """A Python without pip, and still a summary."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 7\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    done = call(tmp_path, str(tmp_path / "out"), "build", PYTHON=str(fake))
    assert done.returncode == 1
    assert "| build | failed |" in done.stdout and "exit code 1; see log.txt" in done.stdout


SAMPLE = """
import pytest
@pytest.mark.parametrize("i", range(9))
def test_many(i):
    pass
def test_skipped():
    pytest.skip("not today")
{more}
"""


def shards(tmp_path: Path, more: str, *extra: str) -> tuple[int, dict]:
    """Three processes over a small test file: exit code and what they found together."""
    tests = tmp_path / "test_sample.py"
    tests.write_text(SAMPLE.format(more=more))
    script, file = BENCHMARKS / "gpu_check/tests.py", tmp_path / "found.json"
    command = [sys.executable, str(script), str(file), "--jobs", "3", "--seconds", "60", *extra]
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--", str(tests), "-c", os.devnull, "--rootdir", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert file.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(file.read_text())


def test_processes_share_the_tests(tmp_path: Path) -> None:
    code, found = shards(tmp_path, "")
    assert found["counts"] == {"passed": 9, "skipped": 1}
    assert found["skips"] == {"not today": 1} and not found["failures"]
    assert code == 0 and found["finished"] and found["processes"] == 3


def test_a_failure_and_a_crash_are_told(tmp_path: Path) -> None:
    more = "def test_wrong():\n    assert 1 == 2\ndef test_dies():\n    import os; os._exit(3)"
    code, found = shards(tmp_path, more)
    assert code == 1
    told = " ".join(f["test"] for f in found["failures"])
    assert "exit code 3" in told
    assert found["counts"]["failed"] >= 1


def test_rows_that_no_test_ran_fail(tmp_path: Path) -> None:
    code, found = shards(tmp_path, "", "--every-row")
    assert code == 1 and len(found["missing_rows"]) == 2 * len(STEMS)
    ran = [f"{op} cuda {backend}" for op in STEMS for backend in ("native", "triton")]
    assert tests.missing_rows(ran[1:]) == ran[:1]


def test_verdicts_of_tests() -> None:
    good = {"counts": {"passed": 3}, "missing_rows": [], "finished": True}
    for change, code in (
        ({}, 0),
        ({"counts": {"passed": 3, "failed": 1}}, 1),
        ({"counts": {"skipped": 3}}, 3),
        ({"counts": {}}, 1),
        ({"finished": False}, 1),
        ({"missing_rows": ["lsq_bwd cuda native"]}, 1),
    ):
        assert tests.verdict({**good, **change}) == code, change


def test_the_sanitizer_sees_every_op() -> None:
    done = Counter(sanitizer.work("some", "cpu"))
    for op in STEMS:
        assert done[f"{op} native"] >= 10 and done[f"{op} native, list"] == 1


def row(name: str, fraction: float, elements: int = 1 << 26) -> dict:
    info = {"fraction_of_copy": fraction, "median_us": 10.0, "gb_per_s": 5.0, "elements": elements}
    return {"name": name, "extra_info": info, "stats": {"data": [1.0] * 9, "median": 1.0}}


def test_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "parts").mkdir(parents=True)
    out.mkdir()
    (work / "parts" / "tests").write_text("failed\n12\n150\nexit code 1; see log.txt\n")
    (work / "parts" / "bench").write_text("passed\n80\n95\n\n")
    (work / "tests.log").write_text("old\n" * 1_000_000 + "the last words\n")
    bench = [row("bench_quick", 0.97), row("bench_slow", 0.41), row("bench_small", 0.1, 1024)]
    (out / "bench.json").write_text(json.dumps({"benchmarks": bench}))
    monkeypatch.setattr(sys, "argv", ["", str(work), str(out), "tests", "graph", "bench"])
    assert summary.main() == 0
    page = (out / "summary.md").read_text()
    assert "| tests | failed | 12 | 150 | exit code 1; see log.txt |" in page
    assert "| graph | not run | 0 | 0 | not reached |" in page
    assert "the last words" in page, "the end of a failed part's log"
    assert "| slow | 10.0 | 5.0 | 41% |\n| quick |" in page and "small" not in page
    assert "data" not in json.loads((out / "bench.json").read_text())["benchmarks"][0]["stats"]
    assert (out / "log.txt").stat().st_size < 2_000_000
