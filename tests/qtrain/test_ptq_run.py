"""PTQ of checkpoints: run directories, several widths at once, the command and what it refuses."""

import json
import math
from dataclasses import replace

import pytest
from qtrain import ptq_run
from qtrain.adaround import AdaRound
from qtrain.cli import app
from qtrain.demo import DemoConfig
from qtrain.loop import evaluate, train
from qtrain.progress import Track
from qtrain.ptq import calibration_images, ptq_qconfig, quantize_after_training
from qtrain.ptq_run import PtqOptions, run_ptq, run_ptq_widths
from qtrain.recipe import Recipe, TrainConfig
from qtrain.report import RESULTS, read_rows
from qtrain.rundir import CONFIG, METRICS, MODEL, load_model_file, read_metrics
from qtrain.source import FloatSource
from typer.testing import CliRunner

from qkernels.nn import QuantLayer, fold_batchnorm, prepare

CONFIG_3 = replace(DemoConfig.usual().float_run, epochs=3)
FEW = AdaRound(iterations=30, lr=0.05)


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    with Track(1, "", quiet=True) as track:
        out = tmp_path_factory.mktemp("runs") / "float"
        return train(CONFIG_3, Recipe(), out, cpu=True, track=track)


@pytest.fixture(scope="module")
def float_dir(float_run):
    return float_run.run.path


@pytest.fixture(scope="module")
def source(float_dir):
    return FloatSource.load(float_dir)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def test_run_with_adaround(tmp_path, source, float_run):
    config = ptq_qconfig("mse", 2, 4)
    options = PtqOptions(calibration_images=100, rounding=FEW)
    nearest = run_ptq(source, config, tmp_path / "n", replace(options, rounding="nearest"))
    result = run_ptq(source, config, tmp_path / "a", options)
    assert result.test_loss < nearest.test_loss
    *layers, last = read_metrics(tmp_path / "a" / METRICS)
    assert [r["layer"] for r in layers] == list(layers_of(result.model))
    assert all(r["error"] <= r["nearest_error"] for r in layers)
    assert last["float_loss"] == float_run.test_loss and last["test_loss"] == result.test_loss
    written = json.loads((tmp_path / "a" / CONFIG).read_text())["recipe"]
    assert written["rounding"]["adaround"]["iterations"] == 30
    assert written["calibration_images"] == 100
    # the file is the model
    state, _ = load_model_file(tmp_path / "a")
    fresh = prepare(fold_batchnorm(float_run.model), config).eval()
    fresh.load_state_dict(state)
    assert evaluate(fresh, float_run.data.test)["test_loss"] == result.test_loss
    first = (tmp_path / "a" / MODEL).read_bytes()
    again = run_ptq(source, config, tmp_path / "a", options)
    assert again.test_loss == result.test_loss
    assert (tmp_path / "a" / MODEL).read_bytes() == first
    assert len(read_metrics(tmp_path / "a" / METRICS)) == 10
    other = run_ptq(source, config, tmp_path / "b", replace(options, seed=1))
    assert other.test_loss != result.test_loss
    images = calibration_images(float_run.data, replace(CONFIG_3, seed=1), 100)
    model = quantize_after_training(float_run.model, config, images, rounding=FEW, seed=1)
    assert evaluate(model, float_run.data.test)["test_loss"] == other.test_loss


def test_fewer_images_than_usual(tmp_path):
    """Unasked, the calibration set is all there is; asked for more, it is an error."""
    options = {"train_size": 40, "test_size": 20}
    how = {"dataset": "shapes", "data_options": options, "batch_size": 20, "epochs": 1}
    model = {"widths": [4, 4], "strides": [2, 2]}
    with Track(1, "", quiet=True) as track:
        config = TrainConfig(model="cnn", model_options=model, **how)
        train(config, Recipe(), tmp_path / "float", cpu=True, track=track)
    small = FloatSource.load(tmp_path / "float")
    run_ptq(small, ptq_qconfig("minmax", 4, 4), tmp_path / "ptq")
    recipe = json.loads((tmp_path / "ptq" / CONFIG).read_text())["recipe"]
    assert recipe["calibration_images"] == 40
    with pytest.raises(ValueError, match="at most the 40 training examples, got 41"):
        run_ptq(small, ptq_qconfig("minmax", 4, 4), tmp_path / "x", PtqOptions(41))
    assert not (tmp_path / "x").exists()


def test_widths(tmp_path, source, float_run, monkeypatch):
    options = PtqOptions(calibration_images=100, rounding=FEW)
    configs = [ptq_qconfig("mse", bits, bits) for bits in (3, 2)]

    class Killed(BaseException):
        pass

    def die_at_w2(job, qconfig, *rest, real=ptq_run.Job.run):
        if qconfig.weight.bits == 2:
            raise Killed
        return real(job, qconfig, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ptq_run.Job, "run", die_at_w2)
        run_ptq_widths(source, configs, tmp_path / "all", options)
    assert not (tmp_path / "all" / RESULTS).exists()
    done = (tmp_path / "all" / "ptq_w3a3" / MODEL).stat().st_mtime_ns
    with Track(2, "", quiet=True) as track:
        rows = run_ptq_widths(source, configs, tmp_path / "all", options, track=track)
        assert track.done == 2
    assert (tmp_path / "all" / "ptq_w3a3" / MODEL).stat().st_mtime_ns == done
    assert [(r.method, r.bits) for r in rows] == [
        ("float", None),
        ("AdaRound mse", (3, 3)),
        ("AdaRound mse", (2, 2)),
    ]
    assert rows[0].loss == float_run.test_loss
    for bits, config, row in zip((3, 2), configs, rows[1:], strict=True):
        alone = run_ptq(source, config, tmp_path / str(bits), options)
        assert (row.loss, row.accuracy) == (alone.test_loss, alone.test_accuracy)
        theirs = tmp_path / "all" / f"ptq_w{bits}a{bits}"
        assert (theirs / MODEL).read_bytes() == (tmp_path / str(bits) / MODEL).read_bytes()
        assert {p.name for p in theirs.iterdir()} >= {CONFIG, METRICS, "report.md", "accuracy.png"}
    files = {path.name for path in (tmp_path / "all").iterdir()}
    assert files == {CONFIG, RESULTS, "report.md", "accuracy.png", "ptq_w3a3", "ptq_w2a2"}
    assert "AdaRound, 30 iterations" in (tmp_path / "all" / "report.md").read_text()
    # a finished one is read back, another is refused
    monkeypatch.setattr(ptq_run.Job, "run", die_at_w2)
    assert run_ptq_widths(source, configs, tmp_path / "all", options) == rows
    assert read_rows(tmp_path / "all") == rows
    with pytest.raises(ValueError, match=r"recipe.calibration_images \(100 there, 90 asked for\)"):
        run_ptq_widths(source, configs, tmp_path / "all", replace(options, calibration_images=90))
    with pytest.raises(ValueError, match=r"of different bits, got \[\(3, 3\), \(3, 3\)\]"):
        run_ptq_widths(source, [configs[0]] * 2, tmp_path / "x", options)
    bad = replace(configs[1], overrides={"nothing": None})
    with pytest.raises(ValueError, match="patterns that match a quantizable layer, got 'nothing'"):
        run_ptq_widths(source, [configs[0], bad], tmp_path / "x", options)
    assert not (tmp_path / "x").exists()


def call(*arguments, code=0):
    outcome = CliRunner().invoke(app, ["ptq", *(str(a) for a in arguments)])
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_command(float_dir, tmp_path):
    how = ["--rounding", "adaround", "--adaround-iterations", 5, "--calibration-images", 60]
    text = call(float_dir, "--out", tmp_path / "one", "--bits", 3, "--cpu", *how).output
    assert "W3A3" in text and "FP32" not in text
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert names == {CONFIG, METRICS, MODEL, "report.md", "accuracy.png"}
    args = (float_dir, "--out", tmp_path / "two", "--bits", "8,3", "--method", "mse", *how)
    text = call(*args).output
    assert all(word in text for word in ("FP32", "W8A8", "W3A3", "AdaRound mse", "report.md"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").rglob("*")}
    # on a busy machine lines of progress come first
    table = [line for line in text.splitlines() if line.startswith("│")]
    again = call(*args).output.splitlines()
    assert len(table) == 3 and [line for line in again if line.startswith("│")] == table
    assert {p: p.stat().st_mtime_ns for p in before} == before
    mixed = ["--weight-bits", 4, "--activation-method", "percentile", "--percentile", 99.5]
    sides = call(float_dir, "--out", tmp_path / "mixed", *mixed, "--weight-method", "mse")
    assert "W4A8" in sides.output
    recipe = json.loads((tmp_path / "mixed" / CONFIG).read_text())["recipe"]
    assert recipe["qconfig"] == (
        ptq_qconfig("minmax", 4, 8, weight_method="mse", activation_method="percentile",
                    percentile=99.5).to_dict()
    )  # fmt: skip
    assert recipe["rounding"] == "nearest" and recipe["calibration_images"] == 512


BAD = [
    (["--bits", "0"], "--bits: it must be whole numbers from 1 to 16"),
    (["--bits", "8,17"], "--bits: it must be whole numbers from 1 to 16"),
    (["--bits", ""], "--bits: it must be whole numbers from 1 to 16"),
    (["--bits", "4,4"], "--bits: it must be whole numbers from 1 to 16"),
    (["--bits", "4", "--weight-bits", "4"], "--bits: it must stand alone"),
    (["--weight-bits", "0"], "bits must be in 1..16, got 0"),
    (["--activation-bits", "17"], "bits must be in 1..16, got 17"),
    (["--first-last-bits", "17"], "first_last_bits must be in 1..16 or None, got 17"),
    (["--method", "lsq"], "method must be one of minmax, percentile, mse, got 'lsq'"),
    (["--weight-method", "x"], "weight_method must be one of minmax, percentile, mse, got 'x'"),
    (["--method", "percentile", "--percentile", "101"], "percentile must be in (50, 100]"),
    (["--percentile", "99"], "percentile must be None unless a method is percentile, got 99.0"),
    (["--rounding", "up"], "rounding must be one of nearest, adaround, got 'up'"),
    (["--rounding", "adaround", "--adaround-iterations", "0"], "iterations must be at least 1"),
    (["--adaround-iterations", "9"], "must come with --rounding adaround, got --rounding nearest"),
    (["--calibration-images", "1298"], "at most the 1297 training examples, got 1298"),
    (["--calibration-images", "0"], "calibration: images must be at least 1, got 0"),
    (["--model", "resnet8"], "checkpoint: weights must be those of resnet8"),
    (["--bits", "4,2", "--model", "resnet8"], "checkpoint: weights must be those of resnet8"),
    (["--bits", "4,2", "--calibration-images", "1298"], "at most the 1297 training examples"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line(float_dir, tmp_path, options, text):
    error = call(float_dir, "--out", tmp_path / "x", *options, code=2).stderr.strip()
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and text in error
    assert not list(tmp_path.iterdir())


def test_not_of_a_quantized_model(float_dir, tmp_path):
    call(float_dir, "--out", tmp_path / "ptq", "--cpu")
    error = call(tmp_path / "ptq", "--out", tmp_path / "x", code=2).stderr
    assert "must be of a float model, got one of ptq" in error
    assert not (tmp_path / "x").exists()
    assert math.isfinite(read_rows(tmp_path / "ptq")[0].loss)
