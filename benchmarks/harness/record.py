"""What a result says besides its time: the work, the memory, the machine and the versions."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clocks import Call


class Work(NamedTuple):
    """What one call does. `ideal_bytes` must be read or written by any implementation."""

    op: str
    row: str
    granularity: str
    dtype: str
    shape: tuple[int, ...]
    memory_format: str
    device: str
    ideal_bytes: int
    formula: str  # of ideal_bytes; N elements, s bytes each
    copied: int  # bytes that the rival named "copy" reads and writes
    suite: str = "sweep"  # or "bar", "cold"
    size: str = ""  # "2Mi"; how a sweep calls the shape
    elements: int = 0  # of a list of tensors; else the shape says

    @property
    def numel(self) -> int:
        return self.elements or torch.Size(self.shape).numel()

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        found = self._asdict()
        found["shape"] = list(self.shape)
        found["elements"] = self.numel
        return found


def granularity(axis: int | None, group_size: int | None = None) -> str:
    if group_size is not None:
        return f"groups of {group_size}"
    return "tensor" if axis is None else f"channel (axis {axis})"


def memory_format(x: Tensor) -> str:
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return f"strides {tuple(x.stride())}"


def work_of(
    op: str,
    x: Tensor,
    ideal_bytes: int,
    formula: str,
    *,
    axis: int | None = None,
    row: str = "native",
    copied: int | None = None,
    suite: str = "bar",
    size: str = "",
) -> Work:
    """The work of an op on x. copied: default, a copy that moves ideal_bytes."""
    return Work(
        op,
        row,
        granularity(axis),
        str(x.dtype).removeprefix("torch."),
        tuple(x.shape),
        memory_format(x),
        x.device.type,
        ideal_bytes,
        formula,
        ideal_bytes if copied is None else copied,
        suite,
        size,
    )


def saved_bytes(call: Call) -> int:
    """Bytes that autograd saves for the backward in a call, each tensor each time it is saved."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(sizes)


def peak_bytes(call: Call, device: str) -> tuple[int, str]:
    """Memory of a call, its results included, and how it was measured.

    On a GPU the peak of torch's allocator above what was held before. The CPU allocator keeps no
    peak: there it is the sum of what every torch op of the call allocates and keeps beyond itself,
    as the profiler sees it, which the peak cannot exceed but for what an op frees within itself
    (and without what C++ code takes from malloc: scratch of some KB per thread).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before, "peak of the CUDA allocator"
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    taken = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    return taken, "bytes allocated, by torch.profiler"


@functools.cache
def commit() -> str:
    """QKERNELS_COMMIT, or that of the repository that holds this file, "-dirty" if files differ;
    "unknown" outside one."""
    if given := os.environ.get("QKERNELS_COMMIT"):
        return given
    root = Path(__file__).parent
    try:
        hash_ = git(root, "rev-parse", "--short=12", "HEAD")
        return f"{hash_}-dirty" if git(root, "status", "--porcelain", "-uno") else hash_
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu_name() -> str:
    """The model in /proc/cpuinfo, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def environment(device: str) -> dict[str, Any]:
    """Versions, device, commit and threads."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "commit": commit(),
        "threads": torch.get_num_threads(),
    }
