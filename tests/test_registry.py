"""The table, the choice of rows, and what users see of it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import _native, _registry
from qkernels._table import ROWS, STEMS


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),  # not here, where qkernels/ would hide an installed one
        check=False,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.op}-{r.device}-{r.backend}")
def test_every_row_resolves(row: _registry.Row) -> None:
    assert callable(_registry.resolve(row.target))
    for target in (row.available, row.refuses, row.foreach):
        assert target is None or callable(_registry.resolve(target))


def test_every_op_has_a_reference_that_comes_last_of_the_automatic_choice() -> None:
    for op in STEMS:
        for device in ("cpu", "cuda"):
            order = [r.backend for r in _registry.rows(op, device)]
            assert "reference" in order
            rest = order[order.index("reference") + 1 :]
            assert rest == (["triton"] if device == "cpu" else []), (op, device)
        assert hasattr(torch.ops.qkernels, op)


def test_readme_lists_the_ops_of_the_table() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| .*reference \|$", readme, flags=re.MULTILINE)
    assert sorted(listed) == sorted(STEMS)


def test_import_is_light() -> None:
    loaded = "; print([m for m in ('triton', 'qtrain', 'matplotlib') if m in sys.modules])"
    # torch itself may import triton; what counts is that qkernels adds nothing
    base = python("import sys, torch" + loaded)
    assert python("import sys, qkernels" + loaded).stdout == base.stdout != ""


def test_use_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = _registry.resolve("qkernels.backends.reference.fake_quant:fake_quant")
    spy = lambda *a: calls.append(1) or real(*a)  # noqa: E731
    monkeypatch.setitem(
        _registry._imported, "qkernels.backends.reference.fake_quant:fake_quant", spy
    )
    monkeypatch.setattr(_registry, "_candidates", {})
    monkeypatch.setattr(_registry, "_always", {})
    x = torch.randn(4)
    qkernels.fake_quant(x, 0.1, bits=4)
    assert not calls
    with qkernels.use_backend("reference"):
        qkernels.fake_quant(x, 0.1, bits=4)
        with qkernels.use_backend("auto"):
            qkernels.fake_quant(x, 0.1, bits=4)
    assert len(calls) == 1
    qkernels.fake_quant(x, 0.1, bits=4, backend="reference")
    assert len(calls) == 2
    qkernels.fake_quant(x, 0.1, bits=4)
    assert len(calls) == 2


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(KeyError), qkernels.use_backend("reference"):
        raise KeyError
    assert _registry._backend == ""


@pytest.mark.parametrize("name", ("cuda", "Native", "none"))
def test_unknown_backend(name: str) -> None:
    message = f"use_backend: name must be one of auto.*got '{name}'"
    with pytest.raises(ValueError, match=message), qkernels.use_backend(name):
        pass
    with pytest.raises(ValueError, match=f"fake_quant: backend must be one of.*got '{name}'"):
        qkernels.fake_quant(torch.ones(3), 0.1, bits=4, backend=name)


def test_environment_variable() -> None:
    code = "import qkernels; print(qkernels.explain('fake_quant').splitlines()[0])"
    assert "backend=reference" in python(code, QKERNELS_BACKEND="reference").stdout
    failed = python(code, QKERNELS_BACKEND="fast")
    assert failed.returncode != 0
    assert "QKERNELS_BACKEND must be one of auto, native, triton, reference" in failed.stderr


def test_explain() -> None:
    text = qkernels.explain("fake_quant", torch.ones(3))
    assert text.splitlines()[1:3] == ["-> native", "   reference: not needed"]
    assert "-> reference" in qkernels.explain("fake_quant", torch.ones(3), backend="reference")
    with pytest.raises(ValueError, match=r"explain: op must be one of fake_quant, .* got 'conv'"):
        qkernels.explain("conv")


def test_a_refusing_row_hands_over_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(x: torch.Tensor, *args: object) -> str | None:
        return "it has no time today" if x.numel() == 3 else None

    key = ("fake_quant", "cpu", "")
    chain = _registry.candidates(*key)
    changed = [_registry.Candidate(chain[0].row, refuses), *chain[1:]]
    monkeypatch.setitem(_registry._candidates, key, changed)
    monkeypatch.delitem(_registry._always, key)
    monkeypatch.setattr(_registry, "_logged", set())
    caplog.set_level(logging.INFO, logger="qkernels")
    for _ in range(3):
        y = qkernels.fake_quant(torch.ones(3), 0.5, bits=4)
    assert y.tolist() == [1.0, 1.0, 1.0]
    assert [r.message for r in caplog.records] == [
        "fake_quant: the native row does not run: it has no time today"
    ]


def test_a_backend_asked_for_by_name_raises_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "missing", "the compiled module is not there; pip install .")
    monkeypatch.setattr(_registry, "_candidates", {})
    monkeypatch.setattr(_registry, "_always", {})
    with pytest.raises(ImportError, match=r"fake_quant: no row.*native: the compiled.*pip install"):
        qkernels.fake_quant(torch.ones(3), 0.1, bits=4, backend="native")
    # the automatic choice goes on to the next row
    assert qkernels.fake_quant(torch.ones(3), 0.5, bits=4).tolist() == [1.0, 1.0, 1.0]


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch, qkernels\nqkernels.fake_quant(torch.ones(3), 0.1, bits=4, backend='triton')"
    )
    failed = python(code, TRITON_INTERPRET="0")
    assert "ImportError" in failed.stderr or "NotImplementedError" in failed.stderr
    assert "TRITON_INTERPRET=1" in failed.stderr or "triton is not installed" in failed.stderr


def test_other_devices_are_refused_by_name() -> None:
    error = _registry.refusal("fake_quant", "xpu", "", ())
    assert isinstance(error, NotImplementedError)
    assert "fake_quant: device must be one of cpu, cuda, got xpu" in str(error)


def test_missing_module_is_one_warning() -> None:
    code = (
        "import sys; sys.modules['qkernels._C'] = None\n"
        "import qkernels, torch; print(qkernels.fake_quant(torch.ones(3), 0.5, bits=4).tolist())"
    )
    result = python(code)
    assert result.stdout.strip() == "[1.0, 1.0, 1.0]"
    assert result.stderr.count("qkernels._C is not there") == 1
    assert "pip install ." in result.stderr


def test_build_info() -> None:
    info = qkernels.build_info()
    assert info["qkernels"] == qkernels.__version__ and info["torch"] == torch.__version__
    assert info["native"]["simd"] in ("base", "avx2", "avx512", "neon")
    assert info["rows"]["fake_quant on cpu"]["native"] == "can run"
    printed = subprocess.run(
        [sys.executable, "-m", "qkernels"],
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        check=True,
    )
    assert json.loads(printed.stdout)["native"] == info["native"]


@pytest.mark.parametrize("simd", ("base", "avx2"))
def test_narrower_instruction_sets_give_the_same_bits(simd: str) -> None:
    code = """
import hashlib, torch, qkernels
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    x, g = (torch.randn(24, 1003).mul(3).to(dtype).requires_grad_() for _ in range(2))
    scale = (torch.rand(24) + 0.1).requires_grad_()
    for y in (
        qkernels.fake_quant(x, bits=4, axis=0),
        qkernels.fake_quant(x, scale.to(qkernels.numeric.compute_dtype(dtype)), bits=2, axis=0),
        qkernels.fake_quant(x, bits=8, method="mse"),
        qkernels.fake_quant(x, bits=8, axis=1, method="percentile"),
    ):
        y.backward(g.detach())
        digest.update(y.detach().view(torch.uint8).numpy().tobytes())
    digest.update(x.grad.view(torch.uint8).numpy().tobytes())
digest.update(scale.grad.numpy().tobytes())
print(qkernels.build_info()["native"]["simd"], digest.hexdigest())
"""
    wide, narrow = python(code).stdout.split(), python(code, QKERNELS_SIMD=simd).stdout.split()
    assert narrow[1] == wide[1]
    if wide[0] == "avx512":
        assert narrow[0] == simd


def test_a_default_device_at_the_first_call_is_not_kept():
    done = python("""
import torch, qkernels
x = torch.linspace(-1, 1, 8, requires_grad=True)
with torch.device("meta"):
    qkernels.fake_quant(x, 0.5, bits=2, symmetric=True).square().mean().backward()
x.grad = None
qkernels.fake_quant(x, 0.5, bits=2, symmetric=True).mul(torch.arange(8.0)).mean().backward()
print(x.grad.tolist())
""")
    assert done.returncode == 0, done.stderr
    inside = [abs(2 * (-1 + 2 * i / 7) + 0.5) <= 2 for i in range(8)]  # codes -2 .. 1, half to even
    want = [i / 8 if fits else 0.0 for i, fits in enumerate(inside)]
    assert json.loads(done.stdout) == want
