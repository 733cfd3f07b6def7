"""The QAT methods as recipes: each trains, goes on to the same bits, and says what it cannot."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qtrain.adaround import learn_rounding
from qtrain.cli import app
from qtrain.data import load_dataset
from qtrain.loop import evaluate
from qtrain.qat import METHODS, Qat, qat_qconfig
from qtrain.recipe import Recipe, make_optimizer, new_model
from qtrain.rundir import METRICS, MODEL, load_model_file
from qtrain.source import FloatSource
from test_quantize import CONFIG, QAT_CONFIG, Killed, run
from typer.testing import CliRunner

from qkernels.nn import (
    PactFakeQuantize,
    PartialFakeQuantize,
    QConfig,
    QuantLayer,
    QuantSpec,
    calibrate,
    float_state_dict,
    prepare,
)

# the other two are those of test_quantize
NEW = [method for method in METHODS if method not in ("minmax", "lsq")]
SHORT = replace(QAT_CONFIG, epochs=2, swa_start=0.5)
LITTLE = {"widths": [4, 4, 8], "strides": [2, 1, 2]}


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    return run(CONFIG, Recipe(), tmp_path_factory.mktemp("runs") / "float")


@pytest.fixture(scope="module")
def source(float_run):
    return FloatSource.load(float_run.run.path)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "little"
    run(replace(CONFIG, epochs=1, model_options=LITTLE), Recipe(), out)
    return FloatSource.load(out)


@pytest.mark.parametrize("method", NEW)
def test_each_method_trains_at_two_bits(tmp_path, source, method):
    qconfig = qat_qconfig(method, 2, 2)
    result = run(replace(QAT_CONFIG, epochs=4), Qat(source, qconfig), tmp_path)
    assert result.test_accuracy > 0.85
    state, meta = load_model_file(tmp_path)
    assert QConfig.from_dict(meta["recipe"]["qconfig"]) == qconfig
    assert set(float_state_dict(result.model)) == set(source.weights) <= set(state)
    # what was evaluated is quantized throughout, and depends on no draw
    layers = [m for m in result.model.modules() if isinstance(m, QuantLayer)]
    seen = []
    for layer in layers[1:-1]:
        layer.input_fake_quant.register_forward_hook(
            lambda module, args, y: seen.append(len(y.unique()))
        )
        weight = layer.weight_fake_quant(layer.weight)
        assert max(len(row.unique()) for row in weight) <= 4
    assert evaluate(result.model, result.data.test)["test_accuracy"] == result.test_accuracy
    assert seen and max(seen) <= 4


@pytest.mark.parametrize("method", NEW)
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, little, method):
    """What is learned is in the checkpoint, and a mask is a function of the step."""

    class Mortal(Qat):
        def on_step_end(self, model, step):
            if step == self.die_at:
                raise Killed

    qconfig = qat_qconfig(method, 3, 3)
    config = replace(SHORT, model_options=LITTLE)
    whole = run(config, Qat(little, qconfig), tmp_path / "whole")
    for die_at in (3, whole.steps - 3):
        recipe = Mortal(little, qconfig)
        recipe.die_at = die_at
        with pytest.raises(Killed):
            run(config, recipe, tmp_path / "killed")
    run(config, Qat(little, qconfig), tmp_path / "killed")
    for name in (MODEL, METRICS):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def masks(source, seed, steps):
    """What share of the first masked layer is quantized, element by element, at some steps."""
    recipe = Qat(source, qat_qconfig("qdrop", 4, 4, p=0.3))
    data = load_dataset("digits")
    recipe.bind(replace(SHORT, seed=seed), data)
    model = recipe.setup(new_model(SHORT, data))
    (quantizer, *_) = [m for m in model.modules() if isinstance(m, PartialFakeQuantize)]
    found = []
    for step in steps:
        with recipe.perturbation(step):
            found.append(quantizer.mask(torch.zeros(100, 100)))
    return found


def test_a_runs_masks_are_named_by_its_seed_and_the_step(source):
    first, second, again = masks(source, 0, (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert abs(first.double().mean() - 0.3) < 0.02
    (later,) = masks(source, 0, (1,))
    assert torch.equal(later, second)
    (other,) = masks(source, 1, (0,))
    assert not torch.equal(other, first)


def groups(source, method, **options):
    recipe = Qat(source, qat_qconfig(method, 4, 4), scale_lr_factor=0.5, **options)
    model = recipe.setup(new_model(SHORT, load_dataset("digits")))
    found = make_optimizer(recipe.param_groups(model, SHORT), SHORT).param_groups
    everything = [id(p) for group in found for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    return model, found


def test_alphas_decay_and_offsets_do_not(source):
    for decay in (None, 0.25):
        model, found = groups(source, "pact", alpha_decay=decay)
        alphas = {id(m.alpha) for m in model.modules() if isinstance(m, PactFakeQuantize)}
        assert len(alphas) == 9
        (own,) = [g for g in found if {id(p) for p in g["params"]} & alphas]
        assert {id(p) for p in own["params"]} == alphas and own["lr_factor"] == 0.5
        assert own["weight_decay"] == (SHORT.weight_decay if decay is None else decay)
    model, found = groups(source, "lsq+")
    learned = {id(p) for n, p in model.named_parameters() if n.endswith(("scale", "offset"))}
    assert {id(p) for p in found[-1]["params"]} == learned and len(learned) == 27
    assert found[-1]["weight_decay"] == 0


def test_decay_narrows_what_pact_keeps(tmp_path, little):
    widths, config = [], replace(SHORT, model_options=LITTLE)
    for decay in (0.0, 10.0):
        recipe = Qat(little, qat_qconfig("pact", 4, 4), alpha_decay=decay)
        result = run(config, recipe, tmp_path / str(decay))
        alphas = [m.alpha for m in result.model.modules() if isinstance(m, PactFakeQuantize)]
        widths.append(torch.cat(alphas))
    assert (widths[1] < widths[0]).all() and widths[1].min() > 0


def test_dorefa_weights_keep_the_size_of_a_float_model(source, float_run):
    """The normalised weights of the paper would blow the logits up, and each layer without a
    BatchNorm behind it."""
    model = source.fill(new_model(CONFIG, float_run.data))
    prepared = prepare(model, QConfig.dorefa(8, None, first_last_bits=None))
    scores = evaluate(prepared, float_run.data.test)
    assert abs(scores["test_loss"] - float_run.test_loss) < 0.05
    x = torch.randn(16, 32)
    calibrate(prepared, [float_run.data.test.x[:8]])
    torch.testing.assert_close(prepared.head(x), model.head(x), rtol=0, atol=0.2)


def test_the_sample_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "qat.md").read_text()
    (sample,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(compile(sample, "docs/qat.md", "exec"), names)
    saved = torch.load(tmp_path / "weights.pt")
    assert torch.equal(saved["0.weight"], names["model"][0].weight)
    assert names["noise"].step == len(names["loader"])
    assert all(f"| `{method}` |" in text for method in METHODS)


def test_values_that_do_not_go_with_a_method(source):
    with pytest.raises(ValueError, match="qat: p must be None unless method is quant-noise or qd"):
        qat_qconfig("lsq", 4, 4, p=0.5)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got 1\.5"):
        qat_qconfig("qdrop", 4, 4, p=1.5)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="qat: alpha_decay must be at least 0 and finite"):
            Qat(source, qat_qconfig("pact", 4, 4), alpha_decay=bad)


def test_the_command_takes_their_options(tmp_path, float_run):
    def call(*arguments):
        command = ["qat", float_run.run.path, "--epochs", 1, "--cpu", *arguments]
        return CliRunner().invoke(app, [str(a) for a in command])

    outcome = call("--method", "quant-noise", "--p", 0.25, "--out", tmp_path / "noise")
    assert outcome.exit_code == 0, outcome.output
    recipe = load_model_file(tmp_path / "noise")[1]["recipe"]
    assert recipe["qconfig"]["weight"]["p"] == 0.25 and "alpha_decay" not in recipe
    outcome = call("--method", "pact", "--alpha-decay", 0.1, "--out", tmp_path / "pact")
    assert outcome.exit_code == 0, outcome.output
    assert load_model_file(tmp_path / "pact")[1]["recipe"]["alpha_decay"] == 0.1
    outcome = call("--method", "lsq", "--alpha-decay", 0.1, "--out", tmp_path / "bad")
    assert outcome.exit_code == 2 and not (tmp_path / "bad").exists()
    assert "error: qat: alpha_decay must be None unless method is pact, got 0.1" in outcome.stderr


@pytest.mark.parametrize(("kind", "learned"), [("pact", True), ("dorefa_weight", False)])
def test_adaround_learns_plain_kinds_alone(kind, learned):
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(8, 4)
    weight = QuantSpec(4, kind=kind, learned=learned)
    other = prepare(model, QConfig(weight, None, first_last_bits=None)).eval()
    calibrate(other, [x])
    with pytest.raises(
        ValueError, match=f"^adaround: .* of '0' must be of kind plain, got {kind}$"
    ):
        learn_rounding(model, other, [x])
