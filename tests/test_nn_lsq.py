"""LSQ's gradient scale in a prepared model, and LSQ+'s learned zero point."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels.nn import FakeQuantize, QConfig, QuantSpec, calibrate, prepare

PLUS: dict[str, Any] = {
    "learned": True,
    "learned_zero_point": True,
    "method": "mse",
    "clip": "value",
}


def sample(shape: tuple[int, ...] = (6, 5, 4, 3), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.4


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def reference(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """LSQ+ for unsigned codes, scale and offset broadcast over x; plain autograd."""
    zero_point = -offset / scale
    z = straight(zero_point, zero_point.round())
    t = x / scale
    inside = straight(t, t.round()) * scale
    low, high = (0 - z) * scale, (qmax - z) * scale
    return torch.where(t + z < 0, low, torch.where(t + z > qmax, high, inside))


@pytest.mark.parametrize("axis", [None, 1])
def test_lsq_plus_is_the_formula(axis: int | None) -> None:
    channels = 1 if axis is None else 5
    quantizer = FakeQuantize(QuantSpec(3, axis=axis, **PLUS), channels).double()
    x = sample()
    quantizer(x)  # the first values
    with torch.no_grad():
        quantizer.scale.mul_(torch.linspace(0.6, 1.1, channels))
        quantizer.offset.sub_(quantizer.scale * torch.linspace(-1.3, 0.7, channels))
    cotangent = sample(seed=1)
    a = x.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)

    b = x.clone().requires_grad_()
    scale, offset = (
        p.detach().clone().requires_grad_() for p in (quantizer.scale, quantizer.offset)
    )
    shape = (1, channels, 1, 1)
    wanted = reference(b, scale.view(shape), offset.view(shape), 7)
    wanted.backward(cotangent)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-15, atol=0)
    factor = 1 / math.sqrt(x.numel() / channels * 7)
    torch.testing.assert_close(quantizer.scale.grad, scale.grad * factor, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.offset.grad, offset.grad * factor, rtol=1e-9, atol=1e-12)
    assert quantizer.offset.grad.abs().min() > 0


def test_a_step_moves_scale_and_offset_as_in_the_paper() -> None:
    """By hand, 2 bits, s = 1/2, beta = -1/2 (z = 1): x is clipped outside [-1/2, 1]."""
    quantizer = FakeQuantize(QuantSpec(2, **PLUS)).double()
    quantizer(sample())
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
        quantizer.offset.fill_(-0.5)
    x = torch.tensor([-2.0, -0.6, 0.1, 0.4, 1.3], dtype=torch.float64)
    cotangent = torch.tensor([0.3, -1.1, 0.7, 0.2, 0.9], dtype=torch.float64)
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    optimizer.zero_grad()
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([-0.5, -0.5, 0, 0.5, 1.0]).double())
    y.backward(cotangent)
    optimizer.step()
    # inside round(u) - u, u = (x - beta) / s; below qmin = 0, above qmax = 3
    of_scale = 0.7 * (1 - 1.2) + 0.2 * (2 - 1.8) + 0.9 * 3
    of_offset = 0.3 - 1.1 + 0.9
    g = 1 / math.sqrt(5 * 3)
    assert quantizer.scale.item() == pytest.approx(0.5 - 0.1 * g * of_scale, rel=1e-12)
    assert quantizer.offset.item() == pytest.approx(-0.5 - 0.1 * g * of_offset, rel=1e-12)


def test_a_scale_that_crossed_zero_has_the_same_zero_point() -> None:
    found = []
    for sign in (1, -1):
        quantizer = FakeQuantize(QuantSpec(3, **PLUS)).double()
        quantizer(sample())
        with torch.no_grad():
            quantizer.scale.mul_(0.6 * sign)
        y = quantizer(sample())
        y.backward(sample(seed=1))
        found.append((y, quantizer.offset.grad, quantizer.scale.grad * sign))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[0][2].abs() > 0


def test_the_step_of_the_offset_does_not_depend_on_the_unit_of_x() -> None:
    """x, s and beta in a unit u times smaller: the gradient of beta stays what it was."""
    found = []
    for unit in (1.0, 0.01):
        quantizer = FakeQuantize(QuantSpec(3, **PLUS)).double()
        quantizer(sample() * unit)
        with torch.no_grad():
            quantizer.scale.mul_(0.6)
            quantizer.offset.mul_(0.6)
        quantizer(sample() * unit).backward(sample(seed=1))
        found.append(quantizer.offset.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
    assert found[0].abs() > 0


def test_training_moves_a_rounded_zero_point() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4))
    model = prepare(net, QConfig.lsq_plus(4, 4, first_last_bits=None))
    x = torch.randn(64, 8)
    target = x[:, :4].relu()
    calibrate(model, [x])
    before = int(model[4].input_fake_quant.qparams().zero_point)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    after = int(model[4].input_fake_quant.qparams().zero_point)
    assert before == 4 and after < before


@pytest.mark.parametrize("config", [QConfig.lsq(4, 4), QConfig.lsq_plus(4, 4)])
def test_the_gradient_scale_counts_what_shares_a_scale(config: QConfig) -> None:
    """N is numel / channels for a weight per channel, numel for an input per tensor."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3)
    prepared = prepare(layer, QConfig(config.weight, config.activation, first_last_bits=None))
    x = torch.randn(4, 3, 7, 7)
    prepared(x).square().mean().backward()
    found = {
        "weight": prepared.weight_fake_quant.scale.grad,
        "input": prepared.input_fake_quant.scale.grad,
    }
    plain = {}
    for name, tensor, quantizer in (
        ("weight", layer.weight.detach(), prepared.weight_fake_quant),
        ("input", x, prepared.input_fake_quant),
    ):
        scale = quantizer.scale.detach().clone().requires_grad_()
        zero_point = quantizer.zero_point
        if quantizer.offset is not None:
            zero_point = -quantizer.offset.detach() / scale  # of which scale's gradient has a part
        spec = quantizer.spec
        how = {"bits": 4, "axis": spec.axis, "symmetric": spec.symmetric, "clip": "value"}
        plain[name] = (
            scale,
            qkernels.fake_quant(tensor, scale, zero_point, grad_scale=1.0, **how),
        )
    out = torch.nn.functional.conv2d(plain["input"][1], plain["weight"][1], layer.bias)
    out.square().mean().backward()
    n = {"weight": 3 * 3 * 3, "input": x.numel()}
    qp = {"weight": 7, "input": 15}
    for name, (scale, _) in plain.items():
        wanted = scale.grad / math.sqrt(n[name] * qp[name])
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7)


def test_first_values_are_those_of_the_least_error() -> None:
    x = sample().float()
    quantizer = FakeQuantize(QuantSpec(2, **PLUS))
    quantizer(x)
    scale, zero_point = qkernels.quant_range(x, bits=2, method="mse")
    torch.testing.assert_close(quantizer.scale[0], scale, rtol=1e-6, atol=0)
    assert int(quantizer.qparams().zero_point) == int(zero_point) > 0
    torch.testing.assert_close(quantizer.offset.detach()[0], -zero_point * scale)
    assert quantizer.qparams().zero_point.dtype is torch.int32
    # a second batch does not set them again
    quantizer(x * 3)
    torch.testing.assert_close(quantizer.scale[0], scale, rtol=1e-6, atol=0)


def test_a_learned_zero_point_is_rounded_for_use() -> None:
    x = sample().float()
    quantizer = FakeQuantize(QuantSpec(3, **PLUS))
    quantizer(x)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
        quantizer.offset.fill_(-1.25)  # z = 2.5: half to even
    whole = qkernels.fake_quant(x, quantizer.qparams().scale, 2, bits=3, clip="value")
    assert torch.equal(quantizer.eval()(x), whole)
    assert int(quantizer.qparams().zero_point) == 2


def test_a_shift_of_the_input_is_learned() -> None:
    """What LSQ cannot: inputs that lie away from 0, whose first batch did not."""
    x = torch.rand(400, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, spec in (
        ("lsq", QuantSpec(2, learned=True, method="lsq", clip="value")),
        ("lsq+", QuantSpec(2, **PLUS)),
    ):
        quantizer = FakeQuantize(spec)
        quantizer(x)
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (quantizer(x - 0.6) - (x - 0.6)).square().mean()
            loss.backward()
            optimizer.step()
        errors[name] = loss.item()
    assert errors["lsq+"] < 0.5 * errors["lsq"]


def test_calibrate_sets_a_learned_zero_point() -> None:
    model = prepare(nn.Linear(5, 2), QConfig.lsq_plus(4, 4, first_last_bits=None))
    xs = [torch.randn(16, 5) - 0.5, torch.randn(16, 5) - 0.5]
    calibrate(model, xs)
    seen = [qkernels.observe_range(x, bits=4, method="mse") for x in xs]
    quantizer = model.input_fake_quant
    torch.testing.assert_close(quantizer.scale[0], (seen[0][0] + seen[1][0]) / 2)
    _, zero_point = qkernels.qparams((seen[0][2] + seen[1][2]) / 2, bits=4)
    assert int(quantizer.qparams().zero_point) == int(zero_point) > 0
    wanted = -zero_point * quantizer.scale.detach()
    torch.testing.assert_close(quantizer.offset.detach(), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_zero_point_that_is_not_finite_is_refused(bad: float) -> None:
    quantizer = FakeQuantize(QuantSpec(3, **PLUS))
    quantizer(sample().float())
    with torch.no_grad():
        quantizer.offset.fill_(bad)
    with pytest.raises(ValueError, match="zero_point must be"):
        quantizer(sample().float())


def test_repr() -> None:
    text = repr(FakeQuantize(QuantSpec(4, **PLUS)))
    assert text == "FakeQuantize(4 bits, affine, per tensor, mse, learned scale and zero point)"
