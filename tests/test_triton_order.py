"""A list's sums are added in the order of single calls, on a GPU too.

Which thread holds which element of a tile, and so what is added first, follows from what the
compiler knows of addresses and sizes. Both forms of the reducing kernels are compiled, without a
GPU, and the layouts that their reductions start from are compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_triton_aot as aot
import torch

TARGET = "sm_90"
# blocks of one and of several channels, in one part and in several, of even and odd sizes
SHAPES = (
    ((64, 147), 0, False),
    ((3000,), None, False),
    ((7, 8200), 0, False),
    ((4, 64, 3, 3), 1, False),
    ((4, 64, 3, 3), 1, True),
)
OPS = ("error_stats", "lsq_bwd")


def calls() -> list[tuple[str, tuple[Any, ...]]]:
    """(op, arguments of a row)."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    for shape, axis, channels_last in SHAPES:
        x = torch.zeros(shape)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        scale = torch.ones(() if axis is None else shape[axis])
        rest = (scale, None, -8, 7, axis, None, "code")
        found += [("error_stats", (x, *rest)), ("lsq_bwd", (x.clone(), x, *rest, 0.5))]
    return found


def orders(launched: tuple[Any, ...]) -> list[str]:
    """What each reduction of a kernel reduces, with the layout in full."""
    text = aot.compiled_for(TARGET, launched).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r"\}\) (?:\{[^}]*\} )?: \((tensor<.*?>)\) ->", text)
    return [re.sub(r"#\w+", lambda name: layouts[name[0]], operand) for operand in found]


def compare() -> list[dict[str, Any]]:
    """Every launch of a call beside that of a list."""
    from qkernels._registry import resolve
    from qkernels._table import ROWS

    launches = aot.recorded()
    rows = {row.op: row for row in ROWS if row.backend == "triton"}
    pairs = []
    for op, args in calls():
        what = f"{op} {tuple(args[0].shape)}"
        resolve(rows[op].target)(*args)
        singles = launches[:]
        launches.clear()
        resolve(rows[op].foreach)(aot.twice(args))
        names = [[launched[0].__name__ for launched in form] for form in (singles, launches)]
        for single, listed in zip(singles, launches, strict=True):
            found = {"single": orders(single), "list": orders(listed)}
            pairs.append({"what": f"{what} {names}", **found})
        launches.clear()
    return pairs


def test_sums_of_a_list_are_in_the_order_of_single_calls(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: nothing to compile")
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    report = tmp_path / "report.json"
    command = [sys.executable, __file__, str(report)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
    pairs = json.loads(report.read_text())
    assert len(pairs) > len(OPS) * len(SHAPES), "second stages too"
    for pair in pairs:
        assert pair["single"], f"{pair['what']}: no reduction was found"
        assert pair["list"] == pair["single"], pair["what"]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compare()))
