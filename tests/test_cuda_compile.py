"""csrc/cuda compiles for the default architectures, without spills and with 16-byte accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
ARCHS = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}"]

source_of = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
Done = subprocess.CompletedProcess[str]


def nvcc(*arguments: str) -> Done:
    return subprocess.run(
        [str(NVCC), *FLAGS, *arguments], check=False, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def known_archs() -> list[str]:
    """Of ARCHS, those that this compiler knows."""
    if NVCC is None:
        pytest.skip("no CUDA compiler (nvcc) here")
    listed = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True)
    return [arch for arch in ARCHS if f"sm_{arch}" in listed.stdout.split()]


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, known_archs: list[str]
) -> dict[Path, Future[Done]]:
    """Each file for all architectures, two at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known_archs]
    pool = ThreadPoolExecutor(2)
    return {
        source: pool.submit(
            nvcc, "-c", *codes, "-Xptxas=-v", str(source), "-o", str(folder / f"{source.stem}.o")
        )
        for source in SOURCES
    }


@source_of
def test_compiles(compiled: dict[Path, Future[Done]], source: Path) -> None:
    done = compiled[source].result()
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("arch", ARCHS)
def test_architecture_is_known(known_archs: list[str], arch: str) -> None:
    if arch not in known_archs:
        pytest.skip(f"this nvcc does not know sm_{arch}")


@source_of
def test_no_local_memory(compiled: dict[Path, Future[Done]], source: Path) -> None:
    """No kernel spills registers or has a stack: both would go through local memory."""
    report = compiled[source].result().stderr
    used = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores",
        report,
    )
    assert used or source.stem == "device", "no kernel in ptxas's report"
    assert [entry for entry in used if entry[1:] != ("0", "0")] == []


def entries(ptx: str) -> dict[str, str]:
    """Mangled name of each kernel -> its body."""
    found = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize(
    ("stem", "kernels"),
    [
        ("fake_quant", ["fake_quant_kernel", "fake_quant_bwd_kernel"]),
        ("fake_quant_dynamic", ["dynamic_kernel"]),
        ("lsq_bwd", ["reduce_rows"]),
        ("quant_range", ["reduce_rows"]),
    ],
)
@pytest.mark.usefixtures("known_archs")
def test_vector_accesses(tmp_path: Path, stem: str, kernels: list[str]) -> None:
    """Every dtype reads 16 bytes at a time and, where it writes elements, writes so too."""
    output = tmp_path / f"{stem}.ptx"
    source = ROOT / "csrc" / "cuda" / f"{stem}.cu"
    done = nvcc("-ptx", "-arch=compute_80", str(source), "-o", str(output))
    assert done.returncode == 0, done.stderr
    bodies = entries(output.read_text())
    for kernel in kernels:
        # the last template argument of a reduction is its vector width; 1 is the unaligned path
        found = {
            name: body
            for name, body in bodies.items()
            if f"{len(kernel)}{kernel}" in name and "ELi1EEE" not in name
        }
        assert len(found) >= 3, f"{kernel}: only {sorted(bodies)}"
        for name, body in found.items():
            # two doubles are 16 bytes too
            assert re.search(r"ld\.global\.(v4\.[bfu]32|v2\.[bfu]64)", body), f"{name}: no load"
            if stem != "quant_range":
                assert re.search(r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)", body), (
                    f"{name}: no store"
                )


def test_build_names_every_file() -> None:
    """CMakeLists.txt lists sources by name, so a new one can be forgotten."""
    listed = set(re.findall(r"csrc/cuda/\w+\.cu", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {str(source.relative_to(ROOT)) for source in SOURCES}
