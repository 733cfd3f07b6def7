"""csrc/cpu gives the same bits with every instruction set, arm64's (under qemu) among them.

tests/arm64/kernels.cpp runs every kernel and prints a hash of all that each case wrote. It needs no
torch, so that a cross compiler and user-mode qemu are enough.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "arm64"
PROGRAM = ROOT / "tests" / "arm64" / "kernels.cpp"
CXX = os.environ.get("CXX", "g++")
ARM64_CXX = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
X86 = platform.machine() in ("x86_64", "AMD64")

needs_compiler = pytest.mark.skipif(not shutil.which(CXX), reason=f"no compiler {CXX} here")
needs_arm64_compiler = pytest.mark.skipif(
    not shutil.which(ARM64_CXX), reason=f"no cross compiler {ARM64_CXX} here"
)
needs_qemu = pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU} here")


def words(pattern: str) -> list[list[str]]:
    """What the groups of a pattern hold in CMakeLists.txt, split at blanks; at least one."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = [match.split() for match in re.findall(pattern, text)]
    assert found, f"CMakeLists.txt has nothing like {pattern}"
    return found


def compilations(x86: bool) -> list[tuple[str, list[str]]]:
    """(source, flags) of the program; all but the level of optimization is CMakeLists.txt's."""
    (numeric,) = words(r"set\(QK_NUMERIC_FLAGS ([^)]*)\)")
    (kernels,) = words(r"set\(QK_CPU_SOURCES([^)]*)\)")
    (module,) = words(r"pybind11_add_module\(_C ([^)]*)\)")
    # -O3 makes much the same vector instructions, in twice the time
    common = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-std=c++17"]
    common += ["-fopenmp", f"-I{ROOT / 'csrc'}"]
    plain = [*common, "-DQK_X86"] if x86 else common
    once = [source for source in module if source.startswith("csrc/cpu/")]
    jobs = [(source, plain) for source in once]
    jobs += [(str(PROGRAM.relative_to(ROOT)), [*common, *numeric])]
    for name, *flags in words(r"\n *qk_add_isa\(([^)]*)\)"):
        if x86 or name == "base":
            isa = [*common, *numeric, *flags, f"-DQK_ISA={name}"]
            jobs += [(source, isa) for source in kernels]
    return jobs


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout + done.stderr


@cache
def built(compiler: str, x86: bool) -> tuple[Path, str]:
    """The program and what the compiler had to say; kept until anything it is made of changes."""
    jobs = compilations(x86)
    made_of = [PROGRAM, *sorted((ROOT / "csrc").rglob("*.h")), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    key = hashlib.sha256(repr((run([compiler, "--version"]), jobs)).encode())
    for path in made_of:
        key.update(hashlib.sha256(path.read_bytes()).digest())
    program = CACHE / f"{Path(compiler).name}-{key.hexdigest()[:16]}"
    said = program.with_suffix(".txt")
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            said.write_text(build(compiler, x86, jobs, Path(folder)))
            (Path(folder) / "program").replace(program)
    return program, said.read_text()


def build(compiler: str, x86: bool, jobs: list[tuple[str, list[str]]], folder: Path) -> str:
    """Make folder/program, two compilers at a time; returns what they said."""
    # GCC 12 takes the undefined vectors of its own AVX-512 header for mistakes
    warnings = [] if x86 else ["-Wall", "-Wextra"]
    objects = [str(folder / f"{i}.o") for i in range(len(jobs))]

    def compiled(i: int) -> str:
        source, flags = jobs[i]
        return run([compiler, *flags, *warnings, "-c", source, "-o", objects[i]])

    with ThreadPoolExecutor(2) as pool:
        said = "".join(pool.map(compiled, range(len(jobs))))
    # under qemu, a static program needs no libraries of another system
    static = ["-static"] if compiler == ARM64_CXX else []
    run([compiler, *static, "-fopenmp", *objects, "-o", str(folder / "program")])
    return said


def lines(output: str) -> tuple[str, dict[str, str]]:
    """The instruction set that ran, and the hash of each case."""
    first, *rest = output.splitlines()
    cases = [line.rsplit(": ", 1) for line in rest]
    assert first.startswith("simd ") and all(len(case) == 2 for case in cases), output[:1000]
    assert len({name for name, _ in cases}) == len(cases) > 1000
    return first.removeprefix("simd "), {name: digest for name, digest in cases}


@cache
def native(simd: str = "") -> tuple[str, dict[str, str]]:
    """With the widest instruction set of this machine, or the one asked for."""
    program, _ = built(CXX, X86)
    return lines(run([str(program), "1"], QKERNELS_SIMD=simd))


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@needs_compiler
def test_program_runs_every_kernel() -> None:
    declared = (ROOT / "csrc" / "cpu" / "kernels.h").read_text()
    kernels = set(re.findall(r"\(\*(\w+)\)\(", declared))
    _, cases = native()
    assert kernels and kernels == {name.split()[0] for name in cases}


@needs_compiler
@pytest.mark.parametrize("simd", ["avx2", "base"])
def test_narrower_instruction_sets_give_the_same_bits(simd: str) -> None:
    widest, wide = native()
    name, narrow = native(simd)
    if name == widest:
        pytest.skip(f"this machine has {widest} and nothing narrower called {simd}")
    assert name == simd
    assert differing(wide, narrow) == []


@needs_arm64_compiler
def test_arm64_compiles_without_warnings() -> None:
    _, said = built(ARM64_CXX, False)
    assert said == ""


@needs_compiler
@needs_arm64_compiler
@needs_qemu
def test_arm64_gives_the_same_bits() -> None:
    program, _ = built(ARM64_CXX, False)
    name, arm = lines(run([QEMU, str(program), "2"]))
    assert name == "neon"
    assert differing(native()[1], arm) == []
