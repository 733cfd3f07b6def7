"""Quant-Noise and QDrop: the mask, the gradients, and what a step names."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Noise
from qkernels.nn import PartialFakeQuantize, QConfig, QuantSpec, fake_quantizer, prepare

LSQ: dict[str, Any] = {"learned": True, "method": "lsq", "clip": "value"}


def sample(seed: int = 0, count: int = 4096) -> Tensor:
    return torch.randn(count // 8, 8, generator=torch.Generator().manual_seed(seed))


def made(kind: str, p: float, per_rank: bool = False, **attributes: Any) -> PartialFakeQuantize:
    quantizer = fake_quantizer(QuantSpec(2, kind=kind, p=p, **attributes))
    assert isinstance(quantizer, PartialFakeQuantize)
    quantizer.noise, quantizer.label, quantizer.per_rank = Noise(0), "layer", per_rank
    return quantizer


def share(mask: Tensor) -> float:
    return float(mask.double().mean())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_share_is_p_and_steps_are_independent(p: float) -> None:
    quantizer = made("quant_noise", p)
    masks = []
    for _ in range(4):
        masks.append(quantizer.mask(torch.zeros(200, 200)))
        quantizer.noise.advance()
    four_sigma = 4 * (p * (1 - p) / 40000) ** 0.5
    for mask in masks:
        assert abs(share(mask) - p) <= four_sigma
    alike = p * p + (1 - p) * (1 - p)
    spread = 4 * (alike * (1 - alike) / 40000) ** 0.5
    for a, b in pairwise(masks):
        assert abs(share(a == b) - alike) <= spread


def test_seed_step_and_name_name_the_mask() -> None:
    x = torch.zeros(64, 64)
    first = made("qdrop", 0.5).mask(x)
    assert torch.equal(made("qdrop", 0.5).mask(x), first)
    assert torch.equal(made("qdrop", 0.5).mask(x.half()), first)
    for change in ("seed", "step", "label", "kind"):
        quantizer = made("quant_noise" if change == "kind" else "qdrop", 0.5)
        if change == "seed":
            quantizer.noise = Noise(1)
        elif change == "step":
            quantizer.noise.step = 1
        elif change == "label":
            quantizer.label = "other"
        assert abs(share(quantizer.mask(x) == first) - 0.5) < 0.05, change


def test_a_weight_has_one_mask_a_step_and_an_input_one_a_call() -> None:
    x = torch.zeros(64, 64)
    weight, input = made("quant_noise", 0.5), made("qdrop", 0.5, per_rank=True)
    assert torch.equal(weight.mask(x), weight.mask(x))
    calls = [input.mask(x) for _ in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(share(calls[a] == calls[b]) - 0.5) < 0.05
    input.noise.step = 0  # the same step again
    assert torch.equal(input.mask(x), calls[0])


def test_quant_noise_is_the_formula() -> None:
    w, cotangent = sample(), sample(1)
    quantizer = made("quant_noise", 0.3, axis=1, symmetric=True)
    mask = copy.deepcopy(quantizer).mask(w)
    a = w.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)
    full = qkernels.fake_quant(w, bits=2, axis=1, symmetric=True)
    torch.testing.assert_close(y[mask], full[mask], rtol=0, atol=1e-6)
    assert torch.equal(y[~mask], w[~mask])
    assert (full != w)[mask].float().mean() > 0.9
    # the identity, for elements too that min-max clips at 2 symmetric bits
    assert torch.equal(a.grad, cotangent)
    assert torch.equal(quantizer.eval()(w), full)


def test_qdrop_is_the_formula() -> None:
    x, cotangent = sample(), sample(1)
    quantizer = made("qdrop", 0.6, per_rank=True, **LSQ)
    quantizer(x)
    quantizer.noise.advance()
    mask = copy.deepcopy(quantizer).mask(x)
    a = x.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)

    b = x.clone().requires_grad_()
    scale, zero_point = quantizer.qparams()
    scale = scale.clone().requires_grad_()
    full = qkernels.fake_quant(b, scale, zero_point, bits=2, clip="value")
    torch.where(mask, full, b).backward(cotangent)
    assert torch.equal(y, torch.where(mask, full, x).detach())
    assert torch.equal(a.grad, b.grad)
    torch.testing.assert_close(quantizer.scale.grad[0], scale.grad, rtol=1e-6, atol=0)
    assert torch.equal(quantizer.eval()(x), full.detach())


def test_ends_of_p_and_the_switches() -> None:
    x = sample()
    full = qkernels.fake_quant(x, bits=2)
    for kind in ("quant_noise", "qdrop"):
        assert torch.equal(made(kind, 0.0)(x), x)
        assert torch.equal(made(kind, 1.0)(x), full)
        quantizer = made(kind, 0.5)
        quantizer.mask_enabled = False
        assert torch.equal(quantizer(x), full)
        quantizer.mask_enabled, quantizer.fake_quant_enabled = True, False
        assert quantizer(x) is x
        assert "minmax, dynamic, off, p=0.5" in repr(quantizer)


def test_training_without_noise_is_an_error() -> None:
    quantizer = made("qdrop", 0.5)
    quantizer.noise = None
    text = "'layer': noise must be a Noise in training .*, got None"
    with pytest.raises(RuntimeError, match=text):
        quantizer(sample())
    assert torch.equal(quantizer.eval()(sample()), qkernels.fake_quant(sample(), bits=2))


def test_prepare_gives_the_noise() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    config = QConfig.qdrop(2, 2, first_last_bits=None)
    assert config.random and not QConfig.lsq(2, 2).random
    assert QConfig.lsq(2, 2, overrides={"1": config}).random
    with pytest.raises(
        TypeError, match="noise must be a Noise for quant_noise and qdrop, got None"
    ):
        prepare(net, config)
    with pytest.raises(TypeError, match="prepare: noise must be a Noise or None, got 0"):
        prepare(net, QConfig.lsq(2, 2), noise=0)
    noise = Noise(3)
    model = prepare(net, config, noise=noise)
    assert model[0].input_fake_quant.noise is model[1].input_fake_quant.noise is noise
    assert model[0].input_fake_quant.per_rank
    weights = prepare(net, QConfig.quant_noise(2, 2, p=0.25), noise=noise)[1].weight_fake_quant
    assert weights.noise is noise and not weights.per_rank and weights.spec.p == 0.25
    x = sample(count=64)
    model(x)
    once, again = model(x), model(x)
    assert not torch.equal(once, again)
    noise.step = 0
    model(x)
    assert torch.equal(model(x), once)
