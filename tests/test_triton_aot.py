"""Every Triton kernel compiles ahead of time for the GPUs we promise, without a GPU.

One subprocess per target, because TRITON_INTERPRET is read when a kernel is declared and the parity
tests set it. The subprocess calls the rows on CPU tensors with the launch of a kernel replaced by a
recorder, so that what is compiled are the very signatures, constants and options of the launches.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NOISE = ("differential_noise", "drop_in_noise", "uniform_noise")
# ops that are compiled for fp64 too
WITH_DOUBLE = {"fake_quant", "fake_quant_bwd", "lsq_bwd", "qparams", "error_stats", *NOISE}
# fused multiply-adds that the compilers themselves put into one division or root on gfx942: one
# version of the root starts from v_sqrt, the other from v_rsq
FMA_IN_DIVISION = 5
FMA_IN_ROOT = {"v_sqrt_f32": 2, "v_rsq_f32": 5}
# one register saved around the call of a division's slow path, on NVIDIA
SAVED_BYTES = 8
# elements of a tensor that a thread (reads, writes) for a full tile, all in accesses of 16 bytes
ACCESSES = {
    "fake_quant_kernel": (16, 16),
    "fake_quant_bwd_kernel": (16, 16),
    "fake_quant_dynamic_kernel": (16, 16),
    "lsq_bwd_kernel": (16, 8),  # eight of x and eight of its gradient
    "minmax_kernel": (16, 0),
    "mse_kernel": (16, 0),
    "percentile_held_kernel": (32, 0),
    "digits_kernel": (16, 0),
    "above_kernel": (16, 0),
    "error_stats_kernel": (8, 0),
    "noise_kernel": (8, 8),
    "quantize_kernel": (16, 0),  # codes are bytes
    "dequantize_kernel": (0, 16),
}
ITEM_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
# from here on an argument fills tiles
LARGE = 8192


def noise_arguments(op: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Calls of a noise op: row-major or not, by eights of a channel or not, seeds in memory."""
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    x, odd = torch.zeros(4, 2048, dtype=dtype), torch.zeros(4, 3, 149, dtype=dtype)
    nhwc = torch.zeros(2, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    at = (torch.zeros((), dtype=torch.int64),) * 2
    calls = []
    for v, channels, counter, rest in (
        (x, 4, (2**40, 3, None, None), (0, 0, None)),
        (odd, 3, (0, 0, *at), (6, 1, None)),
        (nhwc, 16, (0, 0, *at), (0, 1, None)),
    ):
        p = torch.ones(channels, dtype=compute)
        if op == "differential_noise":
            previous = (None, None) if v is odd else (p, p)
            calls.append((v, p, p, *previous, *counter, 0.5, *rest))
        elif op == "drop_in_noise":
            calls.append((v, p, p, 1.0 if v is odd else 0.5, *counter, 0.5, *rest))
        else:
            calls.append((v, p, 1.0 if v is odd else 0.5, *counter, *rest))
    return calls


def arguments(op: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Calls of one op that together launch each of its kernels."""
    if op in NOISE:
        return noise_arguments(op, dtype)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.zeros(4, 2048, dtype=dtype)
    image = torch.zeros(2, 16, 4, 4, dtype=dtype)
    nhwc = image.contiguous(memory_format=torch.channels_last)
    scale, zero = torch.ones(16, dtype=compute), torch.zeros(16, dtype=torch.int32)
    s4, z4 = scale[:4], zero[:4]
    bits = torch.zeros(x.numel() // 8, dtype=torch.uint8)
    packed = torch.zeros(4, 1024, dtype=torch.uint8)
    ranges = [("minmax", x), ("lsq", x), ("mse", x), ("percentile", x)]
    ranges.append(("percentile", torch.zeros(1, 9008, dtype=dtype)))
    ema = torch.zeros(5, 16, dtype=compute)
    straddling = torch.zeros(16, 147, dtype=dtype)  # eight elements of two channels
    longest = torch.zeros(1, 16384, dtype=dtype)  # the longest channel that is read once
    return {
        "fake_quant": [
            (x, s4, z4, 0, 15, 0, None, "code", True),
            (image, scale, None, -8, 7, 1, None, "value", True),
            (nhwc, scale, scale, -8, 7, 1, None, "code", True),
            (straddling, scale, None, -8, 7, 0, None, "code", True),
        ],
        "fake_quant_bwd": [(x, bits, [])],
        "lsq_bwd": [
            (x, x, s4, None, -8, 7, 0, None, "code", 0.5),
            (nhwc, nhwc, scale, scale, 0, 15, 1, None, "value", 0.5),
            (image, image, scale, zero, 0, 15, 1, None, "value", 0.5),
        ],
        "quant_range": [(v, 0, 15, None, v.shape[1], False, m, 99.0) for m, v in ranges],
        "qparams": [
            (torch.zeros(2, 4, dtype=compute), 0, 15, False),
            (torch.zeros(2, 4, dtype=compute), 0, 15, False, torch.zeros(2, 4, dtype=compute), 0.1),
        ],
        "fake_quant_dynamic": [
            (v, 0, 15, 0, None, False, "minmax", 99.0, "code", True) for v in (x, longest)
        ],
        "error_stats": [
            (x, s4, z4, 0, 15, 0, None, "code", ema[:, :4].contiguous(), 0.9),
            (image, scale, scale, 0, 15, 1, None, "value"),
            (nhwc, scale, None, -8, 7, 1, None, "code", ema, 0.9),
        ],
        "error_stats_dynamic": [(x, 0, 15, 0, None, False, "minmax", 99.0, "code")],
        "quantize": [(x, s4, z4, 0, 15, 0, None, pack) for pack in (0, 4)],
        "dequantize": [
            (x.to(torch.uint8), s4, z4, 0, 0, None, 0, 0, dtype),
            (packed, s4, z4, -8, 0, None, 4, 2048, dtype),
        ],
    }[op]


def kernels() -> set[str]:
    """Names of all kernels in the package."""
    import triton

    import qkernels.backends.triton as package

    found = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                found.add(name)
    return found


def specialize(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """(signature, constants, attributes) as Triton's own launcher makes them."""
    types = {
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.uint8: "*u8",
        torch.int8: "*i8",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature, fixed, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = args[i] if i < len(args) else constants[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[param.name] = "constexpr"
            fixed[(i,)] = value
            continue
        pointer = isinstance(value, torch.Tensor)
        if pointer:
            signature[param.name] = types[value.dtype]
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if (value.data_ptr() if pointer else value) % 16 == 0 and special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, fixed, attributes


def recorded() -> list[tuple[Any, ...]]:
    """(kernel, signature, constants, attributes, options) of every launch from here on."""
    import triton

    launches: list[tuple[Any, ...]] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **rest: Any) -> None:
        options = {k: v for k, v in rest.items() if k not in kernel.arg_names}
        launches.append((kernel, *specialize(kernel, args, rest), options))

    triton.JITFunction.run = note
    return launches


def twice(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A list of two such calls, each with memory of its own."""
    return [args, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)]


def record() -> dict[str, tuple[Any, ...]]:
    """Key -> (kernel, signature, constants, attributes, options, whether tiles are full) of every
    distinct launch."""
    from qkernels._registry import resolve
    from qkernels._table import ROWS
    from qkernels.backends.triton import launch

    distinct: dict[str, tuple[Any, ...]] = {}
    launches = recorded()

    def call(target: str, large: bool, *args: Any) -> None:
        resolve(target)(*args)
        for found in launches:
            distinct.setdefault(f"{found[0].__name__} {found[1:]}", (*found, large))
        launches.clear()

    rows = {row.op: row for row in ROWS if row.backend == "triton"}
    for op, row in rows.items():
        double = [torch.float64] if op in WITH_DOUBLE else []
        for dtype in (torch.float32, torch.bfloat16, *double):
            for i, args in enumerate(arguments(op, dtype)):
                large = args[0].numel() >= LARGE
                call(row.target, large, *args)
                # those of one dtype tell about all forms of a kernel, their first about the others
                if row.foreach and (i == 0 or dtype is torch.float32):
                    call(row.foreach, large, twice(args))
    launch.WIDE_FROM = 0  # 64-bit offsets
    for op in ("fake_quant", "lsq_bwd", "error_stats", *NOISE):
        call(rows[op].target, False, *arguments(op, torch.float32)[0])
    return distinct


def fused(asm: dict[str, Any]) -> int:
    """Fused multiply-adds that come of a multiply and an add in the source."""
    if "ptx" in asm:  # a division is one instruction here
        return len(re.findall(r"\bfma\.rn\.", asm["ptx"]))
    code = asm["amdgcn"]
    found = len(re.findall(r"\bv_(?:pk_)?fma\w*_f32", code))
    found -= FMA_IN_DIVISION * len(re.findall(r"\bv_div_fixup_f32", code))
    return found - sum(n * len(re.findall(rf"\b{root}", code)) for root, n in FMA_IN_ROOT.items())


def spills(compiled: Any, folder: Path) -> int | None:
    """Bytes (NVIDIA) or registers (AMD) kept in local memory, None if no tool here can tell."""
    import triton

    if "amdgcn" in compiled.asm:
        return sum(int(n) for n in re.findall(r"gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [str(tool), "-res-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


def wide_bytes(asm: dict[str, Any], access: str) -> int:
    """Bytes that a thread loads (`ld`) or stores (`st`) by 16 or more at a time."""
    found = re.findall(rf"\b{access}\.global\.(?:\w+\.)*v(\d)\.b(\d+)", asm.get("ptx", ""))
    sizes = [int(n) * int(bits) // 8 for n, bits in found]
    return sum(size for size in sizes if size >= 16)


def compiled_for(target: str, launched: tuple[Any, ...]) -> Any:
    """The compiled kernel of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes, options = launched[:5]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def compile_all(target: str, folder: Path) -> dict[str, Any]:
    """Compile every launch for a target; what a report holds is what the tests below look at."""
    compiled = []
    for launched in record().values():
        kernel, signature, constants, _, _, large = launched
        result = compiled_for(target, launched)
        named = {kernel.arg_names[i]: value for (i,), value in constants.items()}
        types = [t.removeprefix("*") for t in signature.values() if "*" in t]
        compiled.append(
            {
                "kernel": kernel.__name__,
                "types": [str(named["DTYPE"]), *types] if "DTYPE" in named else types,
                "fused": fused(result.asm),
                "spilled": spills(result, folder),
                "wide": bool(named.get("WIDE")),
                "large": large,
                "loaded": wide_bytes(result.asm, "ld"),
                "stored": wide_bytes(result.asm, "st"),
            }
        )
    return {"kernels": sorted(kernels()), "compiled": compiled}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Target -> the report of its subprocess."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: nothing to compile")

    def run(target: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(target)
        env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder / "cache"))
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        report = folder / "report.json"
        command = [sys.executable, __file__, target, str(report)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{target}: {done.stdout[-2000:]}{done.stderr[-6000:]}"
        return json.loads(report.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(run, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(reports: dict[str, dict[str, Any]], target: str) -> None:
    report = reports[target]
    assert {c["kernel"] for c in report["compiled"]} == set(report["kernels"])
    assert len(report["kernels"]) >= 8


@pytest.mark.parametrize("target", TARGETS)
def test_no_multiply_is_fused_with_an_add(reports: dict[str, dict[str, Any]], target: str) -> None:
    # gfx942 divides 64-bit integers in floating point, with fused operations of its own
    known = [c for c in reports[target]["compiled"] if target.startswith("sm") or not c["wide"]]
    assert not [c for c in known if c["fused"]]


@pytest.mark.parametrize("target", TARGETS)
def test_no_register_spills(reports: dict[str, dict[str, Any]], target: str) -> None:
    known = [c for c in reports[target]["compiled"] if c["spilled"] is not None]
    if not known:
        pytest.skip("triton came without cuobjdump: spills are not known")
    allowed = SAVED_BYTES if target.startswith("sm") else 0
    assert not [c for c in known if c["spilled"] > allowed]


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_full_tiles_are_accessed_by_16_bytes(
    reports: dict[str, dict[str, Any]], target: str
) -> None:
    seen, narrow = set(), []
    for c in reports[target]["compiled"]:
        name = c["kernel"].replace("_list_kernel", "_kernel")
        if name not in ACCESSES or not c["large"]:
            continue
        types = [t for t in c["types"] if t in ITEM_BYTES]
        wanted = [n * ITEM_BYTES[types[0]] for n in ACCESSES[name]]
        if c["loaded"] < wanted[0] or c["stored"] < wanted[1]:
            narrow.append((c, wanted))
        seen.add(c["kernel"])
    assert not narrow
    lists = {k for k in reports[target]["kernels"] if k.endswith("_list_kernel")}
    assert seen >= set(ACCESSES) | {k for k in lists if "finish" not in k}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compile_all(sys.argv[1], Path(sys.argv[2]).parent)))
