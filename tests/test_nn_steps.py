"""One training step is one observation: checkpointing, compilation, several forwards, training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qkernels import Noise
from qkernels.nn import FakeQuantize, QConfig, QuantSpec, calibrate, prepare

CONFIGS = {
    "minmax": QConfig.minmax(4, 4),
    "lsq": QConfig.lsq(4, 4),
    "lsq+": QConfig.lsq_plus(4, 4),
    "pact": QConfig.pact(4, 4),
    "dorefa": QConfig.dorefa(4, 4),
    "quant-noise": QConfig.quant_noise(4, 4),
    "qdrop": QConfig.qdrop(4, 4),
}
# those that differ for the compiler: a learned zero point, a clip of its own, a mask that counts
COMPILED = ("minmax", "lsq", "lsq+", "pact", "qdrop")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share, and other tests may run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Two parts, the first of which may be checkpointed."""

    def __init__(self, mode: bool | None = None) -> None:
        super().__init__()
        self.mode = mode
        self.a = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid())
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None:
            return self.b(self.a(x))
        return self.b(checkpoint(self.a, x, use_reentrant=self.mode))


def prepared(config: QConfig, mode: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Net(mode), config, noise=Noise(0))


def inputs(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(7, 6, generator=generator) * (i + 1) for i in range(count)]


def run(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs, gradients and states of a few steps."""
    found = []
    for batch in inputs():
        x = batch.clone().requires_grad_()
        model.zero_grad(set_to_none=True)
        y = forward(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        found += [t.clone() for t in model.state_dict().values()]
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_checkpointing_changes_nothing(config: QConfig, reentrant: bool) -> None:
    plain, model = prepared(config), prepared(config, reentrant)
    assert_same(run(model, model), run(plain, plain))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a range moved."""
    from qkernels.nn import observe

    moves = [0]
    follow = observe.follow_range

    def count(*args: Any, **kw: Any) -> Any:
        moves[0] += 1
        return follow(*args, **kw)

    monkeypatch.setattr(observe, "follow_range", count)
    return moves


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_move_a_step(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = counting(monkeypatch)
    model = prepared(CONFIGS["minmax"], reentrant)
    x = inputs()[0].requires_grad_()
    model(x).sum().backward()
    assert moves[0] == 3
    model(x).sum().backward()
    assert moves[0] == 6
    with torch.no_grad():
        model(x)  # training mode without gradients observes too, as BatchNorm does
        assert moves[0] == 9
        model.eval()(x)
    model(x).sum().backward()
    assert moves[0] == 9


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward(reentrant: bool) -> None:
    """The recomputation of the first sees the range of the first, though it has moved on."""
    grads = []
    for mode in (None, reentrant):
        model = prepared(CONFIGS["minmax"], mode)
        xs = [x.requires_grad_() for x in inputs()]
        loss = sum(model(x).square().sum() for x in xs)
        loss.backward()
        grads.append([x.grad for x in xs] + [p.grad for p in model.parameters()])
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_called_twice_in_a_checkpoint(reentrant: bool) -> None:
    def twice(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(layer(x).relu() * 3)

    grads = []
    for use in (False, True):
        torch.manual_seed(1)
        layer = prepare(nn.Linear(6, 6), QConfig.minmax(3, 3, first_last_bits=None))
        x = inputs()[0].requires_grad_()
        y = checkpoint(twice, layer, x, use_reentrant=reentrant) if use else twice(layer, x)
        y.square().sum().backward()
        grads.append([x.grad, layer.weight.grad, layer.input_fake_quant.range])
    assert_same(grads[1], grads[0])


def test_a_forward_too_long_ago_gets_the_range_of_now() -> None:
    quantizer = FakeQuantize(QuantSpec(4, ema=0.9))
    old = torch.randn(8).requires_grad_()
    y = checkpoint(quantizer, old, use_reentrant=False)
    for _ in range(quantizer._recent.LENGTH):
        quantizer(torch.randn(8))
    before = quantizer.range.clone()
    y.sum().backward()
    assert torch.equal(quantizer.range, before)
    assert old.grad.isfinite().all()


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "ready"),
    [(name, True) for name in COMPILED] + [(name, False) for name in ("minmax", "lsq", "lsq+")],
)
def test_compiled_steps_are_the_eager_ones(name: str, ready: bool) -> None:
    config = CONFIGS[name]
    plain, model = prepared(config), prepared(config)
    if ready:
        calibrate(plain, inputs(1))
        calibrate(model, inputs(1))
    function = compiled(model)
    assert_same(run(model, function), run(plain, plain))
    x = inputs(1)[0]
    assert torch.equal(compiled(model.eval())(x), plain.eval()(x))


def test_compiled_twice_the_same_graph() -> None:
    """A step changes no Python attribute, so that it is compiled once."""
    for name in ("minmax", "lsq", "qdrop"):
        model = prepared(CONFIGS[name])
        function = compiled(model)
        torch._dynamo.utils.counters.clear()
        run(model, function)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["minmax", "lsq", "qdrop"])
def test_a_checkpoint_inside_a_compiled_model(name: str) -> None:
    plain, model = prepared(CONFIGS[name]), prepared(CONFIGS[name], False)
    assert_same(run(model, compiled(model)), run(plain, plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_part_inside_a_checkpoint(reentrant: bool) -> None:
    plain, model = prepared(CONFIGS["minmax"]), prepared(CONFIGS["minmax"])
    part = compiled(model.a)
    found = run(model, lambda x: model.b(checkpoint(part, x, use_reentrant=reentrant)))
    assert_same(found, run(plain, plain))


def test_export_of_a_calibrated_model() -> None:
    model = prepared(CONFIGS["minmax"])
    calibrate(model, inputs())
    x = inputs(1)[0]
    program = torch.export.export(model.eval(), (x,))
    assert torch.equal(program.module()(x), model(x))


def rings(count: int = 96) -> tuple[Tensor, Tensor]:
    """Three classes by radius: not separable by a linear model."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(count, generator=generator) * 6.2832
    label = torch.arange(count) % 3
    radius = 0.5 + label + 0.2 * torch.randn(count, generator=generator)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1), label


@pytest.mark.parametrize("config", [QConfig.minmax(2, 2), QConfig.lsq(2, 2)], ids=["minmax", "lsq"])
def test_two_bit_training_learns(config: QConfig) -> None:
    torch.manual_seed(0)
    model = prepare(
        nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)),
        config,
    )
    x, label = rings()
    calibrate(model, [x])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    accuracy = (model.eval()(x).argmax(1) == label).float().mean()
    assert accuracy > 0.75
    hidden = model[:3](x)
    assert len(model[2].input_fake_quant(model[:2](x)).unique()) <= 4
    assert hidden.isfinite().all()


def test_a_small_cnn_learns_at_two_bits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    model = prepare(net, QConfig.lsq(2, 2))
    x = torch.randn(64, 1, 6, 6)
    label = (x[:, :, :, :3].mean((1, 2, 3)) > x[:, :, :, 3:].mean((1, 2, 3))).long()
    x[label == 1, :, ::2] += 1
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    first = last = 0.0
    start = copy.deepcopy(model.state_dict())
    for step in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.7 * first
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name
