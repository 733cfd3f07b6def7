"""torch.library: opcheck, torch.compile with fullgraph, torch.export, AMP, other modes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import qkernels
from qkernels import numeric


def samples() -> list[tuple[str, tuple]]:
    """(op, arguments); every one owns its tensors where it asks for gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return seeded_samples()


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def seeded_samples() -> list[tuple[str, tuple]]:
    x = torch.randn(6, 8, 5, 3)
    last = torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last)
    s, zp = torch.rand(6) + 0.2, torch.randint(0, 15, (6,), dtype=torch.int32)
    grad = torch.randn_like(last)
    mask = torch.randint(0, 256, (numeric.mask_bytes(last.numel()),), dtype=torch.uint8)
    order = numeric.memory_order(last)
    groups = torch.rand(30) + 0.1
    q = (s, zp, 0, 15)
    counter, at = (1, 2, None, None), (0, 0, torch.tensor(2**40), torch.tensor(7))

    def learned() -> tuple:
        return leaf(s), leaf(zp.float()), 0, 15

    return [
        ("fake_quant", (x, *q, 0, None, "code", True)),
        ("fake_quant", (leaf(last), *q, 1, None, "code", True)),
        ("fake_quant", (leaf(last), *learned(), 1, None, "value", False)),
        ("fake_quant", (x.half(), groups, None, -8, 7, None, 24, "code", True)),
        ("fake_quant", (leaf(x), leaf(groups), None, -8, 7, None, 24, "code", False)),
        ("fake_quant", (leaf(x.half()), leaf(groups), None, -8, 7, None, 24, "value", False)),
        ("fake_quant", (leaf(torch.empty(0, 6)), *learned(), 1, None, "code", False)),
        ("fake_quant_bwd", (grad, mask, order)),
        ("fake_quant_bwd", (leaf(x), torch.zeros(90, dtype=torch.uint8), [])),
        ("lsq_bwd", (grad, last, *q, 1, None, "code", 0.5)),
        ("lsq_bwd", (torch.randn_like(x), x, groups, None, -8, 7, None, 24, "value", 1.0)),
        ("quant_range", (last, 0, 15, 1, None, False, "minmax", 99.0)),
        ("quant_range", (last, -8, 7, None, None, True, "percentile", 99.0)),
        ("qparams", (torch.randn(2, 5), 0, 15, False)),
        (
            "fake_quant_dynamic",
            (leaf(last), 0, 15, 1, None, False, "minmax", 99.0, "code", True),
        ),
        ("quantize", (last, *q, 1, None, 0)),
        ("quantize", (last, *q, 1, None, 4)),
        (
            "dequantize",
            (torch.zeros(6, 5, dtype=torch.uint8), s, zp, 0, 0, None, 4, 9, torch.float32),
        ),
        ("error_stats", (last, *q, 1, None, "code")),
        ("error_stats", (x.half(), groups, None, -8, 7, None, 24, "value")),
        ("error_stats_dynamic", (last, 0, 15, 1, None, False, "minmax", 99.0, "code")),
        ("error_stats_dynamic", (x, -8, 7, None, None, True, "percentile", 99.0, "value")),
        ("differential_noise", (leaf(last), s, s, None, None, *counter, 0.5, 0, 1, None)),
        ("differential_noise", (x, groups, groups, -groups, groups, *at, 1.0, 3, None, 24)),
        ("drop_in_noise", (leaf(x.half()), leaf(-s), leaf(s), 0.3, *counter, 1.0, 0, 0, None)),
        ("drop_in_noise", (x[:, ::2], s, s, 1.0, *at, 0.1, 2**62, 0, None)),
        ("uniform_noise", (leaf(last), s[0], 0.5, *at, 1, None, None)),
        ("uniform_noise", (leaf(torch.empty(0, 6)), s, 1.0, *counter, 0, 1, None)),
    ]


@pytest.mark.parametrize("sample", samples(), ids=lambda s: s[0])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(sample: tuple[str, tuple]) -> None:
    op, args = sample
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


def run(fn: Callable[..., Tensor], x: Tensor, scale: Tensor, zp: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    scale, zp = scale.detach().clone().requires_grad_(), zp.detach().clone().requires_grad_()
    y = fn(x, scale, zp)
    grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, (x, scale, zp), grad, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def dynamic(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
    return qkernels.fake_quant(x * 2, bits=4, axis=1)


def straight(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
    return qkernels.fake_quant(x * 2, scale.detach(), zp.detach(), bits=4, axis=1)


def learned(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
    return qkernels.fake_quant(x * 2, scale, zp, bits=4, axis=1, clip="value")


@pytest.mark.parametrize("fn", (dynamic, straight, learned))
@pytest.mark.parametrize("memory", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_fullgraph(
    fn: Callable[..., Tensor], memory: torch.memory_format, backend: str
) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 6, 5, 3).to(memory_format=memory)
    scale, zp = torch.rand(6) + 0.2, torch.rand(6) * 9
    want = run(fn, x, scale, zp)
    got = run(torch.compile(fn, fullgraph=True, backend=backend), x, scale, zp)
    assert len(want) == (4 if fn is learned else 2)
    for a, b in zip(got, want, strict=True):
        assert_same(a.contiguous(), b.contiguous())


def test_compile_with_changing_shapes() -> None:
    torch.compiler.reset()
    fn = torch.compile(
        lambda x: qkernels.fake_quant(x, bits=4), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (7, 12, 100):
        x = torch.randn(n, 5)
        assert_same(fn(x), qkernels.fake_quant(x, bits=4))


@pytest.mark.parametrize("axis", (None, 1))
def test_compile_a_learned_scale_with_changing_shapes(axis: int | None) -> None:
    torch.compiler.reset()
    torch.manual_seed(1)
    scale, zp = (
        (torch.rand(6) + 0.2, torch.rand(6) * 9) if axis else (torch.rand(()), torch.ones(()))
    )

    def fn(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
        return qkernels.fake_quant(x * 2, scale, zp, bits=4, axis=axis)

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 12, 100):
        x = torch.randn(n, 6, 5)
        want = run(fn, x, scale, zp)
        assert len(want) == 4
        for got, expected in zip(run(compiled, x, scale, zp), want, strict=True):
            assert_same(got, expected)


def differential(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return qkernels.differential_noise(x * 2, (mean, std), (std, std), seed=1, step=2, axis=1)


def drop_in(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    at = torch.full((), 3, dtype=torch.int64) + 1
    return qkernels.drop_in_noise(x * 2, (mean, std), p=0.5, seed=2**62, step=at, ramp=0.3, axis=1)


def uniform_in_place(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    y = x * 2
    qkernels.uniform_noise(y, std, seed=1, step=2, axis=1, inplace=True)
    return y * y


def of_its_own_error(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    stats = qkernels.error_stats(x, bits=3, axis=1)
    given = qkernels.error_stats(x, std, mean, bits=3, axis=1)
    return qkernels.differential_noise(x, stats, given, seed=1, step=2, axis=1)


NOISY = (differential, drop_in, uniform_in_place, of_its_own_error)


@pytest.mark.parametrize("fn", NOISY)
@pytest.mark.parametrize("memory", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_noise(
    fn: Callable[..., Tensor], memory: torch.memory_format, backend: str
) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 6, 5, 3).to(memory_format=memory)
    mean, std = torch.rand(6), torch.rand(6) + 0.2
    want = run(fn, x, mean, std)
    got = run(torch.compile(fn, fullgraph=True, backend=backend), x, mean, std)
    assert len(want) == 2  # of x alone
    for a, b in zip(got, want, strict=True):
        assert_same(a.contiguous(), b.contiguous())


def test_steps_do_not_compile_again() -> None:
    """An int that changes becomes symbolic at the second call. A float argument of an op cannot, so
    a ramp that changes goes into the statistics, as a tensor."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def fn(x: Tensor, seed: int, step: int, offset: int, ramp: Tensor) -> Tensor:
        law = (0.25 * ramp, 0.5 * ramp)
        return qkernels.drop_in_noise(x, law, p=0.5, seed=seed, step=step, offset=offset)

    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    x = torch.randn(50)
    for step in range(12):
        args = (2**40 + step, 2**33 + 2 * step, 3 * step, torch.tensor(step / 11))
        assert_same(compiled(x, *args), fn(x, *args))
    assert counter.frame_count == 2


def test_a_ramp_that_changes_compiles_again_and_is_right() -> None:
    torch.compiler.reset()

    def fn(x: Tensor, ramp: float) -> Tensor:
        return qkernels.differential_noise(x, (0.1, 0.2), seed=1, step=2, ramp=ramp, axis=None)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    x = torch.randn(50)
    for ramp in (0.0, 0.1, 0.2, 0.7):
        assert_same(compiled(x, ramp), fn(x, ramp))


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 6))
        self.register_buffer("step", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        stats = qkernels.error_stats(self.weight, bits=4, axis=0)
        weight = qkernels.differential_noise(self.weight, stats, seed=1, step=self.step)
        x = qkernels.drop_in_noise(x, (0.0, 0.1), p=0.5, seed=2, step=self.step)
        return torch.nn.functional.linear(qkernels.uniform_noise(x, 0.1, seed=3, step=4), weight)


@pytest.mark.parametrize("strict", (True, False))
def test_export_noise(strict: bool) -> None:
    model, x = Noisy(), torch.randn(3, 6)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for op in ("error_stats_dynamic", "differential_noise", "drop_in_noise", "uniform_noise"):
        assert f"qkernels.{op}.default" in targets
    assert_same(program.module()(x).detach(), model(x).detach())
    exported = program.module()
    for one in (exported, model):
        one.step.fill_(9)
    assert_same(exported(x).detach(), model(x).detach())


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        weight = qkernels.fake_quant(self.weight, bits=4, axis=0, symmetric=True)
        return torch.nn.functional.linear(qkernels.fake_quant(x, 0.1, 3, bits=8), weight)


@pytest.mark.parametrize("strict", (True, False))
def test_export(strict: bool) -> None:
    model, x = Model(), torch.randn(3, 6)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "qkernels.fake_quant.default" in targets
    assert "qkernels.fake_quant_dynamic.default" in targets
    assert_same(program.module()(x).detach(), model(x).detach())


def test_autocast() -> None:
    layer, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    scale = torch.tensor(0.1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qkernels.fake_quant(layer(x), scale, bits=8, symmetric=True)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert scale.grad.dtype is torch.float32 and layer.weight.grad.dtype is torch.float32


def test_meta_and_fake_tensors() -> None:
    y = qkernels.fake_quant(torch.ones(3, 4, device="meta"), bits=4, axis=0)
    assert y.shape == (3, 4) and y.is_meta
    noisy = qkernels.uniform_noise(torch.ones(3, 4, device="meta"), 0.1, seed=1, step=2)
    assert noisy.shape == (3, 4) and noisy.is_meta
    with torch._subclasses.FakeTensorMode():
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        y = qkernels.fake_quant(x, bits=4, axis=1)
        y.sum().backward()
        assert y.stride() == x.stride() and x.grad.shape == x.shape


@pytest.mark.parametrize("fn", (dynamic, straight, learned))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_keeps_the_op(fn: Callable[..., Tensor]) -> None:
    torch.manual_seed(2)
    first, other = (
        [torch.randn(2, 6, 5), torch.rand(6) + 0.2, torch.rand(6) * 9] for _ in range(2)
    )
    assert_same(torch.jit.trace(fn, first)(*other), fn(*other))
    # torch checks a trace without gradients, for which the ops are called differently
    traced = torch.jit.trace(fn, [leaf(t) for t in first], check_trace=False)
    for got, want in zip(run(traced, *other), run(fn, *other), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_tensor_without_memory(backend: str) -> None:
    code = f"""
import torch, qkernels
x = torch._efficientzerotensor((3,))
for scale in (0.1, torch.tensor(0.1, requires_grad=True)):
    assert qkernels.fake_quant(x, scale, bits=8, backend={backend!r}).tolist() == [0.0] * 3
"""
    folder = tempfile.gettempdir()  # not here, where qkernels/ would hide an installed one
    command = [sys.executable, "-c", code]  # on its own: it may crash
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 4))
def test_codes_round_trip_to_fake_quant(bits: int, packed: bool) -> None:
    torch.manual_seed(bits)
    for shape, axis in (((5, 7), 0), ((3, 4, 9), 1), ((11,), None)):
        x = torch.randn(shape)
        for symmetric in (True, False):
            kw = dict(bits=bits, axis=axis, symmetric=symmetric)
            scale, zp = qkernels.quant_range(x, **kw)
            codes = qkernels.quantize(x, scale, zp, packed=packed, **kw)
            y = qkernels.dequantize(codes, scale, zp, packed=packed, size=shape[-1], **kw)
            assert_same(y, qkernels.fake_quant(x, scale, zp, **kw))
            if packed:
                assert codes.numel() == x.numel() // shape[-1] * ((shape[-1] * bits + 7) // 8)
