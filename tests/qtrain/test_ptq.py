"""Post-training quantization: configs, calibration images, what it leaves alone, the sweep."""

import copy
from dataclasses import replace

import pytest
import torch
from qtrain import ptq
from qtrain.adaround import AdaRound
from qtrain.data import load_dataset
from qtrain.demo import DemoConfig
from qtrain.loop import evaluate, train
from qtrain.progress import Track
from qtrain.ptq import (
    calibration_images,
    keep_weight_ranges,
    ptq_qconfig,
    quantize_after_training,
    sweep,
)
from qtrain.qat import calibration_batches
from qtrain.recipe import Recipe, TrainConfig
from torch import nn

from qkernels.nn import QConfig, QuantLayer, QuantSpec, fold_batchnorm

CONFIG_3 = replace(DemoConfig.usual().float_run, epochs=3)
FEW = AdaRound(iterations=30, lr=0.05)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    with Track(1, "", quiet=True) as track:
        out = tmp_path_factory.mktemp("runs") / "float"
        return train(CONFIG_3, Recipe(), out, cpu=True, track=track)


@pytest.fixture(scope="module")
def batches(data):
    return calibration_images(data, CONFIG_3, 128)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def test_qconfig_by_side():
    config = ptq_qconfig(
        "minmax", 4, 6, weight_method="mse", activation_method="percentile", percentile=99.5
    )
    assert (config.weight.method, config.weight.percentile) == ("mse", None)
    assert (config.activation.method, config.activation.percentile) == ("percentile", 99.5)
    assert (config.weight.bits, config.activation.bits) == (4, 6)
    assert config.weight.symmetric and config.weight.axis == 0
    assert not config.activation.symmetric and config.activation.axis is None
    assert ptq_qconfig("percentile", 4, 4).activation.percentile is None
    assert ptq_qconfig("mse", 4, None).activation is None


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("lsq", {}, "method must be one of minmax, percentile, mse, got 'lsq'"),
        ("mse", {"weight_method": "max"}, "weight_method must be one of .* got 'max'"),
        ("mse", {"activation_method": "x"}, "activation_method must be one of .* got 'x'"),
        ("mse", {"percentile": 99.0}, "percentile must be None unless a method is percentile"),
        ("percentile", {"percentile": 50.0}, r"percentile must be in \(50, 100\], got 50.0"),
        ("mse", {"first_last_bits": 17}, r"first_last_bits must be in 1\.\.16 or None, got 17"),
    ],
)
def test_bad_qconfigs(method, options, text):
    with pytest.raises(ValueError, match=text):
        ptq_qconfig(method, 4, 4, **options)


@pytest.mark.parametrize(("method", "percentile"), [("minmax", None), ("percentile", 90.0)])
def test_kept_ranges_are_those_of_the_weight(float_run, batches, method, percentile):
    dynamic = QuantSpec(3, axis=0, symmetric=True, method=method, percentile=percentile)
    config = ptq_qconfig(method, 3, 4, percentile=percentile, first_last_bits=None)
    assert keep_weight_ranges(replace(config, weight=dynamic)) == config
    x = batches[0][0]
    outs = [
        quantize_after_training(float_run.model, replace(config, weight=spec), batches)(x)
        for spec in (dynamic, config.weight)
    ]
    assert torch.equal(*outs)
    other = {"head": QConfig.minmax(3, 3), "features.*": None}
    kept = keep_weight_ranges(QConfig.lsq(2, 2, overrides=other))
    assert kept.weight.learned and kept.overrides["features.*"] is None
    assert kept.overrides["head"].weight.ema == 0.0
    rule = keep_weight_ranges(QConfig(replace(dynamic, method="lsq", percentile=None), None))
    assert rule.weight.learned and rule.weight.ema is None


@pytest.mark.parametrize("rounding", ["nearest", FEW], ids=["nearest", "adaround"])
@pytest.mark.parametrize("fold", [True, False])
def test_biases_stay_float_and_the_model_as_it_was(float_run, batches, fold, rounding):
    model = float_run.model
    before = copy.deepcopy(model.state_dict())
    model.train()
    try:
        quantized = quantize_after_training(
            model, ptq_qconfig("mse", 2, 2), batches, fold=fold, rounding=rounding
        )
        assert all(m.training for m in model.modules())
    finally:
        model.eval()
    assert not any(m.training for m in quantized.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    reference = fold_batchnorm(model) if fold else model
    found = 0
    for name, layer in layers_of(quantized).items():
        twin = reference.get_submodule(name)
        assert (layer.bias is None) == (twin.bias is None) == (not fold and name != "head")
        if layer.bias is not None:
            assert torch.equal(layer.bias, twin.bias)
            found += 1
        assert torch.equal(layer.weight, twin.weight) == (rounding == "nearest")
    assert found == (9 if fold else 1)
    norms = [m for m in quantized.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (0 if fold else 8)


@pytest.mark.parametrize("first_last_bits", [8, 5, None])
def test_first_and_last_layer(float_run, batches, first_last_bits):
    config = ptq_qconfig("minmax", 2, 3, first_last_bits=first_last_bits)
    layers = list(layers_of(quantize_after_training(float_run.model, config, batches)).values())
    bits = [(m.weight_fake_quant.spec.bits, m.input_fake_quant.spec.bits) for m in layers]
    ends = (2, 3) if first_last_bits is None else (first_last_bits, first_last_bits)
    assert bits == [ends, *[(2, 3)] * 7, ends]


def test_calibration_images(data):
    config = TrainConfig(seed=3)
    hundred = calibration_images(data, config, 100, 64)
    assert [len(y) for _, y in hundred] == [64, 36]
    assert [len(y) for _, y in calibration_images(data, config, 5, 64)] == [5]
    assert [len(y) for _, y in calibration_images(data, config, 128)] == [64, 64]
    x = torch.cat([x for x, _ in hundred])
    assert len(x.flatten(1).unique(dim=0)) > 95  # the set itself has a few twins
    few = torch.cat([x for x, _ in calibration_images(data, config, 30, 7)])
    assert torch.equal(few, x[:30])
    assert not torch.equal(few, calibration_images(data, TrainConfig(seed=4), 30)[0][0])
    # the very ones that QAT calibrates on
    theirs = calibration_batches(data, config, 2)
    both = zip(theirs, calibration_images(data, config, 128), strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in both)
    every = torch.cat([y for _, y in calibration_images(data, config, 1297)])
    assert torch.equal(every.sort().values, data.train.y.sort().values)
    text = "calibration: images must be at most the 1297 training examples, got 1298"
    with pytest.raises(ValueError, match=text):
        calibration_images(data, config, 1298)
    with pytest.raises(ValueError, match="calibration: images must be at least 1, got 0"):
        calibration_images(data, config, 0)
    with pytest.raises(ValueError, match="calibration: batch_size must be at least 1, got 0"):
        calibration_images(data, config, 1, 0)


def test_rounding_by_name(float_run, batches):
    assert ptq.as_rounding("nearest") is None and ptq.as_rounding("adaround") == AdaRound()
    assert ptq.as_rounding(FEW) is FEW
    with pytest.raises(ValueError, match="rounding must be one of nearest, adaround, got 'up'"):
        quantize_after_training(float_run.model, QConfig.minmax(2, 2), batches, rounding="up")
    # a config with dynamic ranges, as it comes
    model = quantize_after_training(
        float_run.model, QConfig.minmax(2, 2), batches, rounding=FEW, seed=5
    )
    weight = model.head.weight
    with torch.no_grad():
        assert torch.equal(model.head.weight_fake_quant(weight), weight)


def test_sweep(float_run, data, batches, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ptq, "calibrate", lambda m, b, real=ptq.calibrate: (calls.append(m), real(m, b))
    )
    with Track(99, "", quiet=True) as track:
        rows = sweep(
            float_run.model,
            data.test,
            batches,
            bits=((4, 4), (2, 3)),
            methods=("minmax", "percentile", "mse"),
            adaround=AdaRound(iterations=100),
            percentile=99.0,
            track=track,
        )
    names = [f"PTQ {m}{f}" for f in ("", ", unfolded") for m in ("minmax", "percentile", "mse")]
    names.append("AdaRound mse")
    assert [(r.method, r.bits) for r in rows] == [(n, b) for b in ((4, 4), (2, 3)) for n in names]
    assert track.done == 14
    # mse depends on the bits, the others do not: 2 x 2 and 3 x 2
    assert len(calls) == 10
    table = {(row.method, row.bits): row for row in rows}
    for name, method, fold in (
        ("PTQ minmax", "minmax", True),
        ("PTQ percentile, unfolded", "percentile", False),
        ("PTQ mse", "mse", True),
    ):
        config = ptq_qconfig(method, 2, 3, percentile=99.0 if method == "percentile" else None)
        model = quantize_after_training(float_run.model, config, batches, fold=fold)
        scores = evaluate(model, data.test)
        row = table[name, (2, 3)]
        assert (row.loss, row.accuracy) == (scores["test_loss"], scores["test_accuracy"])
    assert len({row.loss for row in rows if "unfolded" not in row.method}) == 8
    # ranges per channel go with the channel's factor that folding multiplies in (with minmax the
    # largest weight lies on a tie, which the factor's rounding error breaks either way)
    folded, unfolded = (table[f"PTQ percentile{tail}", (2, 3)] for tail in ("", ", unfolded"))
    assert unfolded.loss == pytest.approx(folded.loss, rel=0.02)
    assert table["AdaRound mse", (2, 3)].loss < 0.7 * table["PTQ mse", (2, 3)].loss


def test_sweep_in_part(float_run, data, batches):
    def score(model):
        return {"test_loss": float(len(layers_of(model))), "test_accuracy": 0.5}

    with Track(9, "", quiet=True) as track:
        how = {"bits": ((2, 2),), "folds": (False,), "track": track}
        rows = sweep(float_run.model, score, batches, methods=("mse",), adaround=FEW, **how)
        assert [r.method for r in rows] == ["PTQ mse, unfolded", "AdaRound mse, unfolded"]
        assert {(r.loss, r.accuracy) for r in rows} == {(9.0, 0.5)}
        with pytest.raises(ValueError, match=r"method must be one of .* got 'lsq'"):
            sweep(float_run.model, score, batches, methods=("minmax", "lsq"), **how)
        with pytest.raises(ValueError, match="folds must be True, False or both, got none"):
            sweep(float_run.model, score, batches, **{**how, "folds": ()})
        assert track.done == 2
        twice = [
            sweep(float_run.model, data.test, batches, methods=(), adaround=FEW, seed=s, **how)
            for s in (0, 0, 7)
        ]
        assert twice[0] == twice[1] != twice[2]
