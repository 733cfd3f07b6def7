"""Builds csrc/cuda for the CPU: the module _C_shim runs the CUDA kernels on host memory, for tests.

`load()` compiles with the host compiler against tests/shim/cuda_runtime.h; objects are kept in
build/shim under a name that holds the hash of all that went into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

SHIM = Path(__file__).resolve().parent
ROOT = SHIM.parents[1]
CACHE = ROOT / "build" / "shim"
CXX = os.environ.get("CXX", "g++")

COMMON = ["-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON += [f"-I{ROOT / 'csrc'}", "-ffp-contract=off", "-DQK_WITH_CUDA"]
# misaligned vector accesses, indices out of an array and too wide shifts stop the launch (shim.cpp)
DEVICE = ["-O2", f"-I{SHIM}", "-x", "c++", "-fsanitize=alignment,bounds-strict,shift"]
BINDING = ["-O1", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
BINDING += ["-DQK_MODULE=_C_shim", '-DQK_COMPILER="shim"', '-DQK_CUDA_VERSION="shim"']


def sources() -> list[tuple[Path, list[str]]]:
    """(file, flags) of all that is compiled."""
    csrc = ROOT / "csrc"
    kernels = [(path, COMMON + DEVICE) for path in sorted(csrc.glob("cuda/*.cu"))]
    host = [(path, [*COMMON, "-O1"]) for path in sorted(csrc.glob("cpu/*.cpp"))]
    shim = [
        (SHIM / "shim.cpp", [*COMMON, "-O2", f"-I{SHIM}"]),
        (SHIM / "selfcheck.cu", COMMON + DEVICE),
    ]
    return [(csrc / "bindings.cpp", COMMON + BINDING), *kernels, *shim, *host]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _run(command: list[str], output: Path) -> None:
    """Run a compiler that writes to a temporary name, then put the result in place."""
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run(
        [*command, "-o", str(partial)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"shim: {' '.join(command)}\n{done.stderr}")
    partial.replace(output)


def _compile(path: Path, flags: list[str], headers: bytes) -> Path:
    key = _digest(CXX.encode(), " ".join(flags).encode(), headers, path.read_bytes())
    output = CACHE / f"{path.stem}-{key}.o"
    if not output.exists():
        _run([CXX, "-c", *flags, str(path)], output)
    return output


@cache
def load() -> ModuleType:
    """The module _C_shim, built if anything changed.

    Raises:
        RuntimeError: a file does not compile; the text is the compiler's.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    found = [*sorted((ROOT / "csrc").rglob("*.h")), SHIM / "cuda_runtime.h"]
    headers = _digest(*(path.read_bytes() for path in found)).encode()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(*source, headers), sources()))
    folder = CACHE / _digest(*(path.name.encode() for path in objects))
    folder.mkdir(exist_ok=True)
    module = folder / "_C_shim.so"
    if not module.exists():
        _run([CXX, "-shared", *map(str, objects)], module)
    spec = importlib.util.spec_from_file_location("_C_shim", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def library() -> ctypes.CDLL:
    """The C functions of shim.cpp and selfcheck.cu in the same file, for the tests of the shim."""
    loaded = ctypes.CDLL(load().__file__)
    loaded.shim_error_text.restype = ctypes.c_char_p
    loaded.shim_last_stream.restype = ctypes.c_void_p
    loaded.shim_launches.restype = ctypes.c_int64
    loaded.shim_fast_quotient.restype = ctypes.c_int64
    return loaded


if __name__ == "__main__":
    sys.stdout.write(f"{load().__file__}\n")
