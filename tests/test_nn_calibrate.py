"""calibrate: what it sets, from what, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels.nn import FakeQuantize, QConfig, QuantSpec, calibrate, prepare


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, generator=generator) * (i + 1) for i in range(count)]


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """The input of the last layer of the float model, in eval mode."""
    return model.eval()[:3](x)


@torch.no_grad()
def test_minmax_takes_the_widest_range_of_the_float_model() -> None:
    float_model, model = net(), prepare(net(), QConfig.minmax(2, 2))
    calibrate(model, batches())
    for quantizer, xs in (
        (model[0].input_fake_quant, batches()),
        (model[3].input_fake_quant, [hidden(float_model, x) for x in batches()]),
    ):
        every = torch.cat(xs)
        assert torch.equal(quantizer.range, torch.stack(every.aminmax()))


@torch.no_grad()
@pytest.mark.parametrize(("method", "percentile"), [("percentile", 80.0), ("mse", None)])
def test_other_methods_take_the_mean(method: str, percentile: float | None) -> None:
    config = QConfig.minmax(4, 4, first_last_bits=None)
    spec = replace(config.activation, method=method, percentile=percentile)
    model = prepare(net(), replace(config, activation=spec))
    calibrate(model, batches())
    bounds = [
        qkernels.observe_range(x, bits=4, method=method, percentile=percentile)[2]
        for x in batches()
    ]
    expected = torch.stack(bounds).mean(0)
    torch.testing.assert_close(model[0].input_fake_quant.range, expected)


@torch.no_grad()
def test_learned_scales_take_the_mean_scale() -> None:
    float_model, model = net(), prepare(net(), QConfig.lsq(2, 2, first_last_bits=None))
    calibrate(model, batches())
    xs = [hidden(float_model, x) for x in batches()]
    scales = [qkernels.quant_range(x, bits=2, method="lsq").scale for x in xs]
    torch.testing.assert_close(model[3].input_fake_quant.scale[0], torch.stack(scales).mean())
    assert int(model[3].input_fake_quant.zero_point) == 0
    ranges = [qkernels.observe_range(x, bits=2)[2] for x in batches()]
    zero_point = qkernels.qparams(torch.stack(ranges).mean(0), bits=2).zero_point
    assert torch.equal(model[0].input_fake_quant.zero_point, zero_point)


def test_learned_weight_scales_start_anew() -> None:
    model = prepare(net(), QConfig.lsq(4, 4))
    with torch.no_grad():
        model[0].weight.mul_(3)
    calibrate(model, batches())
    scale = qkernels.quant_range(
        model[0].weight, bits=8, axis=0, symmetric=True, method="lsq"
    ).scale
    assert torch.equal(model[0].weight_fake_quant.scale, scale)


def test_modes_switches_and_gradients_are_as_before() -> None:
    model = prepare(net(), QConfig.minmax(4, 4)).train()
    model[2].eval()
    model[3].weight_fake_quant.fake_quant_enabled = False
    state = [m.training for m in model.modules()]
    calibrate(model, batches())
    assert [m.training for m in model.modules()] == state
    assert not model[3].weight_fake_quant.fake_quant_enabled
    assert model[0].weight_fake_quant.fake_quant_enabled
    assert all(p.grad is None for p in model.parameters())
    # dropout was off: the same again gives the same
    first = model[3].input_fake_quant.range.clone()
    calibrate(model, batches())
    assert torch.equal(model[3].input_fake_quant.range, first)


def test_batches_and_forms_of_a_batch() -> None:
    x = batches()
    expected = None
    label = torch.zeros(5)
    for loader in (
        x[:2],
        [(b, label) for b in x[:2]],
        [[b] for b in x[:2]],
        [{"x": b, "y": label} for b in x[:2]],
    ):
        model = prepare(net(), QConfig.minmax(4, 4))
        calibrate(model, loader)
        found = model[3].input_fake_quant.range
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    model = prepare(net(), QConfig.minmax(4, 4))
    taken = iter(x)
    calibrate(model, taken, batches=2)
    assert torch.equal(model[3].input_fake_quant.range, expected)
    assert torch.equal(next(taken), x[2])  # no batch is drawn and thrown away
    calibrate(model, [{"deep": {"x": b}} for b in x[:2]], forward=lambda m, b: m(b["deep"]["x"]))
    assert torch.equal(model[3].input_fake_quant.range, expected)


def test_training_goes_on_from_the_calibrated_range() -> None:
    model = prepare(net(), QConfig.minmax(4, 4))
    xs = batches()
    calibrate(model, xs[:1])
    model.train()(xs[3])
    expected = 0.9 * torch.stack(xs[0].aminmax()) + 0.1 * torch.stack(xs[3].aminmax())
    torch.testing.assert_close(model[0].input_fake_quant.range, expected)


def test_dynamic_models_need_none() -> None:
    model = prepare(net(), QConfig(QuantSpec(4, axis=0, symmetric=True), QuantSpec(4)))
    calibrate(model, batches())
    assert list(model.state_dict()) == list(net().state_dict())


def test_a_quantizer_of_ones_own() -> None:
    model = nn.Sequential(FakeQuantize(QuantSpec(4, ema=0.9)), nn.ReLU())
    calibrate(model, batches())
    assert torch.equal(model[0].range, torch.stack(torch.cat(batches()).aminmax()))


def test_a_layer_that_never_runs_keeps_what_it_had(caplog: pytest.LogCaptureFixture) -> None:
    model = prepare(net(), QConfig.minmax(4, 4))
    calibrate(model, batches(), forward=lambda m, x: m[0](x))
    assert "3.input_fake_quant saw no input" in caplog.text
    assert int(model[0].input_fake_quant.initialized) == 1
    assert int(model[3].input_fake_quant.initialized) == 0


def poisoned() -> Iterator[Tensor]:
    yield from batches(1)
    yield torch.full((5, 4), float("nan"))


def broken() -> Iterator[Tensor]:
    yield from batches(1)
    raise OSError("the disk is gone")


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "calibrate: loader must yield at least one batch, got none"),
    (batches(), {"batches": 0}, ValueError, "batches must be a positive int or None, got 0"),
    (batches(), {"batches": 1.5}, ValueError, "batches must be a positive int or None, got 1.5"),
    (torch.zeros(4, 3), {}, TypeError, "loader must be an iterable of batches, got a Tensor"),
    ([3], {}, TypeError, "loader must yield a Tensor, or .* got int"),
    ([()], {}, TypeError, "loader must yield a Tensor, or .* got NoneType"),
    (poisoned(), {}, ValueError, "inputs must be finite, got NaN or inf at '0.input_fake_quant'"),
    (broken(), {}, OSError, "the disk is gone"),
]


@pytest.mark.parametrize(("loader", "options", "error", "text"), BAD)
def test_bad_input_writes_nothing(
    loader: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = prepare(net(), QConfig.lsq(4, 4)).train()
    with torch.no_grad():
        model[0].weight_fake_quant.scale.mul_(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=text):
        calibrate(model, loader, **options)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert model.training
    x = batches(1)[0]
    assert not torch.equal(model(x), net().train()(x))  # it quantizes again


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate: model must be a prepared one, got Sequential"):
        calibrate(net(), batches())
