"""FakeQuantize alone: running ranges, learned scales, dtypes, state."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels.nn import FakeQuantize, QuantSpec, fake_quantizer

LSQ: dict[str, Any] = {"learned": True, "method": "lsq", "clip": "value"}


def batches(count: int = 6, shape: tuple[int, ...] = (8, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (i + 1) + 0.3 for i in range(count)]


def seen(xs: list[Tensor], spec: QuantSpec, channels: int = 1) -> FakeQuantize:
    quantizer = FakeQuantize(spec, channels)
    for x in xs:
        quantizer(x)
    return quantizer


def test_running_range_is_a_plain_loop() -> None:
    lo = hi = None
    quantizer = FakeQuantize(QuantSpec(4, ema=0.9))
    for x in batches():
        a, b = min(x.flatten().tolist()), max(x.flatten().tolist())
        lo, hi = (a, b) if lo is None else (0.9 * lo + 0.1 * a, 0.9 * hi + 0.1 * b)
        y = quantizer(x)
        torch.testing.assert_close(quantizer.range, torch.tensor([lo, hi]), rtol=1e-6, atol=1e-6)
        scale, zero_point = qkernels.qparams(quantizer.range, bits=4)
        assert torch.equal(y, qkernels.fake_quant(x, scale, zero_point, bits=4))
    assert int(quantizer.initialized) == 1


@pytest.mark.parametrize(
    ("method", "percentile"), [("minmax", None), ("percentile", 90.0), ("mse", None)]
)
def test_running_range_per_channel_and_method(method: str, percentile: float | None) -> None:
    spec = QuantSpec(3, axis=1, symmetric=True, method=method, percentile=percentile, ema=0.5)
    quantizer = FakeQuantize(spec, channels=5)
    expected = None
    how = {"bits": 3, "axis": 1, "symmetric": True, "method": method, "percentile": percentile}
    for x in batches(4):
        observed = qkernels.observe_range(x, **how)[2].double()
        expected = observed if expected is None else 0.5 * expected + 0.5 * observed
        quantizer(x)
        assert quantizer.range.shape == (2, 5)
        torch.testing.assert_close(quantizer.range.double(), expected, rtol=1e-6, atol=1e-6)


def test_eval_changes_nothing_and_quantizes_with_the_range() -> None:
    xs = batches()
    quantizer = seen(xs[:3], QuantSpec(4, ema=0.9)).eval()
    before = quantizer.range.clone()
    y = quantizer(xs[5])
    assert torch.equal(quantizer.range, before)
    scale, zero_point = quantizer.qparams()
    assert torch.equal(y, qkernels.fake_quant(xs[5], scale, zero_point, bits=4))


def test_observer_and_fake_quant_switches() -> None:
    xs = batches()
    quantizer = seen(xs[:2], QuantSpec(2, ema=0.9))
    before = quantizer.range.clone()
    quantizer.observer_enabled = False
    assert not torch.equal(quantizer(xs[2]), xs[2])
    assert torch.equal(quantizer.range, before)
    quantizer.observer_enabled, quantizer.fake_quant_enabled = True, False
    assert quantizer(xs[2]) is xs[2]
    assert not torch.equal(quantizer.range, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_batch_does_not_spoil_the_running_range(bad: float) -> None:
    xs = batches(3)
    quantizer = seen(xs[:1], QuantSpec(4, ema=0.9))
    x = xs[1].clone()
    x[0, 0] = bad
    quantizer(x)
    assert quantizer.range.isfinite().all()
    quantizer(xs[2])
    assert quantizer.range.isfinite().all()


def test_a_bad_first_batch_is_passed_over() -> None:
    xs = batches(2)
    running, learned = FakeQuantize(QuantSpec(4, ema=0.9)), FakeQuantize(QuantSpec(4, **LSQ))
    for quantizer in (running, learned):
        quantizer(torch.full((3,), float("nan")))
    assert torch.equal(running.range, torch.zeros(2))
    assert torch.equal(learned.scale, torch.ones(1))
    running(xs[0])
    torch.testing.assert_close(running.range, torch.stack(xs[0].aminmax()), rtol=0, atol=0)


def test_empty_input_moves_nothing() -> None:
    quantizer = seen(batches(2), QuantSpec(4, ema=0.9))
    before = quantizer.range.clone()
    assert quantizer(torch.empty(0, 5)).shape == (0, 5)
    assert torch.equal(quantizer.range, before)


FIRST = {
    "running": QuantSpec(4, ema=0.9),
    "lsq": QuantSpec(4, **LSQ),
    "lsq+": QuantSpec(4, learned_zero_point=True, **LSQ),
    "pact": QuantSpec(4, kind="pact", learned=True),
    "dorefa": QuantSpec(4, kind="dorefa_activation"),
}


@pytest.mark.parametrize("spec", FIRST.values(), ids=FIRST)
def test_an_empty_first_batch_is_passed_over(spec: QuantSpec) -> None:
    x = batches(1)[0]
    late, plain = fake_quantizer(spec), fake_quantizer(spec)
    assert late(torch.empty(0, 5)).shape == (0, 5)
    with pytest.raises(RuntimeError, match="range must be set"):
        late.qparams()
    assert torch.equal(late(x), plain(x))
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in late.state_dict().items())


def test_dynamic_is_one_fake_quant_and_keeps_nothing() -> None:
    x = batches(1)[0]
    quantizer = FakeQuantize(QuantSpec(3, axis=1, method="mse"), channels=5)
    assert torch.equal(quantizer(x), qkernels.fake_quant(x, bits=3, axis=1, method="mse"))
    assert not quantizer.state_dict()
    with pytest.raises(ValueError, match="FakeQuantize: range must be running or learned"):
        quantizer.qparams()


@pytest.mark.parametrize("symmetric", [True, False])
def test_first_value_of_a_learned_scale(symmetric: bool) -> None:
    x, other = batches(2)
    spec = QuantSpec(4, axis=1, symmetric=symmetric, **LSQ)
    quantizer = seen([x], spec, channels=5)
    scale, zero_point = qkernels.quant_range(x, bits=4, axis=1, symmetric=symmetric, method="lsq")
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.qparams().zero_point, zero_point)
    quantizer(other)
    assert torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("axis", [None, 1])
def test_lsq_gradient_is_fake_quants(axis: int | None) -> None:
    x = batches(1)[0]
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantizer = seen([x], QuantSpec(2, axis=axis, **LSQ), channels=1 if axis is None else 5)
    a = x.clone().requires_grad_()
    quantizer(a).backward(cotangent)

    b = x.clone().requires_grad_()
    scale, zero_point = qkernels.quant_range(x, bits=2, axis=axis, method="lsq")
    scale.requires_grad_()
    y = qkernels.fake_quant(b, scale, zero_point, bits=2, axis=axis, clip="value")
    y.backward(cotangent)
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(quantizer.scale.grad.flatten(), scale.grad.flatten())
    assert quantizer.scale.grad.abs().min() > 0


def test_a_scale_that_went_negative_or_to_zero_stays_usable() -> None:
    x = batches(1)[0]
    quantizer = seen([x], QuantSpec(4, **LSQ))
    plus = quantizer(x)
    plus.square().sum().backward()
    gradient = quantizer.scale.grad.clone()
    quantizer.scale.grad = None
    with torch.no_grad():
        quantizer.scale.neg_()
    minus = quantizer(x)
    minus.square().sum().backward()
    assert torch.equal(minus, plus)
    assert torch.equal(quantizer.scale.grad, -gradient)
    assert quantizer.qparams().scale > 0
    with torch.no_grad():
        quantizer.scale.zero_()
    y = quantizer(x)
    assert y.isfinite().all()
    assert quantizer.qparams().scale == torch.finfo(torch.float32).tiny


def test_use_before_a_range_is_an_error() -> None:
    x = batches(1)[0]
    for spec in (QuantSpec(4, ema=0.9), QuantSpec(4, **LSQ)):
        quantizer = FakeQuantize(spec).eval()
        quantizer.label = "conv.input_fake_quant"
        text = r"FakeQuantize 'conv.input_fake_quant': range must be set by calibrate\(\)"
        with pytest.raises(RuntimeError, match=text):
            quantizer(x)
        with pytest.raises(RuntimeError, match="got no observation"):
            quantizer.qparams()
        quantizer.train()(x)
        assert quantizer.eval()(x).shape == x.shape
        quantizer.reset()
        with pytest.raises(RuntimeError, match="got no observation"):
            quantizer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", [QuantSpec(4, ema=0.9), QuantSpec(4, **LSQ)])
def test_casts_keep_the_state_wide(spec: QuantSpec, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    quantizer = FakeQuantize(spec).to(dtype)
    for x in batches(3):
        half = x.to(dtype).requires_grad_()
        y = quantizer(half)
        y.sum().backward()
        assert y.dtype is dtype and half.grad.dtype is dtype
    kept = quantizer.range if spec.ema else quantizer.scale
    assert kept.dtype is wide
    if spec.learned:
        assert quantizer.scale.grad.dtype is wide
        assert quantizer.scale.grad.isfinite().all()


def test_state_survives_copy_pickle_and_state_dict() -> None:
    xs = batches()
    for spec in (QuantSpec(4, ema=0.9), QuantSpec(4, **LSQ)):
        quantizer = seen(xs[:3], spec)
        stream = io.BytesIO()
        torch.save(quantizer, stream)
        stream.seek(0)
        loaded = FakeQuantize(spec)
        loaded.load_state_dict(quantizer.state_dict())
        copies = [
            copy.deepcopy(quantizer),
            pickle.loads(pickle.dumps(quantizer)),
            torch.load(stream, weights_only=False),
            loaded,
        ]
        expected = quantizer.eval()(xs[4])
        for other in copies:
            assert other.spec == spec
            assert torch.equal(other.eval()(xs[4]), expected)


def test_an_average_of_models_needs_only_the_buffers() -> None:
    """SWA and EMA tools copy tensors into a copy that was made before the first step."""
    xs = batches(3)
    quantizer = FakeQuantize(QuantSpec(4, ema=0.9))
    average = copy.deepcopy(quantizer)
    for x in xs:
        quantizer(x)
    for mine, theirs in zip(average.buffers(), quantizer.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(average.eval()(xs[0]), quantizer.eval()(xs[0]))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="FakeQuantize: spec must be a QuantSpec, got 4"):
        FakeQuantize(4)
    with pytest.raises(ValueError, match="channels must be an int of at least 0, got -1"):
        FakeQuantize(QuantSpec(4, axis=0), -1)
    with pytest.raises(ValueError, match="channels must be 1 without axis, got 3"):
        FakeQuantize(QuantSpec(4), 3)
    with pytest.raises(TypeError, match="x must be float32"):
        FakeQuantize(QuantSpec(4))(torch.ones(3, dtype=torch.int32))


def test_repr_tells_the_kind() -> None:
    text = repr(FakeQuantize(QuantSpec(4, ema=0.9)))
    assert text == "FakeQuantize(4 bits, affine, per tensor, minmax, running range, ema=0.9)"
    text = repr(FakeQuantize(QuantSpec(2, axis=0, symmetric=True, **LSQ), 8))
    assert text == "FakeQuantize(2 bits, symmetric, axis=0, lsq, learned scale)"
    assert "group_size=8" in repr(FakeQuantize(QuantSpec(2, group_size=8)))
