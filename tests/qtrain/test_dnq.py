"""DNQ: the noise of a step, the recorded errors, what stays clean, and that it helps."""

import copy
import math

import pytest
import torch
from qtrain import dnq as dnq_module
from qtrain.data import load_dataset
from qtrain.dnq import Dnq, DnqConfig
from qtrain.loop import train
from qtrain.ptq import quantize_after_training
from qtrain.recipe import TrainConfig, new_model
from qtrain.simulate import discrete_noise, input_errors, joined, weight_errors
from test_nn_graph import NoReadBack
from torch.nn import functional as F

import qkernels
from qkernels import ErrorStats, foreach
from qkernels.nn import QuantSpec

NOISY = {"weight_bits": 3, "activation_bits": 3, "warmup_epochs": 1, "ramp_epochs": 2}


def settings(**changed):
    usual = {"epochs": 4, "batch_size": 128, "optimizer": "sgd", "lr": 0.05, "nesterov": True}
    tiny = {"model_options": {"widths": [4, 8], "strides": [2, 2]}, "eval_every": 2}
    return TrainConfig(**{**usual, **tiny, **changed})


def started(config, dnq, epoch=1):
    """A recipe and its model in the first step of an epoch, without a loop."""
    torch.manual_seed(0)
    data = load_dataset(config.dataset)
    recipe = Dnq(dnq)
    recipe.bind(config, data)
    model = recipe.setup(new_model(config, data)).train()
    recipe.on_epoch_start(model, epoch)
    return recipe, model, data


def clean_weights(recipe):
    return [weight.parameter.detach().clone() for weight in recipe.weights]


def noisy_weights(recipe, step):
    with recipe.perturbation(step):
        return clean_weights(recipe)


def test_ramp():
    def of(shape, **changed):
        dnq = DnqConfig(warmup_epochs=2, ramp_epochs=4, ramp=shape, **changed)
        return [dnq.ramp_at(step, 5) for step in range(40)]

    assert of("linear")[:10] == [0.0] * 10 and of("linear")[29:] == [1.0] * 11
    assert of("linear")[10:30] == pytest.approx([(i + 1) / 20 for i in range(20)])
    cosine = of("cosine")
    assert cosine[19] == pytest.approx(0.5) and cosine[14] == pytest.approx(0.1464, abs=1e-4)
    assert cosine[9] == 0 and cosine[29] == 1
    assert of("constant") == [0.0] * 10 + [1.0] * 30
    off = of("linear", weight_noise="none", activation_noise="none")
    assert off == [0.0] * 40


@pytest.mark.parametrize("kind", ["differential", "iid", "naive"])
def test_weight_noise_by_hand(kind):
    """Against the ops for single tensors, with the statistics of a fresh error_stats."""
    recipe, _, _ = started(settings(), DnqConfig(weight_noise=kind, **NOISY))
    step = 13
    ramp = recipe.dnq.ramp_at(step, 10)
    names = ["features.0.0", "features.1.0", "head"]
    before = clean_weights(recipe)
    for name, clean, noisy in zip(names, before, noisy_weights(recipe, step), strict=True):
        bits = 3 if name == "features.1.0" else 8
        stats = qkernels.error_stats(clean, bits=bits, axis=0, symmetric=True)
        at = recipe.noise.at(f"{name}.weight", kind=kind)
        if kind == "naive":
            want = qkernels.drop_in_noise(clean, stats, p=1.0, axis=0, ramp=ramp, **at)
        elif kind == "iid":
            at = {**at, "step": 2 * step}
            want = qkernels.differential_noise(clean, stats, axis=0, ramp=ramp, **at)
        else:
            want = qkernels.differential_noise(clean, stats, axis=0, ramp=ramp, **at)
        assert torch.equal(noisy, want) and not torch.equal(noisy, clean)
    assert all(map(torch.equal, before, clean_weights(recipe)))


def collected(kind, steps=400):
    """Noise of the middle layer's weight over many steps at full ramp: [steps, out, rest]."""
    dnq = DnqConfig(weight_noise=kind, ramp="constant", **{**NOISY, "weight_bits": 2})
    recipe, _, _ = started(settings(), dnq)
    clean = clean_weights(recipe)[1]
    noise = [noisy_weights(recipe, 11 + t)[1] - clean for t in range(steps)]
    stats = qkernels.error_stats(clean, bits=2, axis=0, symmetric=True)
    return torch.stack(noise).flatten(2).double(), stats


@pytest.mark.parametrize(
    ("kind", "variance", "memory", "mean"),
    [("differential", 2, -0.5, 0), ("discrete", 2, -0.5, 0), ("iid", 2, 0, 0), ("naive", 1, 0, 1)],
)
def test_laws_of_the_controls(kind, variance, memory, mean):
    """Mean, variance and correlation from step to step, per channel, of 400 steps x 36 elements."""
    noise, stats = collected(kind)
    found = noise.mean((0, 2))
    std = stats.std.double()
    # 5 standard errors of a mean of 14400 draws, which a memory of -1/2 only makes smaller
    assert (found - mean * stats.mean).abs().max() < 5 * (std * variance**0.5).max() / 14400**0.5
    centred = noise - found[:, None]
    torch.testing.assert_close(
        centred.square().mean((0, 2)), variance * std**2, rtol=0.08, atol=0.0
    )
    lag = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert lag.item() == pytest.approx(memory, abs=0.03)
    if memory:  # the sum telescopes: it is as large as one term
        assert noise.sum(0).square().mean() < 3 * (std**2).mean()


def test_weight_errors_are_those_of_plain_quantization():
    for spec in (QuantSpec(4, kind="pact", learned=True), QuantSpec(4, kind="dorefa_weight")):
        text = f"^weight_errors: spec must be of kind plain, got {spec.kind}$"
        with pytest.raises(ValueError, match=text):
            weight_errors(torch.randn(5, 3), spec)
    w = torch.randn(5, 3)
    wanted = weight_errors(w, QuantSpec(4, symmetric=True))
    assert torch.equal(weight_errors(w, QuantSpec(4, symmetric=True, kind="qdrop", p=0.5)), wanted)


def test_discrete_noise_takes_real_errors():
    torch.manual_seed(0)
    spec = QuantSpec(2, axis=1, symmetric=True)
    w = torch.randn(5, 3, 7)
    errors = weight_errors(w, spec)
    assert torch.equal(errors, qkernels.fake_quant(w, bits=2, axis=1, symmetric=True) - w)
    (noisy,) = discrete_noise([w], [errors], [errors], [1], [3], 4, 1.0)
    for c in range(3):
        values = errors[:, c].flatten()
        gaps = (values[:, None] - values[None]).flatten()
        noise = (noisy - w)[:, c].flatten()
        assert (noise[:, None] - gaps[None]).abs().amin(1).max() < 1e-6


def test_discrete_noise_takes_away_what_it_added():
    """From step to step, and over the start of an epoch, where the errors change."""
    dnq = DnqConfig(weight_noise="discrete", ramp="constant", **{**NOISY, "weight_bits": 2})
    recipe, model, _ = started(settings(), dnq)
    clean = clean_weights(recipe)[1]
    old = weight_errors(clean, recipe.weights[1].recorder.spec)
    seed = recipe.noise.at("features.1.0.weight", kind="discrete")["seed"]

    def delta(errors, step):  # by its own: the other end of the difference has errors of zero
        blank = [torch.zeros_like(errors)]
        return discrete_noise(blank, [errors], blank, [0], [seed], step, 1.0)[0]

    for step in (12, 13):
        want = clean + delta(old, step) - delta(old, step - 1)
        torch.testing.assert_close(noisy_weights(recipe, step)[1], want)
    with torch.no_grad():
        model.features[1][0].weight.mul_(3.0)
    recipe.on_epoch_start(model, 2)
    for step, before in ((20, old), (21, 3 * old)):
        want = 3 * clean + delta(3 * old, step) - delta(before, step - 1)
        torch.testing.assert_close(noisy_weights(recipe, step)[1], want)


def test_gradient_is_taken_at_the_noisy_weights():
    """The gradient of a step equals that of a float model that has the noisy weights as its own."""
    dnq = DnqConfig(activation_noise="none", ramp="constant", **{**NOISY, "weight_bits": 2})
    recipe, model, data = started(settings(), dnq)
    batch = (data.train.x[:32], data.train.y[:32])
    twin = copy.deepcopy(model)
    with recipe.perturbation(11):
        recipe.loss(model, batch, 11).backward()
        noisy = copy.deepcopy([w.parameter.data for w in recipe.weights])
    layers = [twin.features[0][0], twin.features[1][0], twin.head]
    for layer, value in zip(layers, noisy, strict=True):
        layer.weight.data = value
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_weights_come_back_after_an_error():
    recipe, _, _ = started(settings(), DnqConfig(**NOISY))
    before = [(w.parameter.data_ptr(), w.parameter.detach().clone()) for w in recipe.weights]
    with pytest.raises(KeyError), recipe.perturbation(12):
        raise KeyError
    for weight, (place, value) in zip(recipe.weights, before, strict=True):
        assert weight.parameter.data_ptr() == place and torch.equal(weight.parameter, value)
    assert not any(handle.enabled for handle in recipe.handles)


def test_one_call_a_step_and_no_read_back(monkeypatch):
    """All weights' noise is one list call; a whole step asks the device for nothing."""
    recipe, model, data = started(settings(), DnqConfig(**NOISY))
    calls = []
    real = foreach.differential_noise
    counted = lambda *a, **k: calls.append(len(a[0])) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(dnq_module.foreach, "differential_noise", counted)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in (11, 12, 13):
        with NoReadBack(), recipe.perturbation(step):
            recipe.loss(model, (data.train.x[:8], data.train.y[:8]), step).backward()
        optimizer.step()
        recipe.on_step_end(model, step)
    assert calls == [3, 3, 3]


def test_permanent_noise_stays():
    recipe, model, _ = started(settings(), DnqConfig(permanent=True, **NOISY))
    before = clean_weights(recipe)
    assert all(map(torch.equal, before, noisy_weights(recipe, 12)))
    recipe.on_step_end(model, 12)
    twin, _, _ = started(settings(), DnqConfig(**NOISY))
    assert all(map(torch.equal, clean_weights(recipe), noisy_weights(twin, 12)))


@pytest.mark.parametrize("rank", [0, 1])
def test_activation_noise_is_each_ranks_own(monkeypatch, rank):
    """The first layer's input under noise, by hand: recorded errors, the stream of the rank."""
    dnq = DnqConfig(weight_noise="none", p=0.25, **NOISY)
    recipe, model, data = started(settings(), dnq)
    layer, x = model.features[0][0], data.train.x[:16]
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(args[0].detach()))
    monkeypatch.setattr(qkernels.noise_source, "_this_rank", lambda: rank)
    with recipe.perturbation(12):
        model(x)
    stats = layer.input_noise.errors.stats
    at = recipe.noise.at("features.0.0.input", kind="drop_in", per_rank=True, rank=rank)
    want = qkernels.drop_in_noise(x, stats, p=0.25, ramp=dnq.ramp_at(12, 10), **at)
    assert torch.equal(seen[0], want)
    changed = (want != x).float().mean().item()
    assert changed == pytest.approx(0.25, abs=0.05)


def test_recorders_follow_the_simulated_ptq():
    """WQER and AQER after two epochs, against error_stats over everything at once."""
    config, dnq = settings(), DnqConfig(decay=0.9, calibration_images=60, **NOISY)
    recipe, model, _ = started(config, dnq)
    spec = recipe.weights[1].recorder.spec
    assert (spec.bits, spec.axis, spec.symmetric) == (3, 0, True)
    options = {"bits": 3, "axis": 0, "symmetric": True}
    first = qkernels.error_stats(recipe.weights[1].parameter, **options)
    first_input = input_errors(model, dnq.qconfig(), recipe.batches)["features.1.0"][0]
    with torch.no_grad():
        model.features[0][0].weight[0].mul_(1.5)
        model.features[1][0].weight.mul_(1.5)
    recipe.on_epoch_start(model, 2)
    second = qkernels.error_stats(recipe.weights[1].parameter, **options)
    share = 0.1 / 0.19  # the second of two: (1 - d) / (1 - d^2)
    for found, a, b in zip(recipe.weights[1].recorder.stats, first, second, strict=True):
        torch.testing.assert_close(found, a + share * (b - a))
    seen = input_errors(model, dnq.qconfig(), recipe.batches)["features.1.0"][0]
    noise = model.features[1][0].input_noise.errors
    for found, a, b in zip(noise.stats, first_input, seen, strict=True):
        torch.testing.assert_close(found, a + share * (b - a))
    # the step that moved it takes away the noise of the older one, the next step no more
    (now, before), (later, latest) = recipe._statistics(20), recipe._statistics(21)
    assert torch.equal(before[1][0], first.mean) and not torch.equal(now[1][0], first.mean)
    assert torch.equal(later[1][0], now[1][0]) and torch.equal(latest[1][0], now[1][0])


def test_input_errors_by_hand():
    """Chunks of the calibration set, joined, against the whole set in one forward."""
    config = settings(epochs=1)
    data = load_dataset("digits")
    torch.manual_seed(3)
    model = new_model(config, data)
    qconfig = DnqConfig(weight_bits=2, activation_bits=2).qconfig()
    batches = [(data.train.x[i : i + 25], data.train.y[i : i + 25]) for i in (0, 25, 50, 75)]
    found = input_errors(model, qconfig, batches)
    twin = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, twin)
    quantized = quantize_after_training(twin, qconfig, batches, fold=False)
    seen = {}
    for name in ("features.0.0", "features.1.0", "head"):
        layer = quantized.get_submodule(name)
        take = lambda m, args, name=name: seen.update({name: args[0]})  # noqa: E731
        layer.input_fake_quant.register_forward_pre_hook(take)
    with torch.no_grad():
        quantized(data.train.x[:100])
    assert set(found) == set(seen)
    for name, (stats, count) in found.items():
        quantizer = quantized.get_submodule(name).input_fake_quant
        error = (quantizer(seen[name]) - seen[name]).double()
        assert count == error.numel()
        assert stats.mean.item() == pytest.approx(error.mean().item(), rel=1e-4, abs=1e-7)
        assert stats.var.item() == pytest.approx(error.var(unbiased=False).item(), rel=1e-4)
        assert stats.mean_square.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert found["features.1.0"][0].std > 10 * found["head"][0].std  # 2 bits against 8


def test_joined():
    x = torch.randn(90, dtype=torch.float64).float() * 3 + 1
    parts = [x[:20], x[20:70], x[70:]]
    pairs = [
        (ErrorStats(p.mean(), p.var(False), p.square().mean(), p.mean()), len(p)) for p in parts
    ]
    stats, count = joined(pairs)
    assert count == 90
    torch.testing.assert_close(stats.mean, x.mean())
    torch.testing.assert_close(stats.var, x.var(unbiased=False))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight_bits": 0}, r"bits must be .*16.* got 0"),
        ({"activation_bits": 17}, r"bits must be .*16.* got 17"),
        ({"weight_noise": "pink"}, "dnq: weight_noise must be one of differential, iid, naive"),
        ({"activation_noise": "uniform"}, "dnq: activation_noise must be one of drop_in, none"),
        ({"ramp": "steep"}, "dnq: ramp must be one of linear, cosine, constant, got 'steep'"),
        ({"p": 1.5}, r"dnq: p must be in \[0, 1\], got 1.5"),
        ({"p": math.nan}, r"dnq: p must be in \[0, 1\], got nan"),
        ({"decay": 1.0}, r"dnq: decay must be in \[0, 1\), got 1.0"),
        ({"warmup_epochs": -1}, "dnq: warmup_epochs must be a whole number of at least 0, got -1"),
        ({"ramp_epochs": 1.5}, "dnq: ramp_epochs must be a whole number of at least 0, got 1.5"),
        ({"calibration_images": 1}, "dnq: calibration_images must be a whole number of at least 2"),
        ({"weight_bits": None}, "dnq: weight_bits must be a whole number, got None"),
        ({"p": "0.5"}, r"dnq: p must be in \[0, 1\], got '0.5'"),
        ({"permanent": "yes"}, "dnq: permanent must be true or false, got 'yes'"),
        ({"permanent": True, "weight_noise": "none"}, "dnq: permanent must be false without"),
        ({"method": "entropy"}, "method must be one of minmax"),
    ],
)
def test_bad_config(changed, words):
    with pytest.raises(ValueError, match=words):
        DnqConfig(**changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"warmup_epochs": 3},
            r"warmup_epochs \+ ramp_epochs must be at most the 4 epochs .* 3 \+ 2",
        ),
        ({"calibration_images": 5000}, "at most the 1297 training .*got 5000"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        train(settings(), Dnq(DnqConfig(**{**NOISY, **changed})), tmp_path / "run", cpu=True)
    assert not list(tmp_path.iterdir())
