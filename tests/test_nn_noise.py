"""attach_noise: which noise, on and off, remove, checkpoints, copies, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels
from qkernels import Noise
from qkernels.nn import (
    NoiseHandle,
    NoiseSpec,
    QConfig,
    QuantSpec,
    attach_noise,
    prepare,
)

W = QuantSpec(3, axis=0, symmetric=True)
A = QuantSpec(3)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 3, groups=2),
        nn.Flatten(),
        nn.Linear(72, 8, bias=False),
        nn.Linear(8, 3),
    )


LAYERS = ("0", "3", "5", "6")


def inputs(seed: int = 9) -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def noisy(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, NoiseHandle]:
    model = net() if model is None else model
    options = {"noise": Noise(seed=7), "weights": 3, "activations": 3, **options}
    return model, attach_noise(model, **options)


def train(model: nn.Module, handle: NoiseHandle, steps: int = 3, start: int = 0) -> list[Tensor]:
    """Outputs and gradients of a few steps of plain SGD."""
    found = []
    for step in range(start, start + steps):
        model.zero_grad(set_to_none=True)
        y = model(inputs(step))
        y.square().mean().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.05)
        handle.noise.advance()
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def capture(layer: nn.Module) -> list[Tensor]:
    """Collects the inputs that a layer's forward gets after its hooks."""
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize("name", LAYERS)
def test_noise_is_that_of_the_ops_at_the_name(name: str) -> None:
    """Statistics and draws of each tensor, done again by hand from the public functions."""
    model, handle = noisy()
    layer: Any = dict(model.named_modules())[name]
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    clean = layer.parametrizations.weight.original
    entered: list[Tensor] = []
    # registered later, put first: it sees the input before the noise
    layer.register_forward_pre_hook(lambda m, args: entered.append(args[0].detach()), prepend=True)
    got = capture(layer)
    of_weight = qkernels.nn.ErrorEMA(QuantSpec(3, axis=axis, symmetric=True))
    of_input = qkernels.nn.ErrorEMA(QuantSpec(3))
    for step in range(3):
        model(inputs(step))
        at = handle.noise.at(f"{name}.weight", kind="differential")
        assert at["step"] == step
        of_weight(clean, step=step)
        weight = qkernels.differential_noise(clean, *of_weight.at(step), axis=axis, **at)
        assert torch.equal(layer.weight, weight) and not torch.equal(weight, clean)
        at = handle.noise.at(f"{name}.input", kind="drop_in", per_rank=True)
        stats = of_input(entered[-1], step=step)
        expected = qkernels.drop_in_noise(entered[-1], stats, p=0.5, **at)
        assert torch.equal(got[-1], expected) and not torch.equal(expected, entered[-1])
        handle.noise.advance()
    assert torch.equal(handle.stats[f"{name}.weight"].var, of_weight.stats.var)
    assert torch.equal(handle.stats[f"{name}.input"].var, of_input.stats.var)


def test_uniform_and_drop_in_noise() -> None:
    weights = NoiseSpec("drop_in", W, p=0.25)
    activations = NoiseSpec("uniform", QuantSpec(3, method="percentile", percentile=90.0), p=0.75)
    model, handle = noisy(weights=weights, activations=activations, ramp=0.5)
    got = capture(model[0])
    model(inputs())
    scale = qkernels.quant_range(inputs(), bits=3, method="percentile", percentile=90.0).scale
    at = handle.noise.at("0.input", kind="uniform", per_rank=True)
    assert torch.equal(got[0], qkernels.uniform_noise(inputs(), scale * 0.5, p=0.75, **at))
    clean = model[0].parametrizations.weight.original
    stats = qkernels.nn.ErrorEMA(W)(clean)
    at = handle.noise.at("0.weight", kind="drop_in")
    expected = qkernels.drop_in_noise(clean, stats, p=0.25, ramp=0.5, axis=0, **at)
    assert torch.equal(model[0].weight, expected)
    assert list(handle.stats) == [f"{name}.weight" for name in LAYERS]


def test_given_statistics_are_used() -> None:
    channels = dict(zip(LAYERS, (4, 1, 8, 3), strict=True))
    given = {f"{n}.weight": (torch.zeros(c), torch.ones(c)) for n, c in channels.items()}
    model, handle = noisy(
        weights=NoiseSpec("differential", W, given=given),
        activations=NoiseSpec("uniform", A, given=0.25),
    )
    got = capture(model[0])
    model(inputs())
    clean = model[0].parametrizations.weight.original
    at = handle.noise.at("0.weight", kind="differential")
    assert torch.equal(model[0].weight, qkernels.differential_noise(clean, (0.0, 1.0), **at))
    at = handle.noise.at("0.input", kind="uniform", per_rank=True)
    assert torch.equal(got[0], qkernels.uniform_noise(inputs(), 0.25, **at))
    assert handle.stats == {}


def test_the_gradient_is_that_at_the_noisy_point() -> None:
    """Identity: W gets the gradient that W + noise has, x that of x + noise."""
    model, handle = noisy(nn.Linear(6, 5))
    x = torch.randn(7, 6, requires_grad=True)
    cotangent = torch.randn(7, 5)
    model(x).mul(cotangent).sum().backward()
    weight = model.weight.detach().requires_grad_()
    moved = model.input_noise.errors
    at = handle.noise.at("input", kind="drop_in", per_rank=True)
    entered = qkernels.drop_in_noise(x.detach(), moved.stats, p=0.5, **at).requires_grad_()
    F.linear(entered, weight, model.bias).mul(cotangent).sum().backward()
    assert torch.equal(model.parametrizations.weight.original.grad, weight.grad)
    assert torch.equal(x.grad, entered.grad)
    assert weight.grad.abs().max() > 0.1


def test_off_is_the_model_without_noise() -> None:
    plain = net()
    model, handle = noisy(net())
    model.eval(), plain.eval()
    assert torch.equal(model(inputs()), plain(inputs()))
    model.train(), plain.train()
    handle.enabled = False
    found, expected = model(inputs()), plain(inputs())
    assert torch.equal(found, expected)
    found.square().mean().backward()
    expected.square().mean().backward()
    grads = {
        n.replace("parametrizations.weight.original", "weight"): p.grad
        for n, p in model.named_parameters()
    }
    for name, p in plain.named_parameters():
        assert torch.equal(grads[name], p.grad), name
    assert model[0].weight is model[0].parametrizations.weight.original
    assert all(int(m.errors.updates) == 0 for m in handle._noises())
    with handle.on():
        assert handle.enabled and not torch.equal(model(inputs()), expected)
        with handle.off():
            assert torch.equal(model(inputs()), expected)
        assert handle.enabled
    assert not handle.enabled


def test_each_layers_own_mode_counts() -> None:
    model, _ = noisy()
    model[0].eval()
    got = capture(model[0]), capture(model[5])
    model(inputs())
    assert torch.equal(got[0][0], inputs())
    assert torch.equal(model[0].weight, model[0].parametrizations.weight.original)
    assert not torch.equal(model[5].weight, model[5].parametrizations.weight.original)


def test_noise_in_eval_mode_if_asked() -> None:
    model, handle = noisy(in_eval=True)
    model(inputs())
    before = handle.stats["0.weight"].var
    updates = [int(m.errors.updates) for m in handle._noises()]
    handle.noise.advance()
    model.eval()
    first = model(inputs())
    assert not torch.equal(model[0].weight, model[0].parametrizations.weight.original)
    assert torch.equal(handle.stats["0.weight"].var, before)
    assert [int(m.errors.updates) for m in handle._noises()] == updates
    with handle.off():
        assert not torch.equal(model(inputs()), first)


def test_ramp_scales_the_noise() -> None:
    model, handle = noisy(activations=None)
    model(inputs())
    clean = model[0].parametrizations.weight.original.detach().double()
    full = model[0].weight.detach().double() - clean
    handle.ramp = 0.25
    # the sum w + noise is rounded at w's size
    torch.testing.assert_close(model[0].weight.double() - clean, full / 4, rtol=0, atol=1e-7)
    handle.ramp = 0
    assert torch.equal(model[0].weight.double(), clean)
    assert full.abs().max() > 0.01


def test_frozen_statistics_move_by_measuring_only() -> None:
    model, handle = noisy()
    handle.frozen = True
    y = model(inputs())
    with handle.off():
        assert torch.equal(y, model(inputs()))  # nothing measured, no noise
    model.eval()
    with handle.measuring():
        clean = [model(inputs(seed)) for seed in (1, 2)]
    with handle.off():
        assert_same(clean, [model(inputs(seed)) for seed in (1, 2)])
    counts = {m.name: int(m.errors.updates) for m in handle._noises()}
    assert counts == {f"{n}.{k}": c for n in LAYERS for k, c in (("weight", 1), ("input", 2))}
    expected = qkernels.nn.ErrorEMA(A)
    for seed in (1, 2):
        expected(inputs(seed))
    assert torch.equal(handle.stats["0.input"].mean, expected.stats.mean)
    before = handle.stats["0.input"].mean
    assert not torch.equal(model.train()(inputs()), y)
    assert torch.equal(handle.stats["0.input"].mean, before)


def test_measured_statistics_keep_those_of_the_step_before() -> None:
    """A noise that is frozen in between telescopes over a measurement."""
    model, handle = noisy(nn.Linear(8, 4), activations=None)
    handle.frozen = True
    errors = model.parametrizations.weight[0].errors
    with handle.measuring():
        model(torch.zeros(1, 8))
    first = errors.stats
    model.weight = torch.randn(4, 8)
    handle.noise.advance()
    with handle.measuring():
        for _ in range(2):
            model(torch.zeros(1, 8))
    assert int(errors.updates) == 2
    now, before = errors.at(1)
    assert torch.equal(before.var, first.var) and not torch.equal(now.var, first.var)


@pytest.mark.parametrize("clean", [True, False])
def test_batchnorm_statistics(clean: bool) -> None:
    model, handle = noisy(clean_batchnorm=clean)
    norm: Any = model[1]
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    entered = capture(norm)
    out = model[:2](inputs())
    changed = [k for k, v in norm.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ([] if clean else ["running_mean", "running_var", "num_batches_tracked"])
    # it normalizes by the batch, as it did
    assert torch.equal(out, F.batch_norm(entered[0], None, None, norm.weight, norm.bias, True))
    assert norm.track_running_stats
    with handle.off():
        model(inputs())
    plain = net()
    plain(inputs())
    same = all(torch.equal(v, plain[1].state_dict()[k]) for k, v in norm.state_dict().items())
    assert same is clean


def test_batchnorm_is_released_when_a_forward_fails() -> None:
    model, handle = noisy(clean_batchnorm=True)
    with pytest.raises(ValueError, match="expected 4D input"):
        model[1](torch.zeros(3, 4))
    assert model[1].track_running_stats
    before = model[1].running_mean.clone()
    with handle.off():
        model(inputs())
    assert not torch.equal(model[1].running_mean, before)


def test_permanent_noise_moves_the_weights() -> None:
    spec = NoiseSpec("differential", W, permanent=True)
    model, handle = noisy(weights=spec, activations=None)
    plain = net()
    assert torch.equal(model(inputs()), plain(inputs()))
    errors = qkernels.nn.ErrorEMA(W)
    expected = plain[5].weight.detach().clone()
    for step in range(3):
        handle.perturb_()
        errors(expected, step=step)
        at = handle.noise.at("5.weight", kind="differential")
        expected = qkernels.differential_noise(expected, *errors.at(step), **at)
        assert torch.equal(model[5].weight, expected)
        handle.noise.advance()
    handle.enabled = False
    handle.perturb_()
    assert torch.equal(model[5].weight, expected)
    assert not torch.equal(expected, plain[5].weight)


def _attach(**options: Any) -> Callable[[], Any]:
    return lambda: noisy(**options)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (_attach(noise=0), TypeError, r"^attach_noise: noise must be a Noise, got int$"),
    (_attach(model="net"), TypeError, r"^attach_noise: model must be a Module, got str$"),
    (_attach(model=nn.ReLU()), ValueError, r"^attach_noise: model must have a Conv, ConvTranspose"),
    (_attach(weights=None, activations=None), ValueError, r"weights or activations must be given"),
    (_attach(weights=3.0), TypeError, r"weights must be a NoiseSpec, bits or None, got 3\.0$"),
    (_attach(weights=17), ValueError, r"bits must be in 1\.\.16, got 17$"),
    (_attach(activations=NoiseSpec("differential", A)), ValueError, r"must be drop_in or uniform"),
    (_attach(ramp=-1.0), ValueError, r"^attach_noise: ramp must be at least 0, got -1\.0$"),
    (_attach(ramp="x"), TypeError, r"^attach_noise: ramp must be a number"),
    (_attach(ramp=float("nan")), ValueError, r"^attach_noise: ramp must be finite, got nan$"),
    (_attach(layers="0"), TypeError, r"^attach_noise: layers must be a list of str, got '0'$"),
    (_attach(layers=["9"]), ValueError, r"layers must have patterns that match a layer, got '9'"),
    (_attach(skip=["x*"]), ValueError, r"skip must have patterns that match a layer, got 'x\*'"),
    (_attach(skip=["*"]), ValueError, r"layers and skip must leave at least one layer, got none"),
    (
        _attach(model=prepare(net(), QConfig.minmax(4, 4))),
        ValueError,
        r"^attach_noise: model must be a float model, got one that is prepared already",
    ),
    (_attach(model=noisy(layers=["5"])[0]), ValueError, r"must be without noise, got '5' with it$"),
    (
        _attach(weights=NoiseSpec("differential", QuantSpec(3, axis=4))),
        ValueError,
        r"^attach_noise: weight axis must be in -4\.\.3 for layer '0', got 4$",
    ),
    (
        _attach(weights=NoiseSpec("uniform", W, given={"0.weight": 1.0})),
        ValueError,
        r"^NoiseSpec: given must have an entry for '3\.weight', got none$",
    ),
    (
        _attach(weights=NoiseSpec("drop_in", W, given=1.0)),
        TypeError,
        r"given must be an ErrorS",
    ),
    (lambda: NoiseSpec("gauss", W), ValueError, r"^NoiseSpec: kind must be one of differential, d"),
    (lambda: NoiseSpec("drop_in", 4), TypeError, r"quant must be a QuantSpec, got 4$"),  # type: ignore[arg-type]
    (lambda: NoiseSpec("drop_in", W, p=1.5), ValueError, r"^NoiseSpec: p must be in \[0, 1\]"),
    (lambda: NoiseSpec("differential", W, p=0.5), ValueError, r"p must be None for differential"),
    (lambda: NoiseSpec("drop_in", W, decay=1.0), ValueError, r"^NoiseSpec: decay must be in \[0,"),
    (
        lambda: NoiseSpec("uniform", W, permanent=True),
        ValueError,
        r"permanent must be False for u",
    ),
    (noisy()[1].perturb_, ValueError, r"weights must have permanent noise for perturb_"),
]


@pytest.mark.parametrize(("act", "error", "text"), BAD)
def test_bad_input(act: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        act()


@pytest.mark.parametrize(
    "options",
    [{"skip": ["*", "x"]}, {"weights": NoiseSpec("uniform", W, given={"0.weight": 1.0})}],
    ids=["skip", "given"],
)
def test_a_refused_model_is_as_it_was(options: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(ValueError, match="must"):
        noisy(model, **options)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert list(model.state_dict()) == list(net().state_dict())
