"""PACT and DoReFa against their formulas, written out for plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Noise
from qkernels.nn import (
    DorefaActivationFakeQuantize,
    DorefaWeightFakeQuantize,
    ErrorEMA,
    FakeQuantize,
    NoiseSpec,
    PactFakeQuantize,
    QConfig,
    QuantSpec,
    SoftRounding,
    calibrate,
    fake_quantizer,
    prepare,
)


def sample(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((6, 5, 4, 3), generator=generator, dtype=torch.float64) * 1.5


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def pact(bits: int, first: Tensor, alpha: float) -> PactFakeQuantize:
    quantizer = fake_quantizer(QuantSpec(bits, kind="pact", learned=True)).double()
    assert isinstance(quantizer, PactFakeQuantize)
    quantizer(first)
    with torch.no_grad():
        quantizer.alpha.fill_(alpha)
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pact_behind_a_relu_is_the_papers(bits: int) -> None:
    x, cotangent, alpha = sample().relu(), sample(1), 1.25
    quantizer = pact(bits, x, alpha)
    a = x.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)
    n = 2**bits - 1
    wanted = (x.clamp(0, alpha) * (n / alpha)).round() * (alpha / n)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    clipped = x > alpha
    assert 0 < clipped.sum() < x.numel()
    assert torch.equal(a.grad, torch.where(clipped, 0.0, cotangent))
    torch.testing.assert_close(
        quantizer.alpha.grad[0], cotangent[clipped].sum(), rtol=1e-12, atol=0
    )
    scale, zero_point = quantizer.qparams()
    assert int(zero_point) == 0
    torch.testing.assert_close(float(scale), alpha / n)


def test_pact_below_zero_is_our_formula() -> None:
    x, cotangent = sample(), sample(1)
    quantizer = pact(3, x, 2.8)
    z = int(quantizer.zero_point)
    assert 0 < z < 7
    assert z == int(qkernels.quant_range(x, bits=3).zero_point)
    a = x.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)

    b, alpha = x.clone().requires_grad_(), torch.tensor(2.8, dtype=x.dtype, requires_grad=True)
    low, high = -z / 7 * alpha, (7 - z) / 7 * alpha
    kept = torch.where(b > high, high, torch.where(b < low, low, b))
    step = alpha.detach() / 7
    wanted = straight(kept, (kept / step).round() * step)
    wanted.backward(cotangent)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.alpha.grad[0], alpha.grad, rtol=1e-12, atol=0)


def test_pact_starts_as_wide_as_the_first_batch_and_stays_positive() -> None:
    x = sample().float()
    quantizer = fake_quantizer(QuantSpec(4, kind="pact", learned=True))
    quantizer(x)
    scale, zero_point = qkernels.quant_range(x, bits=4)
    torch.testing.assert_close(quantizer.alpha.detach()[0], 15 * scale)
    assert int(quantizer.zero_point) == int(zero_point)
    plus = quantizer(x)
    with torch.no_grad():
        quantizer.alpha.neg_()
    assert torch.equal(quantizer(x), plus)
    with torch.no_grad():
        quantizer.alpha.zero_()
    assert quantizer(x).isfinite().all() and quantizer.qparams().scale > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pact_clips_and_learns_in_half_precision(dtype: torch.dtype) -> None:
    """alpha rounded to bf16 would lie half a code beyond the range at 8 bits."""
    x = sample().relu().to(dtype).requires_grad_()
    quantizer = fake_quantizer(QuantSpec(8, kind="pact", learned=True))
    quantizer(x.detach())
    with torch.no_grad():
        quantizer.alpha.fill_(1.2345)
    y = quantizer(x)
    y.backward(torch.ones_like(x))
    assert y.dtype is dtype and quantizer.alpha.dtype is torch.float32
    assert quantizer.alpha.grad.item() == float((x.detach().float() > 1.2345).sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights_are_the_formula(bits: int) -> None:
    w, cotangent, n = 0.3 * sample(), sample(1), 2**bits - 1
    quantizer = fake_quantizer(QuantSpec(bits, kind="dorefa_weight"))
    assert isinstance(quantizer, DorefaWeightFakeQuantize)
    a = w.clone().requires_grad_()
    y = quantizer(a)
    y.backward(cotangent)

    b = w.clone().requires_grad_()
    largest = b.tanh().abs().max()
    u = b.tanh() / (2 * largest) + 0.5
    paper = 2 * straight(u, (u * n).round() / n) - 1
    wanted = paper * largest.detach()
    wanted.backward(cotangent)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert len(y.unique()) <= n + 1
    # near the weights they come from, where the paper's own lie in [-1, 1]
    assert paper.abs().max() == 1
    assert (y - w).abs().max() < 0.75 * largest / n + (w - w.tanh()).abs().max()


def test_one_bit_dorefa_weights_are_sign_times_mean() -> None:
    w = sample().float()
    y = fake_quantizer(QuantSpec(1, kind="dorefa_weight"))(w)
    torch.testing.assert_close(y, w.sign() * w.abs().mean())


@pytest.mark.parametrize("shape", [(0, 3), (4, 3)])
def test_dorefa_weights_without_size(shape: tuple[int, ...]) -> None:
    w = torch.zeros(shape, requires_grad=True)
    y = fake_quantizer(QuantSpec(4, kind="dorefa_weight"))(w)
    y.backward(torch.ones_like(y))
    assert y.shape == shape and y.abs().sum() < 1e-30 and w.grad.isfinite().all()


def test_dorefa_weights_have_no_zero_point() -> None:
    with pytest.raises(ValueError, match="kind must be one with a zero point, got dorefa_weight"):
        fake_quantizer(QuantSpec(4, kind="dorefa_weight")).qparams()


def activation(bits: int) -> FakeQuantize:
    quantizer = fake_quantizer(QuantSpec(bits, kind="dorefa_activation", clip="value"))
    assert isinstance(quantizer, DorefaActivationFakeQuantize)
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_activations_are_the_formula(bits: int) -> None:
    x, cotangent, n = sample().relu(), sample(1), 2**bits - 1
    a = x.clone().requires_grad_()
    y = activation(bits).double()(a)
    y.backward(cotangent)
    torch.testing.assert_close(y, (x.clamp(0, 1) * n).round() / n, rtol=1e-12, atol=1e-12)
    assert torch.equal(a.grad, torch.where(x <= 1, cotangent, 0.0))


def test_dorefa_activations_below_zero() -> None:
    x = sample().float()
    quantizer = activation(4)
    quantizer(x.relu())
    assert quantizer.range.tolist() == [0, 1]
    quantizer(x)  # the first batch decides
    assert quantizer.range.tolist() == [0, 1]
    quantizer.reset()
    y = quantizer(x)
    assert quantizer.range.tolist() == [-1, 1]
    scale, zero_point = qkernels.qparams(torch.tensor([-1.0, 1.0]), bits=4)
    assert torch.equal(y, qkernels.fake_quant(x, scale, zero_point, bits=4, clip="value"))
    assert torch.equal(quantizer.eval()(torch.zeros(3)), torch.zeros(3))
    assert 2 * float(scale) > float(y.max() - 1) >= -float(scale)


def test_a_bad_first_batch_is_passed_over() -> None:
    good = torch.tensor([0.25, 0.75, 1.5])
    for bad in (float("nan"), float("inf")):
        clipped, pact = activation(4), fake_quantizer(QuantSpec(4, kind="pact", learned=True))
        for quantizer in (clipped, pact):
            quantizer(torch.tensor([-0.5, bad]))
        assert torch.equal(clipped.range, torch.tensor([0.0, 1.0]))
        assert torch.equal(pact.alpha, torch.ones(1)) and int(pact.zero_point) == 0
        for quantizer in (clipped, pact):
            wanted = (good.clamp(0, 1) * 15).round() / 15
            torch.testing.assert_close(quantizer(good), wanted)
            torch.testing.assert_close(quantizer.eval()(good), wanted)
    assert activation(4).measure(torch.tensor([-1.0, float("nan")])).isnan().all()


def test_a_dorefa_range_starts_anew() -> None:
    quantizer = activation(4)
    quantizer(sample())
    assert quantizer.range.tolist() == [-1, 1]
    quantizer.reset()
    quantizer(torch.tensor([-0.5, float("nan")]))
    assert quantizer.range.tolist() == [0, 1]


CONFIGS = {
    "lsq+": QConfig.lsq_plus(3, 3, first_last_bits=None),
    "pact": QConfig.pact(3, 3, first_last_bits=None),
    "dorefa": QConfig.dorefa(3, 3, first_last_bits=None),
    "quant-noise": QConfig.quant_noise(3, 3, first_last_bits=None),
    "qdrop": QConfig.qdrop(3, 3, first_last_bits=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_keeps_what_is_learned_wide(config: QConfig) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = prepare(net, config, noise=Noise(0))
    x = torch.randn(32, 8)
    calibrate(model, [x])
    exact = model.eval()(x).detach()
    halved = copy.deepcopy(model).bfloat16().train()
    y = halved(x.bfloat16())
    y.square().mean().backward()
    assert y.dtype is torch.bfloat16
    for name, p in halved.named_parameters():
        assert p.grad.isfinite().all(), name
        wide = "fake_quant" in name
        assert p.dtype is p.grad.dtype is (torch.float32 if wide else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x).float().detach()
    # bf16 moves a few elements over a rounding edge, no more
    assert (cast - exact).square().mean() < 0.1 * exact.square().mean()


BAD = [
    ({"kind": "soft"}, "kind must be one of plain, pact, .*, got 'soft'"),
    ({"kind": "pact"}, "learned must be True for kind pact, got False"),
    ({"kind": "pact", "learned": True, "axis": 0}, "axis must be None for kind pact, got 0"),
    ({"kind": "pact", "learned": True, "symmetric": True}, "symmetric must be False for kind pact"),
    ({"kind": "dorefa_weight", "axis": 0}, "axis must be None for kind dorefa_weight, got 0"),
    ({"kind": "dorefa_activation", "ema": 0.9}, "ema must be None for kind dorefa_activation"),
    ({"kind": "quant_noise", "learned": True}, "learned must be False for kind quant_noise"),
    ({"learned_zero_point": True}, "learned_zero_point must be False unless learned"),
    (
        {"learned_zero_point": True, "learned": True, "symmetric": True},
        "learned_zero_point must be False unless learned and not symmetric, got True",
    ),
    ({"p": 0.5}, r"p must be 1 unless kind is quant_noise or qdrop, got 0\.5"),
    ({"kind": "qdrop", "p": 1.5}, r"p must be in \[0, 1\], got 1\.5"),
    ({"kind": "qdrop", "p": float("nan")}, "p must be .*, got nan"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_specs_that_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"QuantSpec: {text}"):
        QuantSpec(4, **options)


def test_a_class_takes_its_own_kind() -> None:
    with pytest.raises(ValueError, match="FakeQuantize: spec must be of kind plain, got pact"):
        FakeQuantize(QuantSpec(4, kind="pact", learned=True))
    with pytest.raises(TypeError, match="fake_quantizer: spec must be a QuantSpec, got 4"):
        fake_quantizer(4)
    with pytest.raises(TypeError, match="QuantSpec: p must be a number"):
        QuantSpec(4, kind="qdrop", p="half")


NOT_PLAIN = [
    QuantSpec(4, kind="pact", learned=True),
    QuantSpec(4, kind="dorefa_weight"),
    QuantSpec(4, kind="dorefa_activation"),
]
TAKERS = {
    "NoiseSpec: quant": lambda spec: NoiseSpec("uniform", spec),
    "ErrorEMA: spec": ErrorEMA,
    "SoftRounding: spec": lambda spec: SoftRounding(torch.ones(3), torch.ones(()), None, spec),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_for_plain_quantization_refuses_the_others(taker: str) -> None:
    for spec in NOT_PLAIN:
        with pytest.raises(ValueError, match=f"^{taker} must be of kind plain, got {spec.kind}$"):
            TAKERS[taker](spec)
    for kind in ("quant_noise", "qdrop"):
        assert TAKERS[taker](QuantSpec(4, kind=kind, p=0.5))
