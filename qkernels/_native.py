"""Loads the compiled module _C and says what it can do."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from types import ModuleType
from typing import Any

import torch  # before _C, so that both share one OpenMP runtime
from torch import Tensor

from qkernels._table import ROWS
from qkernels._version import __version__

HOW_TO_BUILD = "build it with `pip install .` in the source folder"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


# where a kernel runs: the compiled module, device -1 (CPU) or a CUDA index, threads or stream
Target = tuple[Any, int, int]


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("qkernels._C"), ""
    except ImportError as error:
        why = f"the compiled module qkernels._C is not there ({error}); {HOW_TO_BUILD}"
        warnings.warn(f"qkernels: {why}. The slow reference rows run instead.", stacklevel=2)
        return None, why


C, missing = _load()

if os.environ.get("QKERNELS_SIMD", "") not in ("", "avx512", "avx2", "base"):
    raise ValueError(
        "QKERNELS_SIMD must be one of avx512, avx2, base, got " + repr(os.environ["QKERNELS_SIMD"])
    )


def available(device: str) -> str | None:
    """Why the native rows cannot run on a device type, or None."""
    if C is None:
        return missing
    if device == "cuda" and not C.build_info()["cuda"]:
        return (
            "qkernels._C was built without CUDA; install the CUDA toolkit (nvcc) and "
            "rebuild with `QKERNELS_CUDA=ON pip install .`"
        )
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def target(x: Tensor) -> Target:
    """Where to run a kernel over x: torch's thread count on the CPU, the current stream on CUDA."""
    if x.is_cuda:
        index = x.device.index
        return C, index, torch.cuda.current_stream(index).cuda_stream
    return C, -1, torch.get_num_threads()


def pointer(x: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def build_info() -> dict[str, Any]:
    """What was built and what can run here.

    Returns:
        A dict: versions of qkernels, torch, triton and Python; "native" (compiler, OpenMP, SIMD
        level in use, CUDA toolkit and architectures, or why _C is missing); "cuda_device"; and
        "rows", for each op and device the rows that can run and, for the others, why not.
    """
    from qkernels._registry import unavailable

    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    table: dict[str, dict[str, str]] = {}
    for row in ROWS:
        why = unavailable(row)
        table.setdefault(f"{row.op} on {row.device}", {})[row.backend] = why or "can run"
    has_gpu = torch.cuda.is_available()
    return {
        "qkernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton,
        "native": dict(C.build_info()) if C is not None else missing,
        "cuda_device": torch.cuda.get_device_name() if has_gpu else "none",
        "threads": torch.get_num_threads(),
        "rows": table,
    }
