"""csrc/cuda compiles for the default architectures, and the code that comes out is what its speed
rests on: no spills, few registers, 16-byte accesses, several loads in flight, small parameters."""

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

# 64 Ki registers of a multiprocessor, threads of a block -> blocks that fit at least
BLOCKS = {
    "dynamic_kernel": (1024, 1),
    "mse_kernel": (640, 1),
    "percentile_kernel": (512, 2),
    "count_kernel": (512, 2),
}
MORE_BLOCKS = {"fake_quant_kernel": 3, "fake_quant_bwd_kernel": 6, "codes_kernel": 4}


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


def blocks_of(name: str) -> tuple[int, int]:
    """Threads of a kernel's block, and how many blocks a multiprocessor must hold."""
    for part, bound in BLOCKS.items():
        if part in name:
            return bound
    return 256, max((n for part, n in MORE_BLOCKS.items() if part in name), default=2)


@source_of
def test_registers(compiled: dict[Path, Future[Done]], source: Path) -> None:
    """Enough warps fit at once to hide the latency of memory."""
    report = compiled[source].result().stderr
    used = re.findall(r"Function properties for (\S+)\n.*\n.*Used (\d+) registers", report)
    assert used or source.stem == "device", "no kernel in ptxas's report"
    for name, registers in used:
        threads, blocks = blocks_of(name)
        whole = (int(registers) + 7) // 8 * 8  # they are given out by the eight
        assert whole * threads * blocks <= 64 * 1024, f"{name}: {registers} registers"


@pytest.fixture(scope="module")
def ptx(
    tmp_path_factory: pytest.TempPathFactory, known_archs: list[str]
) -> dict[str, Future[dict[str, str]]]:
    """Of each file, the mangled name of each kernel and its PTX from the parameters on."""
    folder = tmp_path_factory.mktemp("ptx")

    def bodies(source: Path) -> dict[str, str]:
        output = folder / f"{source.stem}.ptx"
        done = nvcc("-ptx", "-arch=compute_80", str(source), "-o", str(output))
        assert done.returncode == 0, done.stderr
        found = re.split(r"\.entry (\w+)\(", output.read_text())
        return dict(zip(found[1::2], found[2::2], strict=True))

    pool = ThreadPoolExecutor(2)
    return {source.stem: pool.submit(bodies, source) for source in SOURCES}


# in mangled names
ROWS, COLUMNS = "11reduce_rows", "14reduce_columns"
LOAD = r"ld\.global\.(v4\.[bfu]32|v2\.[bfu]64)"
STORE = r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)"
HALF_LOAD = r"ld\.global\.(v2\.[bfu]32|v4\.[bfu]16|v4\.[bfu]32)"  # 8 bytes, four halves of a column

# file, kernel, what it reads at a time, how many reads are under way, what it writes at a time
ACCESSES = [
    ("fake_quant", "17fake_quant_kernelILb.ELb.ELb1E", LOAD, 4, STORE),  # long rows
    ("fake_quant", "17fake_quant_kernelILb.ELb.ELb0E", LOAD, 1, STORE),
    ("fake_quant", "21fake_quant_bwd_kernel", LOAD, 4, STORE),
    ("fake_quant", "18fake_quant_columns", LOAD, 2, STORE),
    ("fake_quant_dynamic", "14dynamic_kernel", LOAD, 4, STORE),
    ("lsq_bwd", ROWS, LOAD, 8, STORE),
    ("lsq_bwd", COLUMNS, HALF_LOAD, 4, None),
    ("quant_range", ROWS, LOAD, 4, None),
    ("quant_range", COLUMNS, HALF_LOAD, 2, None),
    ("error_stats", ROWS, LOAD, 4, None),
    ("error_stats", COLUMNS, HALF_LOAD, 2, None),
    ("noise", "12noise_kernel", LOAD, 1, STORE),
    ("quantize", "8Quantize", LOAD, 5, None),
    ("quantize", "10Dequantize", None, 0, STORE),
    ("percentile", "17percentile_kernel", LOAD, 2, None),
    ("percentile", "12count_kernel", LOAD, 2, None),
]


@pytest.mark.parametrize(
    ("stem", "kernel", "load", "in_flight", "store"),
    ACCESSES,
    ids=[f"{stem}-{kernel.lstrip('0123456789')}" for stem, kernel, *_ in ACCESSES],
)
def test_vector_accesses(
    ptx: dict[str, Future[dict[str, str]]],
    stem: str,
    kernel: str,
    load: str | None,
    in_flight: int,
    store: str | None,
) -> None:
    """Every dtype reads whole packets, so many before it uses the first, and writes them."""
    # the last template argument of a reduction is its vector width; 1 is the unaligned path
    found = {
        name: body
        for name, body in ptx[stem].result().items()
        if re.search(kernel, name) and not re.search(r"Li1EEEv", name)
    }
    assert len(found) >= 3, f"{kernel}: only {sorted(ptx[stem].result())}"
    for name, body in found.items():
        if load:
            assert len(re.findall(load, body)) >= in_flight, f"{name}: loads"
        if store:
            assert re.search(store, body), f"{name}: no store"


@source_of
def test_instructions(ptx: dict[str, Future[dict[str, str]]], source: Path) -> None:
    """No atomic addition of floats; pairs of halves converted at once; indices without division."""
    bodies = ptx[source.stem].result()
    assert bodies or source.stem == "device"
    for name, body in bodies.items():
        assert not re.search(r"\b(atom|red)\.\S*\.(f16|bf16|f32|f64)", body), f"{name}: atomics"
        if re.search("fake_quant_kernel|noise_kernel|codes_kernel|fake_quant_bwd|strided", name):
            assert not re.search(r"\b(div|rem)\.[su]64", body), f"{name}: 64-bit division"
        if re.search("fake_quant_kernel|noise_kernel|dynamic_kernel", name):
            for half, pair in (("4HalfE", "f16x2"), ("8BFloat16E", "bf16x2")):
                assert half not in name or f"cvt.rn.{pair}.f32" in body, f"{name}: conversions"


@source_of
def test_parameters(ptx: dict[str, Future[dict[str, str]]], source: Path) -> None:
    """A single call is launched with its own arguments alone, a list with 4 KB at most."""
    single = 0
    for name, body in ptx[source.stem].result().items():
        sizes = re.findall(r"\.param \.align \d+ \.b8 \w+\[(\d+)\]", body)
        assert sizes, f"{name}: no parameter"
        assert all(int(size) <= 4096 for size in sizes), f"{name}: {sizes}"
        if "ILb1E" in name:  # the first template argument
            single += 1
            assert all(int(size) <= 256 for size in sizes), f"{name}: {sizes}"
    lists = {"device", "mse", "percentile", "quantize"}
    assert single >= 3 or source.stem in lists, "no kernel for single calls"


def test_build_names_every_file() -> None:
    """CMakeLists.txt lists sources by name, so a new one can be forgotten."""
    listed = set(re.findall(r"csrc/cuda/\w+\.cu", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {str(source.relative_to(ROOT)) for source in SOURCES}
