"""The pool of studies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qtrain.study import run_all

JOB = """
import os, sys, time
from pathlib import Path
from qtrain.study import run_all

def work(place):
    Path(place, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(run_all([sys.argv[1]] * 2, work, label="test", processes=2))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie is dead, but for who should look after it
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(holds, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_killed_study_leaves_no_worker(tmp_path):
    script, place = tmp_path / "study.py", tmp_path / "pids"
    script.write_text(JOB)
    place.mkdir()
    study = subprocess.Popen([sys.executable, script, place], cwd=tmp_path)
    assert until(lambda: len(list(place.iterdir())) == 2)
    workers = [int(path.name) for path in place.iterdir()]
    assert all(map(alive, workers))
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert until(lambda: not any(map(alive, workers)))


def test_no_processes_are_refused():
    with pytest.raises(ValueError, match="test: jobs must be at least 1, got 0"):
        list(run_all([1], print, label="test", processes=0))
