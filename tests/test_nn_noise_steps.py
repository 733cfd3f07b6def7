"""Noise over a training step: several calls, checkpointing, compilation, AMP, a device's step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_nn_graph import NoReadBack
from test_nn_noise import assert_same, capture, noisy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels import Noise
from qkernels.nn import NoiseHandle, NoiseSpec, QuantSpec

UNIFORM = {
    "weights": NoiseSpec("uniform", QuantSpec(3, axis=0, symmetric=True)),
    "activations": NoiseSpec("uniform", QuantSpec(3)),
}
KINDS: dict[str, dict[str, Any]] = {"dnq": {}, "uniform": UNIFORM}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A part that may be checkpointed, and a layer that is called twice, checkpointed likewise."""

    def __init__(self, mode: bool | None = None, calls: int = 2) -> None:
        super().__init__()
        self.mode = mode
        self.calls = calls
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.b = nn.Linear(8, 8)

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        if self.mode is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.mode)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.a, x)
        for _ in range(self.calls):
            x = self.run(self.b, x.relu())
        return x


def made(mode: bool | None = None, calls: int = 2, **options: Any) -> tuple[nn.Module, NoiseHandle]:
    torch.manual_seed(0)
    # a BatchNorm in a checkpoint moves twice, with noise or without
    return noisy(Net(mode, calls), clean_batchnorm=True, **options)


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(7, 6, generator=generator) * (1 + seed)).requires_grad_()


def run(
    model: nn.Module, handle: NoiseHandle, forward: Any = None, forwards: int = 2
) -> list[Tensor]:
    """Outputs, gradients and states of a few steps, each with several forwards and backwards."""
    found = []
    for step in range(3):
        for i in range(forwards):
            model.zero_grad(set_to_none=True)
            x = batch(forwards * step + i)
            y = model(x) if forward is None else forward(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
        found += [t.clone() for t in model.state_dict().values()]
        handle.noise.advance()
    return found


def test_calls_of_a_step_draw_at_places_of_their_own() -> None:
    model, handle = noisy(nn.Linear(6, 6), weights=None)
    got = capture(model)
    x = torch.randn(5, 6)
    for step in range(2):
        for call in range(3):
            model(x)
            at = handle.noise.at("input", kind="drop_in", per_rank=True)
            assert at["step"] == step
            at["step"] += call << 40
            stats = handle.stats["input"]
            assert torch.equal(got[-1], qkernels.drop_in_noise(x, stats, p=0.5, **at))
        assert int(model.input_noise.errors.updates) == step + 1
        handle.noise.advance()
    assert all(not torch.equal(a, b) for i, a in enumerate(got) for b in got[:i])


def test_a_weight_has_one_noise_in_a_step() -> None:
    shared = nn.Linear(6, 6)
    model, handle = noisy(nn.Sequential(shared, nn.ReLU(), shared), activations=None)
    seen = []
    for _ in range(2):
        model(torch.randn(5, 6))
        seen.append(shared.weight.detach().clone())
        assert torch.equal(shared.weight, seen[-1])
        handle.noise.advance()
    assert not torch.equal(seen[0], seen[1])
    assert list(handle.stats) == ["0.weight"]
    assert int(shared.parametrizations.weight[0].errors.updates) == 2
    assert list(handle.model_state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    _, handle = noisy(model)
    for other in (model, copy.deepcopy(model)):
        other(torch.randn(5, 6)).square().sum().backward()
        parameter = other[0].parametrizations.weight.original
        assert parameter is other[2].parametrizations.weight.original
        assert torch.equal(other[0].weight, other[2].weight)
        assert not torch.equal(other[0].weight, parameter)
        assert int(other[0].parametrizations.weight[0].errors.updates) == 1
        assert len(list(other.parameters())) == 3
    assert list(handle.stats) == ["0.weight", "0.input", "2.input"]
    handle.remove()
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_checkpointing_changes_nothing(options: dict[str, Any], reentrant: bool) -> None:
    assert_same(run(*made(reentrant, **options)), run(*made(None, **options)))


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_several_forwards_before_the_backward(reentrant: bool, device: str | None) -> None:
    """Each forward that a checkpoint repeats draws what it drew, whatever came after it."""
    grads = []
    for mode in (None, reentrant):
        model, handle = made(mode, noise=Noise(7, device=device))
        for step in range(2):
            model.zero_grad()
            xs = [batch(5 * step), batch(5 * step + 1), batch(5 * step).detach().flip(0)]
            xs[2].requires_grad_()
            sum(model(x).square().sum() for x in xs).backward()
            grads.append([x.grad for x in xs] + [p.grad for p in model.parameters()])
            handle.noise.advance()
    assert_same(grads[2] + grads[3], grads[0] + grads[1])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_step_on_a_device_draws_the_same(options: dict[str, Any]) -> None:
    expected = run(*made(**options, ramp=0.5))
    # the ramp scales the statistics there, and not their draw: exact for a power of two
    assert_same(run(*made(**options, ramp=0.5, noise=Noise(7, device="cpu"))), expected)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_compiled_once_and_the_same(options: dict[str, Any], device: str | None) -> None:
    model, handle = made(**options, ramp=0.5, noise=Noise(7, device=device))
    found = run(model, handle, compiled(model))
    assert_same(found, run(*made(**options, ramp=0.5)))
    assert graphs() == 1


def test_a_checkpoint_in_a_compiled_model() -> None:
    """With each layer called once: of several calls, the latest counts (see InputNoise)."""
    model, handle = made(False, calls=1)
    assert_same(run(model, handle, compiled(model)), run(*made(calls=1)))


def test_switch_and_ramp_of_a_compiled_model() -> None:
    (model, handle), (plain, other) = made(), made()
    function = compiled(model)
    for enabled, ramp in ((True, 1.0), (True, 0.25), (False, 0.25), (True, 2.0), (True, 0.0)):
        for h in (handle, other):
            h.enabled, h.ramp = enabled, ramp
        assert torch.equal(function(batch(1)), plain(batch(1)))
        for h in (handle, other):
            h.noise.advance()
    assert graphs() == 2  # with noise and without
    handle.ramp = other.ramp = 0.3
    torch.testing.assert_close(function(batch(2)), plain(batch(2)))
    assert torch.equal(compiled(model.eval())(batch(2)), plain.eval()(batch(2)))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_training_step_reads_nothing_back(device: str | None) -> None:
    model, handle = made(noise=Noise(7, device=device))
    run(model, handle, forwards=1)
    x = batch(1)
    with NoReadBack():
        model(x).square().mean().backward()
        handle.noise.advance()
        handle.ramp = 0.5
        model(x).square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_noisy_weight(dtype: torch.dtype) -> None:
    model, handle = noisy(nn.Linear(6, 5))
    got = capture(model)
    x = torch.randn(7, 6)
    with torch.autocast("cpu", dtype):
        y = model(x)
        assert y.dtype is dtype
        assert model.weight.dtype is torch.float32
        expected = nn.functional.linear(got[0], model.weight, model.bias)
    assert torch.equal(y, expected)
    y.float().square().mean().backward()
    assert model.parametrizations.weight.original.grad.dtype is torch.float32
    noise = model.weight - model.parametrizations.weight.original
    assert 0 < noise.abs().max() < 1
    with handle.off(), torch.autocast("cpu", dtype):
        assert not torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    model, handle = noisy(nn.Linear(6, 5))
    model.to(dtype)
    y = model(torch.randn(7, 6, dtype=dtype))
    y.square().mean().backward()
    assert y.dtype is dtype and model.weight.dtype is dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert handle.stats["weight"].var.dtype is wide
    assert not torch.equal(model.weight, model.parametrizations.weight.original)


def test_an_input_by_keyword_and_an_empty_batch() -> None:
    model, handle = noisy(nn.Linear(6, 5))
    x = torch.randn(7, 6)
    y = model(input=x)
    handle.noise.step = 0
    got = capture(model)
    assert torch.equal(model(x), y) and not torch.equal(got[-1], x)
    assert model(torch.zeros(0, 6)).shape == (0, 5)
    uniform, _ = noisy(nn.Linear(6, 5), **UNIFORM)
    assert uniform(torch.zeros(0, 6)).shape == (0, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_captured_step_is_the_eager_one() -> None:
    torch.manual_seed(0)
    start = Net().cuda()
    models = [noisy(copy.deepcopy(start), noise=Noise(7, device="cuda")) for _ in range(2)]
    xs = [torch.randn(7, 6, device="cuda") for _ in range(6)]
    static = xs[0].clone()

    def step(model: nn.Module, handle: NoiseHandle, x: Tensor) -> None:
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        handle.noise.advance()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for model, handle in models:
            for _ in range(3):
                step(model, handle, static)
    torch.cuda.current_stream().wait_stream(side)
    (captured, handle), (eager, other) = models
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, handle, static)
    for i, x in enumerate(xs):
        handle.ramp = other.ramp = 2.0**-i
        static.copy_(x)
        graph.replay()
        step(eager, other, x)
        for a, b in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_step_draws_what_it_drew(compile: bool) -> None:
    """Calls are counted anew when the step is set, though it is the number that it was."""
    model, handle = made(calls=1, **UNIFORM)
    function = compiled(model) if compile else model
    first = function(batch(0))
    handle.noise.load_state_dict(handle.noise.state_dict())
    assert torch.equal(function(batch(0)), first)
    assert not torch.equal(function(batch(0)), first), "the next call of a step is another draw"


def test_another_noise_counts_its_own_calls() -> None:
    model, handle = made(calls=1, **UNIFORM)
    first = model(batch(0))
    model(batch(0))
    handle.noise = Noise(handle.noise.seed)
    assert torch.equal(model(batch(0)), first)
