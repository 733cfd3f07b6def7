"""PTQ and QAT from a float checkpoint."""

import re
from dataclasses import replace

import pytest
import torch
from qtrain.data import load_dataset
from qtrain.demo import DemoConfig
from qtrain.loop import evaluate, train
from qtrain.progress import Track
from qtrain.ptq import ptq_qconfig
from qtrain.ptq_run import PtqOptions, run_ptq
from qtrain.qat import Qat, qat_qconfig, scale_parameters
from qtrain.recipe import Recipe, TrainConfig, make_optimizer, new_model
from qtrain.rundir import METRICS, MODEL, load_model_file, read_metrics
from qtrain.source import FloatSource
from safetensors.torch import save_file

from qkernels.nn import FakeQuantize, float_state_dict, set_quantization

# the demo's net, which 2 bits hurt; fewer epochs
CONFIG = replace(DemoConfig.usual().float_run, epochs=6)
QAT_CONFIG = replace(CONFIG, epochs=6, lr=1e-2, checkpoint_every=7)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def run(config, recipe, out):
    with Track(1, "", quiet=True) as track:
        return train(config, recipe, out, cpu=True, track=track)


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    return run(CONFIG, Recipe(), tmp_path_factory.mktemp("runs") / "float")


@pytest.fixture(scope="module")
def source(float_run):
    return FloatSource.load(float_run.run.path)


def test_source_knows_what_it_is(source, float_run):
    assert (source.dataset, source.model) == ("digits", "cnn")
    assert source.model_options == CONFIG.model_options
    assert source.digest == FloatSource.load(float_run.run.path / MODEL).digest


def test_source_of_others(tmp_path, source):
    path = tmp_path / "foreign.safetensors"
    save_file(dict(source.weights), path)
    with pytest.raises(ValueError, match="name them with --dataset and --model"):
        FloatSource.load(path)
    known = FloatSource.load(path, dataset="digits", model="resnet8")
    model = new_model(TrainConfig(**known.settings()), load_dataset("digits"))
    with pytest.raises(ValueError, match="checkpoint: weights must be those of resnet8, got: Miss"):
        known.fill(model)


@pytest.mark.parametrize("fold", [True, False])
def test_ptq_falls_with_the_bits(tmp_path, source, float_run, fold):
    losses = []
    for bits in (8, 4, 2):
        qconfig = ptq_qconfig("minmax", bits, bits)
        result = run_ptq(source, qconfig, tmp_path / str(bits), PtqOptions(fold=fold))
        losses.append(result.test_loss)
    assert abs(losses[0] - float_run.test_loss) < 0.02
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] > 5 * float_run.test_loss
    (record,) = read_metrics(tmp_path / "2" / METRICS)
    assert record["float_accuracy"] == float_run.test_accuracy
    again = run_ptq(source, ptq_qconfig("minmax", 2, 2), tmp_path / "2", PtqOptions(fold=fold))
    assert again.test_loss == losses[2] and len(read_metrics(tmp_path / "2" / METRICS)) == 1


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_ptq_methods_differ(tmp_path, source, method):
    percentile = 99.0 if method == "percentile" else None
    qconfig = ptq_qconfig(method, 4, 4, percentile=percentile)
    other = run_ptq(source, qconfig, tmp_path / method)
    plain = run_ptq(source, ptq_qconfig("minmax", 4, 4), tmp_path / "minmax")
    assert other.test_loss != plain.test_loss and other.test_accuracy > 0.5


@pytest.mark.parametrize("method", ["minmax", "lsq"])
def test_qat_comes_back(tmp_path, source, float_run, method):
    ptq = run_ptq(source, ptq_qconfig("minmax", 2, 2), tmp_path / "ptq")
    result = run(QAT_CONFIG, Qat(source, qat_qconfig(method, 2, 2)), tmp_path / "qat")
    assert result.test_accuracy > max(0.85, ptq.test_accuracy)
    assert result.test_loss < 0.5 * ptq.test_loss
    # the file holds the prepared model, and within it a float model that can be taken out
    state, meta = load_model_file(tmp_path / "qat")
    assert meta["recipe"]["qconfig"] == qat_qconfig(method, 2, 2).to_dict()
    assert set(float_state_dict(result.model)) == set(source.weights) < set(state)
    # quantization is on in what was evaluated
    set_quantization(result.model, False)
    off = evaluate(result.model, result.data.test)["test_loss"]
    set_quantization(result.model, True)
    assert off != result.test_loss
    assert evaluate(result.model, result.data.test)["test_loss"] == result.test_loss
    with pytest.raises(ValueError, match="must be of a float model, got one of qat"):
        FloatSource.load(tmp_path / "qat")


@pytest.mark.parametrize("method", ["minmax", "lsq"])
def test_interrupted_qat_ends_at_the_same_bits(tmp_path, source, method):
    """Ranges, scales and their optimizer state are in the checkpoint."""

    class Mortal(Qat):
        def on_step_end(self, model, step):
            if step == self.die_at:
                raise Killed

    qconfig = qat_qconfig(method, 3, 3)
    run(QAT_CONFIG, Qat(source, qconfig), tmp_path / "whole")
    for die_at in (3, 25):
        recipe = Mortal(source, qconfig)
        recipe.die_at = die_at
        with pytest.raises(Killed):
            run(QAT_CONFIG, recipe, tmp_path / "killed")
    run(QAT_CONFIG, Qat(source, qconfig), tmp_path / "killed")
    for name in (MODEL, METRICS):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_scales_have_their_own_group(source):
    data = load_dataset("digits")
    recipe = Qat(source, qat_qconfig("lsq", 4, 4), scale_lr_factor=0.25)
    model = recipe.setup(new_model(QAT_CONFIG, data))
    scales = scale_parameters(model)
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert len(scales) == len(quantizers) == 18
    optimizer = make_optimizer(recipe.param_groups(model, QAT_CONFIG), QAT_CONFIG)
    group = optimizer.param_groups[-1]
    assert (group["weight_decay"], group["lr_factor"]) == (0.0, 0.25)
    assert {id(p) for p in group["params"]} == {id(p) for p in scales.values()}
    all_of_them = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(all_of_them) == len(set(all_of_them)) == len(list(model.parameters()))
    assert not scale_parameters(torch.nn.Linear(2, 2))


def test_another_float_model_is_another_run(tmp_path, source):
    run_ptq(source, ptq_qconfig("minmax", 8, 8), tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.qconfig\.\S*bits \(8 there, 4 asked for\)"):
        run_ptq(source, ptq_qconfig("minmax", 4, 8), tmp_path)


@pytest.mark.parametrize("bits", [0, 17])
def test_bad_bits(tmp_path, source, bits):
    with pytest.raises(ValueError, match=rf"bits must be .*16.* got {bits}"):
        run_ptq(source, ptq_qconfig("minmax", bits, 8), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_unknown_methods():
    with pytest.raises(ValueError, match=r"ptq: method must be one of .*mse, got 'lsq'"):
        ptq_qconfig("lsq", 4, 4)
    known = "minmax, lsq, lsq+, pact, dorefa, quant-noise, qdrop"
    with pytest.raises(
        ValueError, match=re.escape(f"qat: method must be one of {known}, got 'mse'")
    ):
        qat_qconfig("mse", 4, 4)
