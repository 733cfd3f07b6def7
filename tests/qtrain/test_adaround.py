"""AdaRound: better than rounding to nearest, on the grid, and the same bits every time."""

import copy
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from qtrain.adaround import AdaRound, learn_rounding, work
from qtrain.data import load_dataset
from qtrain.demo import DemoConfig
from qtrain.loop import evaluate, train
from qtrain.progress import Track
from qtrain.ptq import calibration_images, keep_weight_ranges, ptq_qconfig
from qtrain.recipe import Recipe
from torch import nn
from torch.nn import functional as F

import qkernels
from qkernels.nn import (
    QConfig,
    QuantLayer,
    QuantSpec,
    calibrate,
    float_state_dict,
    fold_batchnorm,
    prepare,
    remove,
)

# the demo's net, which 2 bits hurt; fewer epochs
CONFIG = replace(DemoConfig.usual().float_run, epochs=6)
SHORT = AdaRound(iterations=100)
W2, W3, W2A4 = (ptq_qconfig("mse", w, a) for w, a in ((2, None), (3, None), (2, 4)))
SYMMETRIC = QuantSpec(2, axis=0, symmetric=True, ema=0.0)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("qtrain.progress.FIRST_LINE_SECONDS", 1e9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(float model with BatchNorm folded, calibration batches, test split)."""
    with Track(1, "", quiet=True) as track:
        out = tmp_path_factory.mktemp("runs") / "float"
        result = train(CONFIG, Recipe(), out, cpu=True, track=track)
    data = load_dataset("digits")
    return fold_batchnorm(result.model), calibration_images(data, CONFIG, 256), data.test


def calibrated(model, qconfig, batches):
    prepared = prepare(model, qconfig).eval()
    calibrate(prepared, batches)
    return prepared


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def images(*shape, count=48, seed=0):
    """Random, with elements that go together: where they do not, nearest is as good as any."""
    draws = torch.Generator().manual_seed(seed)
    common = torch.randn(count, *[1] * len(shape), generator=draws)
    return common + 0.4 * torch.randn(count, *shape, generator=draws)


@pytest.mark.parametrize("qconfig", [W2, W3, W2A4], ids=["W2", "W3", "W2A4"])
def test_better_than_nearest(trained, qconfig):
    model, batches, test = trained
    nearest = calibrated(model, qconfig, batches)
    rounded = copy.deepcopy(nearest)
    before = evaluate(nearest, test)
    found = learn_rounding(model, rounded, batches, AdaRound(iterations=200))
    after = evaluate(rounded, test)
    assert [each.layer for each in found] == list(layers_of(rounded))
    # 8 bits leave the first and last layer little to gain
    for each in found[1:-1]:
        assert each.error < 0.85 * each.nearest_error
    assert all(0.02 < each.moved < 0.5 for each in found[1:-1])
    assert after["test_loss"] < 0.6 * before["test_loss"]
    assert after["test_accuracy"] > before["test_accuracy"]


def test_errors_are_what_they_are_said_to_be(trained):
    """Of the third layer: its input comes from the layers rounded before it."""
    model, batches, _ = trained
    rounded = calibrated(model, W2A4, batches)
    nearest = copy.deepcopy(rounded)
    found = learn_rounding(model, rounded, batches, SHORT)
    x = torch.cat([batch[0] for batch in batches])
    with torch.no_grad():
        target = model.features[:2](x)
        theirs = rounded.features[:2](x)
        target, theirs = model.features[2][0](target), rounded.features[2][0](theirs)
        error = (theirs - target).square().sum(1).mean()
        rounded.features[2][0].weight.copy_(nearest.features[2][0].weight)
        worse = rounded.features[2][0](rounded.features[:2](x))
        nearest_error = (worse - target).square().sum(1).mean()
    assert found[2].layer == "features.2.0"
    assert found[2].error == pytest.approx(float(error), rel=1e-4)
    assert found[2].nearest_error == pytest.approx(float(nearest_error), rel=1e-4)


def test_the_weights_are_on_their_grid_for_good(trained):
    model, batches, test = trained
    rounded = calibrated(model, W2A4, batches)
    start = copy.deepcopy(rounded)
    float_before = copy.deepcopy(model.state_dict())
    learn_rounding(model, rounded, batches, SHORT)
    plain = float_state_dict(rounded)
    for name, layer in layers_of(rounded).items():
        old = start.get_submodule(name)
        params, before = layer.weight_fake_quant.qparams(), old.weight_fake_quant.qparams()
        assert torch.equal(params.scale, before.scale)
        assert not layer.training and layer.weight_fake_quant.fake_quant_enabled
        with torch.no_grad():
            # what the layer uses is what it holds
            assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
        # and each weight went to a neighbour
        options = {"bits": layer.weight_fake_quant.spec.bits, "axis": 0, "symmetric": True}
        codes, at_first = (
            qkernels.quantize(each.weight, *params, **options).int() for each in (layer, old)
        )
        assert (codes - at_first).abs().max() == 1
        assert torch.equal(plain[f"{name}.weight"], layer.weight)
        assert torch.equal(layer.bias, old.bias)
        assert layer.bias.grad is None and layer.weight.grad is None
    # the float model is as it was; a fresh prepared one takes the state
    assert all(torch.equal(v, float_before[k]) for k, v in model.state_dict().items())
    fresh = prepare(model, W2A4).eval()
    fresh.load_state_dict(rounded.state_dict())
    assert evaluate(fresh, test) == evaluate(rounded, test)
    # weights alone: the float model with these weights is the quantized one
    without = calibrated(model, W2, batches)
    learn_rounding(model, without, batches, SHORT)
    x = batches[0][0]
    assert torch.equal(remove(without)(x), without(x))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(float_state_dict(without))
    assert torch.equal(loaded(x), without(x))


def test_a_seed_names_the_bits(trained):
    model, batches, _ = trained

    def run(seed):
        prepared = calibrated(model, W2, batches)
        torch.manual_seed(17)
        before = torch.get_rng_state()
        learn_rounding(model, prepared, batches, AdaRound(iterations=20), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return prepared.state_dict()

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_modes_are_put_back_and_ranges_stay(trained):
    model, batches, _ = trained
    prepared = calibrated(model, W2A4, batches)
    ranges = [b.clone() for name, b in prepared.named_buffers() if name.endswith(".range")]
    model.train(), prepared.train()
    try:
        learn_rounding(model, prepared, batches, AdaRound(iterations=1))
        assert all(m.training for m in (*model.modules(), *prepared.modules()))
        assert not any(m._forward_pre_hooks for m in (*model.modules(), *prepared.modules()))
    finally:
        model.eval()
    after = [b for name, b in prepared.named_buffers() if name.endswith(".range")]
    assert len(after) == 18 and all(torch.equal(a, b) for a, b in zip(ranges, after, strict=True))


LAYERS = [
    (lambda: nn.Linear(24, 8), (24,)),
    (lambda: nn.Linear(24, 8, bias=False), (3, 24)),
    (lambda: nn.Conv1d(8, 6, 5, groups=2), (8, 9)),
    (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (4, 6, 6)),
    (lambda: nn.Conv3d(4, 6, 3), (4, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(8, 6, 4, stride=2), (8, 5)),
    (lambda: nn.ConvTranspose2d(8, 6, 4, groups=2), (8, 5, 5)),
    (lambda: nn.ConvTranspose2d(4, 16, 3, groups=4), (4, 5, 5)),
    (lambda: nn.ConvTranspose3d(4, 3, 2), (4, 4, 4, 4)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize(
    "spec",
    [
        SYMMETRIC,
        QuantSpec(2, ema=0.0),
        QuantSpec(2, group_size=4, symmetric=True, ema=0.0, method="mse"),
        QuantSpec(2, axis=0, symmetric=True, learned=True, method="lsq", clip="value"),
    ],
    ids=["channel", "affine", "group", "learned"],
)
def test_every_kind_of_layer(make, shape, spec):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    x = images(*shape)
    prepared = calibrated(model, QConfig(spec, None, first_last_bits=None), [x])
    (found,) = learn_rounding(model, prepared, [x[:32], x[32:]], AdaRound(iterations=150, lr=0.05))
    assert found.error < 0.9 * found.nearest_error
    weight = prepared[0].weight
    with torch.no_grad():
        assert torch.equal(prepared[0].weight_fake_quant(weight), weight)
        channels_last = isinstance(model[0], nn.Linear)
        error = (prepared(x) - model(x)).square().sum(-1 if channels_last else 1).mean()
    assert found.error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("seed", [2, 4, 6, 8, 10])
def test_near_the_best_of_all_roundings(seed):
    """Of 10 weights, so that all 1024 can be tried; where nearest is far from the best."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 1))
    x = images(10, count=64)
    prepared = calibrated(model, QConfig(SYMMETRIC, None, first_last_bits=None), [x])
    scale = prepared[0].weight_fake_quant.qparams().scale
    down = (model[0].weight.detach() / scale).floor()
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)))
    weights = (down + ways).clamp(-2, 1) * scale
    errors = ((weights - model[0].weight.detach()) @ x.T).square().mean(1)
    (found,) = learn_rounding(model, prepared, [x], AdaRound(iterations=400))
    assert found.nearest_error > 2 * errors.min()
    assert 0.999 * errors.min() < found.error < 1.1 * errors.min()


def test_no_better_than_nearest_is_nearest():
    """A single step at an absurd rate rounds at random."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 8)), images(24)
    prepared = calibrated(model, QConfig(SYMMETRIC, None, first_last_bits=None), [x])
    with torch.no_grad():
        nearest = prepared[0].weight_fake_quant(prepared[0].weight)
    (found,) = learn_rounding(model, prepared, [x], AdaRound(iterations=1, lr=1e3))
    assert found.error == found.nearest_error and found.moved == 0
    assert torch.equal(prepared[0].weight, nearest)


class Twice(nn.Module):
    """One layer that is called twice, one that never is, and a tied pair."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.never = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        first = F.relu(self.stem(x))
        x = F.relu(self.twice(first))
        # a write in place to what the layer was given
        x = self.twice(x + first.zero_())
        return self.a(x) + self.b(input=x)


def test_layers_called_twice_never_or_tied(caplog):
    torch.manual_seed(0)
    model, x = Twice(), images(6)
    prepared = calibrated(model, QConfig(SYMMETRIC, None, first_last_bits=None), [x])
    start = copy.deepcopy(prepared.state_dict())
    with caplog.at_level(logging.WARNING, "qtrain"):
        found = learn_rounding(model, prepared, [x], SHORT)
    assert [each.layer for each in found] == ["stem", "twice"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    reasons = (("a", "shares"), ("b", "shares"), ("never", "never call"))
    for line, (name, reason) in zip(lines, reasons, strict=True):
        assert f"layer {name!r} stays rounded to nearest" in line and reason in line
        assert torch.equal(prepared.state_dict()[f"{name}.weight"], start[f"{name}.weight"])
    # of both calls together; when they were watched, the layer was rounded to nearest
    before = copy.deepcopy(prepared)
    before.twice.load_state_dict({k[6:]: v for k, v in start.items() if k[:6] == "twice."})
    with torch.no_grad():
        inputs, targets = [], []
        for net, into in ((before, inputs), (model, targets)):
            first = F.relu(net.stem(x))
            into += [first, F.relu(net.twice(first))]
        ours = prepared.twice(torch.cat(inputs))
        error = (ours - model.twice(torch.cat(targets))).square().sum(1).mean()
    assert found[1].error == pytest.approx(float(error), rel=1e-4)
    assert found[1].error < found[1].nearest_error


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 2)

    def forward(self, x):
        x = self.conv(self.conv(x))
        return self.up(x, [7, 7]), self.up(x, output_size=[7, 7])


def test_calls_that_do_not_go_together_are_left(caplog):
    torch.manual_seed(0)
    model, x = Uneven(), images(2, 10, 10, count=8)
    prepared = calibrated(model, QConfig(SYMMETRIC, None, first_last_bits=None), [x])
    with caplog.at_level(logging.WARNING, "qtrain"):
        assert learn_rounding(model, prepared, [x], SHORT) == []
    for name, what in (("conv", "the shape of their inputs"), ("up", "their arguments")):
        assert f"{name!r} stays rounded to nearest: its calls differ in {what}" in caplog.text


def test_order_of_execution():
    """Registered in one order, run in another; unbatched inputs; a forward of the user's."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Conv1d(3, 8, 2)

        def forward(self, x, scale):
            return self.last(F.relu(self.first(x)).mean(-1) * scale)

    torch.manual_seed(0)
    model = Backwards()
    data = [{"x": x, "scale": 2.0} for x in images(3, 5, count=40)]
    qconfig = QConfig(SYMMETRIC, QuantSpec(8, ema=0.9), first_last_bits=None)
    prepared = prepare(model, qconfig)

    def forward(net, batch):
        return net(batch["x"], batch["scale"])

    calibrate(prepared, data, forward=forward)
    found = learn_rounding(model, prepared, data, SHORT, forward=forward)
    assert [each.layer for each in found] == ["first", "last"]
    assert all(each.error < each.nearest_error for each in found)


def test_inputs_come_from_the_quantized_model():
    """With a first layer that rounds everything to zero, the second has nothing to learn from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    prepared = calibrated(model, QConfig(SYMMETRIC, None, first_last_bits=None), [images(4)])
    prepared[0].weight_fake_quant.store(torch.tensor([[-1e-30], [1e-30]]).expand(2, 4))
    _, second = learn_rounding(model, prepared, [images(4)], AdaRound(iterations=30))
    with torch.no_grad():
        target = model(images(4)).square().sum(1).mean()
    assert second.error == second.nearest_error == pytest.approx(float(target), rel=1e-4)


def test_progress_counts_every_step(trained):
    model, batches, _ = trained
    prepared, settings = calibrated(model, W2, batches), AdaRound(iterations=2)
    track = Track(work(prepared, settings), "", quiet=True)
    learn_rounding(model, prepared, batches, settings, track=track)
    assert track.done == track.total == 18 and track.label == "AdaRound head"


def test_anneal():
    beta_at = AdaRound(iterations=100, warm_start=0.2).beta_at
    assert beta_at(19) is None and beta_at(20) == 20 and beta_at(60) == pytest.approx(11)
    assert 2 < beta_at(99) < 2.01 and AdaRound(warm_start=0.0).beta_at(0) == 20


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 1.5}, TypeError, "iterations must be a whole number, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr must be positive, got nan"),
        ({"regularization": -1.0}, ValueError, "regularization must be at least 0, got -1.0"),
        ({"warm_start": 1.0}, ValueError, r"warm_start must be in \[0, 1\), got 1.0"),
        ({"beta": (20.0,)}, ValueError, r"beta must be two numbers .* got \(20.0,\)"),
        ({"beta": (20.0, 0.5)}, ValueError, r"beta must be two numbers of at least 1"),
    ],
)
def test_bad_settings(options, error, text):
    with pytest.raises(error, match=f"adaround: {text}"):
        AdaRound(**options)


def test_models_that_do_not_belong_together():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), images(4)
    model[1].running_var.fill_(4.0)
    qconfig = QConfig(SYMMETRIC, None, first_last_bits=None)
    prepared = calibrated(model, qconfig, [x])
    with pytest.raises(ValueError, match="float_model must have a float layer '0' like model"):
        learn_rounding(prepared, prepared, [x], SHORT)
    with pytest.raises(ValueError, match=r"others at '0' \(is one of them folded\?\)"):
        learn_rounding(fold_batchnorm(model), prepared, [x], SHORT)
    with pytest.raises(ValueError, match="must be a prepared one with quantized weights, got Seq"):
        learn_rounding(model, model, [x], SHORT)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        learn_rounding(model, prepared, [], SHORT)
    dynamic = calibrated(model, QConfig.minmax(2, None), [x])
    with pytest.raises(ValueError, match=r"must keep the ranges .*dynamic one at '0'"):
        learn_rounding(model, dynamic, [x], SHORT)
    kept = calibrated(model, keep_weight_ranges(QConfig.minmax(2, None)), [x])
    assert len(learn_rounding(model, kept, [x], AdaRound(iterations=1))) == 1
