"""Training a GHN: what a step is, what is refused, and that it learns."""

import math

import pytest
import torch
from qtrain.data import load_dataset, train_batches
from qtrain.ghn.checkpoint import load_ghn
from qtrain.ghn.quantizers import FLOAT_BITS, Place, Quantizer, quantize_weights
from qtrain.ghn.run import PRESETS, run_ghn, settings_for
from qtrain.ghn.train import GhnRecipe, GhnTraining, Start, require_start
from qtrain.loop import train, train_step
from qtrain.recipe import TrainConfig, learning_rate, make_optimizer
from qtrain.report import write_run_report
from qtrain.rundir import METRICS, RunDir, read_json, read_metrics
from torch.nn import functional as F

TINY = {"width": 16, "heads": 2, "layers": 1, "max_shape": [8, 8, 3, 3]}


def settings(*, train=None, ghn=None, **training):
    few = {"nets": 4, "meta_batch": 2, "held_out": 1, **training}
    short = {"epochs": 1, "batch_size": 256, "eval_every": 1, **(train or {})}
    return settings_for("digits", train=short, ghn={**TINY, **(ghn or {})}, training=few)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


def bound(data, config, training, start=None):
    recipe = GhnRecipe(training, start)
    recipe.bind(config, data)
    torch.manual_seed(0)
    model = recipe.build(config, data)
    recipe.initialize(model, data, config)
    return recipe, model


def first_batch(data):
    return next(iter(train_batches(data.train, 32, seed=0, epoch=0)))


SIM = {"quantizer": Quantizer("sim"), "bits": (4,)}


def test_the_loss_is_the_mean_over_the_meta_batch_and_its_gradient_reaches_the_ghn(data):
    """By hand: predict, quantize, run each network, average; penalty on what was predicted."""
    config, training = settings(**SIM, penalty=0.01)
    recipe, model = bound(data, config, training)
    x, y = first_batch(data)
    loss = recipe.loss(model, (x, y), 5)
    chosen = recipe.draw(5)
    assert len({index for index, _, _ in chosen}) == 2
    nets = [net for _, net, _ in chosen]
    widths = [layers for _, _, layers in chosen]
    places = [Place(0, 5, index) for index, _, _ in chosen]
    predicted = model.predict([n.graph for n in nets], skeletons=[n.skeleton for n in nets])
    quantized = quantize_weights(predicted, widths, training.quantizer, places)
    outputs = [net.run(weights, x) for net, weights in zip(nets, quantized, strict=True)]
    losses = [F.cross_entropy(out, y) for out in outputs]
    sizes = [w.square().sum().sqrt() for weights in predicted for w in weights.values()]
    expected = (losses[0] + losses[1]) / 2 + 0.01 * sum(sizes) / 2
    torch.testing.assert_close(loss, expected)
    assert recipe.part_values[0] == max(losses)
    named = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    for name, left, right in zip(named, ours, theirs, strict=True):
        assert left is not None and left.abs().sum() > 0, name
        torch.testing.assert_close(left, right)


def test_a_step_draws_networks_and_widths_by_its_number_alone(data):
    several = {"quantizer": Quantizer("paper"), "bits": (8, 4, 2, FLOAT_BITS)}
    config, training = settings(nets=6, **several)
    recipe, _ = bound(data, config, training)
    again, _ = bound(data, config, training)
    seen = set()
    for step in range(12):
        one = [(index, widths) for index, _, widths in recipe.draw(step)]
        assert one == [(index, widths) for index, _, widths in again.draw(step)]
        for _, widths in one:
            *_, last = layers = list(widths.values())
            middle = set(layers[1:-1])
            assert len(middle) == 1 and {layers[0], last} <= {8, FLOAT_BITS}
            seen |= middle
    assert seen == {2, 4, 8, FLOAT_BITS}


def test_mixed_networks_have_a_width_for_each_layer(data):
    config, training = settings(quantizer=Quantizer("sim"), bits=(4, 2), mixed=1.0)
    recipe, _ = bound(data, config, training)
    for _, _, widths in recipe.draw(0):
        layers = list(widths.values())
        assert layers[0] == layers[-1] == 8 and set(layers[1:-1]) == {2, 4}


def test_told_widths_reach_the_ghn(data):
    training = {"quantizer": Quantizer("sim"), "bits": (4, 2)}
    config, how = settings(ghn={"bit_widths": True}, **training)
    assert config.model_options["bit_widths"] == [2, 4]
    recipe, model = bound(data, config, how)
    recipe.loss(model, first_batch(data), 0).backward()
    rows = model.embedding.bits.weight.grad.abs().sum(1) > 0
    drawn = {list(widths.values())[1] for _, _, widths in recipe.draw(0)}
    assert rows.tolist() == [2 in drawn, 4 in drawn, False]  # the last row is that of float


def test_layers_that_differ_are_told_one_by_one(data):
    training = {"quantizer": Quantizer("sim"), "bits": (4, 2), "mixed": 1.0}
    recipe, _ = bound(data, *settings(ghn={"bit_widths": True}, **training))
    (_, net, widths), *_ = recipe.draw(0)
    told = recipe.told(net.graph, widths)
    first, *middle, last = widths
    assert all(told[name] == widths[name] for name in middle)
    # 8 bits, which this GHN does not know
    assert told[first] is None and told[last] is None


def test_networks_without_batchnorm(data):
    config, training = settings(norm=False, **SIM)
    recipe, model = bound(data, config, training)
    graphs = [net.graph for _, net, _ in recipe.draw(0)]
    kinds = {node.primitive for graph in graphs for node in graph.nodes}
    assert "bn" not in kinds and "bias" in kinds
    assert math.isfinite(recipe.loss(model, first_batch(data), 0).detach())


def test_transformers_of_the_vit_space(data):
    config, training = settings(space="vit", **SIM)
    recipe, model = bound(data, config, training)
    graphs = [net.graph for _, net, _ in recipe.draw(0)]
    assert all("msa" in {node.primitive for node in graph.nodes} for graph in graphs)
    loss = recipe.loss(model, first_batch(data), 0)
    loss.backward()
    assert math.isfinite(loss.detach()) and model.embedding.primitive.weight.grad.abs().sum() > 0


def test_a_step_that_is_not_finite_is_skipped_and_counted(data):
    config, training = settings(max_skipped=2, **SIM)
    recipe, model = bound(data, config, training)
    optimizer = make_optimizer(recipe.param_groups(model, config), config)
    x, y = first_batch(data)

    def step(x, number):
        def clip():
            return torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)

        return train_step(model, (x, y), number, recipe, optimizer, clip=clip)

    assert step(x, 0) is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = x.clone()
    bad[3] = math.nan
    assert step(bad, 1) is None and step(bad, 2) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert recipe.counts()["skipped"] == 2
    assert step(x, 3) is not None
    assert not all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    with pytest.raises(FloatingPointError, match=r"^ghn: gradients must be finite in all but 2 "):
        step(bad, 4)


def test_exploding_steps_are_counted(data):
    config, training = settings(**SIM)
    recipe, _ = bound(data, config, training)
    chance = math.log(10)
    for loss in (1.0, 2.9 * chance, 3.1 * chance, 50.0, math.nan):
        recipe._watch(torch.tensor(loss))
    assert recipe.counts()["exploded"] == 2


def test_an_interval_without_a_step_is_logged(tmp_path):
    """No loss then, and the curves are drawn all the same."""

    class Failing(GhnRecipe):
        def loss(self, model, batch, step):
            loss = super().loss(model, batch, step)
            return loss * math.nan if step < 2 else loss

    config, training = settings(train={"log_every": 2, "batch_size": 400}, **SIM)
    train(config, Failing(training), tmp_path, cpu=True)
    first, second = [r for r in read_metrics(tmp_path / METRICS) if "loss" in r]
    assert first["loss"] is None and first["worst"] is None and first["skipped"] == 2
    assert second["loss"] > 0 and second["skipped"] == 2
    write_run_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| W4A4 |" in report and (tmp_path / "curves.png").exists()


def test_a_checkpoint_that_logs_in_another_way_is_refused(tmp_path):
    config, training = settings(train={"batch_size": 400, "checkpoint_every": 2}, **SIM)

    class Stopping(GhnRecipe):
        def on_step_end(self, model, step):
            if step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, Stopping(training), tmp_path, cpu=True)
    run = RunDir(tmp_path, read_json(tmp_path / "config.json"))
    saved = run.load_checkpoint()
    saved["loss_sum"] = saved["loss_sum"][1:]
    run.save_checkpoint(saved)
    with pytest.raises(ValueError, match=r"must be of this version of qtrain, got one that logs"):
        train(config, GhnRecipe(training), tmp_path, cpu=True)


def test_it_learns_and_a_skipped_step_is_not_in_the_log(tmp_path):
    """A real GHN, tiny, for 40 steps; the third of them is made to fail."""

    class Failing(GhnRecipe):
        def loss(self, model, batch, step):
            loss = super().loss(model, batch, step)
            return loss * math.nan if step == 2 else loss

    short = {"batch_size": 32, "lr": 3e-3, "schedule": "constant", "log_every": 10}
    config, training = settings(train=short, nets=2, **SIM)
    result = train(config, Failing(training), tmp_path, cpu=True)
    records = [r for r in read_metrics(tmp_path / METRICS) if "loss" in r]
    losses = [r["loss"] for r in records]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.08
    assert all(r["skipped"] == 1 and r["worst"] >= r["loss"] for r in records)
    ghn = load_ghn(tmp_path)
    assert all(torch.equal(v, ghn.state_dict()[k]) for k, v in result.model.state_dict().items())


def test_training_goes_on_from_another_ghn(tmp_path, data):
    config, training = settings(train={"epochs": 1})
    run_ghn(config, training, tmp_path, cpu=True)
    start = Start.load(tmp_path)
    tuned, how = settings_for(
        "digits",
        ghn={"bit_widths": True},
        training={"quantizer": Quantizer("sim"), "bits": (4,), "nets": 4, "meta_batch": 2},
        start=start,
    )
    assert tuned.model_options["width"] == 16 and tuned.model_options["bit_widths"] == [4]
    recipe, model = bound(data, tuned, how, start)
    (_, net, widths), *_ = recipe.draw(0)
    ours = model.predict([net.graph], bits=recipe.told(net.graph, widths))[0]
    theirs = start.ghn.predict([net.graph])[0]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert GhnRecipe(how, start).describe()["start"] == start.digest
    halved, how = settings_for("digits", ghn={"gain": 0.5}, training=vars(training), start=start)
    _, smaller = bound(data, halved, how, start)
    ours = smaller.predict([net.graph])[0]
    assert all(torch.equal(ours[n], v * (0.5 if v.dim() > 1 else 1)) for n, v in theirs.items())
    other = settings(ghn={"width": 24})[0]
    with pytest.raises(ValueError, match=r"start must be a GHN of .* width \(16 there, 24 asked"):
        bound(data, other, training, start)
    with pytest.raises(ValueError, match="bit_widths"):
        require_start(model.config, start.ghn.config)


def test_presets_of_both_encoders():
    """GHN-3 and GHN-2 of the papers, with their optimizers."""
    config, training = settings_for("paper")
    assert config.lr == 4e-4 and config.schedule == "cosine" and config.clip == 5.0
    assert training.meta_batch == 8 and training.penalty == 2.4e-4 and training.space == "paper"
    config, training = settings_for("paper", ghn={"encoder": "gated"})
    assert training.penalty == 0
    assert (config.lr, config.schedule, config.weight_decay) == (1e-3, "steps", 0.0)
    assert config.model_options["width"] == 32
    rates = [learning_rate(config, step, 600) for step in (0, 399, 400, 499, 500, 599)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    for preset in PRESETS:
        settings_for(preset)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"bits": (4,)}, ValueError, r"ghn: bits must be none without a quantizer, .*, got \(4,\)"),
        (
            {"quantizer": Quantizer("sim")},
            ValueError,
            "ghn: bits must be .* some with one, got none",
        ),
        (
            {"quantizer": Quantizer("sim"), "bits": (17,)},
            ValueError,
            r"ghn: bits must be in 1..16, or 32 for float, got 17",
        ),
        ({**SIM, "mixed": 0.5}, ValueError, "ghn: mixed must be 0 with fewer than two bit widths"),
        ({"nets": 1}, ValueError, "ghn: nets must be at least the meta_batch of 2, got 1"),
        ({"space": "cnn"}, ValueError, "space must be one of .*, got cnn"),
        ({"penalty": -1.0}, ValueError, "ghn: penalty must be at least 0, got -1.0"),
        ({"meta_batch": 2.0}, TypeError, "ghn: meta_batch must be of int, got 2.0"),
    ],
)
def test_bad_training(changed, error, message):
    with pytest.raises(error, match=message):
        settings(**changed)


@pytest.mark.parametrize(
    ("train", "ghn", "message"),
    [
        ({"clip": None}, {}, "ghn: clip must be set: the norm tells a bad step, got None"),
        ({"swa_start": 0.5}, {}, "ghn: swa_start must be None, got 0.5"),
        (
            {},
            {"bit_widths": [2]},
            r"ghn: bit_widths must be all of \(4,\), .*, got \(2,\)",
        ),
        ({}, {"widht": 3}, "ghn: settings must be among .*, got widht"),
        ({}, {"width": 1.5}, "ghn: width must be a whole number, got 1.5"),
        ({}, {"gain": 0}, "ghn: gain must be positive and finite, got 0"),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing(tmp_path, train, ghn, message):
    config, training = settings(train=train, ghn=ghn, **SIM)
    with pytest.raises(ValueError, match=message):
        run_ghn(config, training, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_fp16_is_refused(data):
    config, training = settings(train={"mixed_precision": "fp16"})
    with pytest.raises(ValueError, match=r"ghn: mixed_precision must be no or bf16: .*, got fp16"):
        GhnRecipe(training).bind(config, data)


def test_another_model_is_refused(data):
    with pytest.raises(ValueError, match="ghn: model must be ghn, got cnn"):
        GhnRecipe(GhnTraining()).bind(TrainConfig(clip=5.0), data)
