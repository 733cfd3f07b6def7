"""What the machine is and what was built, as JSON: `gpu_check/info.py FILE SITE [--built]`.

Exit code 0 if torch can use a GPU, 3 if not. With --built the package must be imported from the
folder SITE and, where there is a GPU, hold CUDA kernels: exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of the source tree, "+ changes" if files differ; QKERNELS_COMMIT goes first."""
    given = os.environ.get("QKERNELS_COMMIT")
    found = given or output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = not given and output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return (found or "unknown") + (" + changes" if changed else "")


def device() -> dict[str, Any]:
    """Of the GPU, {} without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "driver": output_of(*query).split("\n")[0],
    }


def describe() -> dict[str, Any]:
    """All that a reader of the results needs to know."""
    import torch

    nvcc = output_of("nvcc", "--version").split("\n")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "gpu": device(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
        "nvcc": nvcc[-2] if len(nvcc) > 1 else "none",
    }


def built() -> dict[str, Any]:
    """What `import qkernels` gives: its place and its build_info."""
    import qkernels

    info = qkernels.build_info()
    info.pop("rows")
    return {"qkernels_file": qkernels.__file__, "build": info}


def complaint(info: dict[str, Any], folder: Path) -> str:
    """What is wrong with the build, or ""."""
    native, place = info["build"]["native"], Path(info["qkernels_file"]).resolve()
    if not place.is_relative_to(folder.resolve()):
        return f"qkernels must be imported from {folder}, got {place}"
    if isinstance(native, str):
        return native
    if info["gpu"] and not native["cuda"]:
        return "qkernels._C must hold CUDA kernels, got a build without"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("--built", action="store_true")
    asked = parser.parse_args()
    info = describe()
    if asked.built or (asked.site / "qkernels").exists():
        info |= built()
    wrong = complaint(info, asked.site) if asked.built else ""
    asked.file.write_text(json.dumps(info, indent=1))
    sys.stdout.write(json.dumps(info, indent=1) + "\n")
    if wrong:
        sys.stdout.write(wrong + "\n")
    elif not info["gpu"]:
        sys.stdout.write("torch finds no CUDA device\n")
    if asked.built:
        return 1 if wrong else 0
    return 0 if info["gpu"] else 3


if __name__ == "__main__":
    sys.exit(main())
