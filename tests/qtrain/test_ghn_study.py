"""Studies of GHNs: what they train, what they read back, and their tables."""

import math
import statistics

import pytest
import torch
from qtrain.cli import app
from qtrain.data import load_dataset
from qtrain.ghn import start_study, study, weights_study
from qtrain.ghn.evaluate import EvalPlan, Ground, NetScore
from qtrain.ghn.prediction import predict
from qtrain.ghn.start_study import Curve, StartPlan, arms_of, default_qat, run_starts
from qtrain.ghn.start_study import table as start_table
from qtrain.ghn.study import GAVE_UP, STUDIES, Plan, Study, run_study, waves
from qtrain.ghn.study_report import (
    Outcome,
    accuracy_table,
    difference_table,
    screen_tables,
    training_table,
)
from qtrain.ghn.train import GhnRecipe
from qtrain.recipe import new_model
from qtrain.rundir import MODEL, load_model_file, read_json
from rich.console import Console
from torch.optim.swa_utils import update_bn
from typer.testing import CliRunner

import qkernels

TINY = {"width": 16, "heads": 2, "layers": 1, "max_shape": [8, 8, 3, 3]}
PLAN = Plan(
    epochs=1,
    tuning_epochs=1,
    train={"batch_size": 400, "log_every": 1, "model_options": TINY},
    training={"nets": 2, "meta_batch": 2, "held_out": 1},
    nets=1,
    splits=("id", "bn-free"),
    evaluation=EvalPlan(bits=(4,), methods=("minmax",), batchnorm_images=64, range_images=64),
)


@pytest.fixture(scope="module", autouse=True)
def here():
    """In this process: test_study has the processes."""

    def run_all(jobs, work, **_):
        return [(job, work(job)) for job in jobs]

    with pytest.MonkeyPatch.context() as patch:
        for module in (study, start_study):
            patch.setattr(module, "run_all", run_all)
        patch.setitem(STUDIES, "small", Study(("w4",), ()))
        yield


@pytest.fixture(scope="module")
def studied(tmp_path_factory, here):
    out = tmp_path_factory.mktemp("study")
    return out, run_study("small", PLAN, out, seeds=range(1), jobs=1)


def test_a_study_trains_evaluates_and_is_read_back(studied):
    out, outcomes = studied
    assert [o.variant for o in outcomes] == ["GHN-QAT W4A4, SimQuant"]
    runs = {path.parent.parent.name for path in out.glob("runs/*/seed0/" + MODEL)}
    assert runs == {"q", "w4"}
    config = read_json(out / "runs" / "w4" / "seed0" / "config.json")
    training = config["recipe"]["training"]
    assert training["quantizer"]["kind"] == "sim" and training["bits"] == [4]
    assert config["recipe"]["start"] is not None and config["train"]["lr"] == 1e-3
    assert (out / "small" / "accuracy.png").stat().st_size > 10_000
    text = (out / "small" / "report.md").read_text()
    assert "## bn-free" in text and "GHN-QAT W4A4, SimQuant" in text
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/*/{MODEL}")}
    assert run_study("small", PLAN, out, seeds=range(1), jobs=1) == outcomes
    assert before == {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/*/{MODEL}")}
    counted = read_json(out / "small" / "results.json")["outcomes"][0]
    assert counted["skipped"] == 0 and counted["steps"] == 3


def test_qat_from_predicted_weights_shares_the_runs(studied):
    out, _ = studied
    qat = default_qat("digits", {})
    short = qat.__class__(**{**vars(qat), "epochs": 1, "batch_size": 400})
    plan = StartPlan(PLAN, short, bits=(4,), noise=0.1, goals=(0.01, 1.0))
    curves = run_starts(plan, out, seeds=range(1), jobs=1)
    assert [c.arm for c in curves] == [arm.name for arm in arms_of(4, 0.1)]
    assert all([step for step, _ in c.points] == [3] for c in curves)
    starts = {
        name: load_model_file(out / "start" / "w4a4" / name / "start0.safetensors")[0]
        for name in ("random-0", "q-0", "q-0.1", "q-0-rescaled", "w4-0", "w4-0.1")
    }
    model = new_model(short, load_dataset("digits"))
    for slug in ("q", "w4"):
        weights = predict(model, out / "runs" / slug / "seed0")
        noisy = predict(model, out / "runs" / slug / "seed0", noise=0.1)
        for name, value in weights.items():
            assert torch.equal(value, starts[f"{slug}-0"][name])
            assert torch.equal(noisy[name], starts[f"{slug}-0.1"][name])
    rescaled = predict(model, out / "runs" / "q" / "seed0", rescale=True)
    for name, value in rescaled.items():
        assert torch.equal(value, starts["q-0-rescaled"][name])
    # LSQ's first scales are of inputs as the nets have them in training, whatever the weights
    model = new_model(short, load_dataset("digits"))
    model.load_state_dict(starts["random-0"])
    before = {name: value.clone() for name, value in model.named_buffers()}
    update_bn(Ground.of(load_dataset("digits"), EvalPlan(seed=0)).batchnorm, model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    first = "features.0.0.weight"
    assert not torch.equal(starts["random-0"][first], starts["q-0"][first])
    assert (out / "start" / "report.md").exists()


def test_weights_beside_random_ones(studied, monkeypatch):
    out, _ = studied
    sources = {"torch's default": None, "He, normal": None, "GHN-Q": "q"}
    monkeypatch.setattr(weights_study, "SOURCES", sources)
    shapes = {s.source: s for s in weights_study.run_weights(PLAN, out, seeds=range(1), jobs=1)}
    he, default = shapes["He, normal"], shapes["torch's default"]
    # torch's default is uniform, of variance 1 / (3 fan_in)
    assert statistics.median(he.size) == pytest.approx(1, abs=0.1)
    assert statistics.median(default.size) == pytest.approx(6**-0.5, abs=0.05)
    assert statistics.median(default.tails) == pytest.approx(-1.2, abs=0.2)
    assert statistics.median(he.noise[4]) > statistics.median(default.noise[4])
    assert len(shapes["GHN-Q"].size) == len(he.size) == len(default.size)
    assert (out / "weights" / "weights.png").stat().st_size > 10_000


def test_a_layer_by_hand():
    shape = weights_study.Layers("by hand")
    w = torch.tensor([[-0.5, 0.25, 0.5], [1.0, -0.75, -0.5]])
    shape.add([w])
    mean_square = w.square().mean().item()
    assert shape.size == [pytest.approx(mean_square**0.5 / (2 / 3) ** 0.5)]
    assert shape.peak == [pytest.approx(1 / mean_square**0.5)]
    rounded = qkernels.fake_quant(w, bits=2, axis=0, symmetric=True)
    share = (rounded - w).square().mean().item() / mean_square
    assert shape.noise[2] == [pytest.approx(10 * math.log10(share))]
    assert shape.counts.sum() == 6


def test_waves_come_after_what_they_start_from():
    tuned = ["more", "w4", "w2", "low-more", "low-w4", "low-w2"]
    assert waves(STUDIES["heads"].variants) == [["q", "low"], tuned]
    assert waves(("w4",)) == [["q"], ["w4"]]
    for each in STUDIES.values():
        assert {slug for wave in waves(each.variants) for slug in wave} >= set(each.variants)
        assert {slug for pair in each.pairs for slug in pair} <= set(each.variants)


def outcome(variant, seed, accuracies, **changed):
    scores = tuple(
        NetScore("id", 5, i, bits, method, a, 1.0)
        for (bits, method), nets in accuracies.items()
        for i, a in enumerate(nets)
    )
    numbers = {"loss": 1.0, "highest": 3.0, "skipped": 0, "exploded": 0, "steps": 7}
    return Outcome(variant, seed, scores, **{**numbers, **changed})


def test_tables_by_hand():
    way = ("W4A4", "minmax")
    found = [
        outcome("a", 0, {("FP32", ""): [0.5, 0.7], way: [0.2, 0.4]}),
        outcome("a", 1, {("FP32", ""): [0.8, 0.8], way: [0.3, 0.3]}),
        outcome("b", 0, {("FP32", ""): [0.7, 0.9], way: [0.5, 0.3]}, skipped=2, loss=2.0),
        outcome("b", 1, {("FP32", ""): [0.7, 0.7], way: [0.3, 0.3]}, highest=9.0),
    ]
    columns, rows = accuracy_table(found, "id")
    assert columns == ["GHN", "FP32", "W4A4 minmax"]
    assert rows[0] == ["a", "70.0 ± 14.1 / 80.0", "30.0 ± 0.0 / 40.0"]
    rows = difference_table(found, "id", [("b", "a")])[1]
    assert rows == [["b - a", "+5.0 ± 21.2 (1 of 2)", "+5.0 ± 7.1 (1 of 2)"]]
    assert training_table(found)[1][1] == ["b", "7", "1.500 ± 0.707", "9.00", "2, 0", "0, 0"]


def curves():
    """Two seeds that come to 95 %, and one that never does."""
    paths = [((20, 0.5), (20 * 10**seed, 0.96), (9000, 0.9)) for seed in (1, 2)]
    paths.append(((20, 0.1), (9000, 0.2)))
    return [Curve("GHN-QAT, rescaled", 4, seed, path) for seed, path in enumerate(paths)]


def layers():
    found = weights_study.Layers("torch's default", [0.41] * 4, [-1.19] * 4, [1.76] * 4)
    found.noise = {bits: [-48.1] * 4 for bits in weights_study.BITS}
    return found


def test_tables_fit_a_terminal(capsys):
    name = "all widths, told"
    ways = [("FP32", ""), ("W8A8", "minmax"), ("W8A8", "percentile"), ("W4A4", "minmax")]
    found = [outcome(name, seed, {way: [0.2, 0.4] for way in ways}) for seed in range(3)]
    tables = [*screen_tables("widths", found), start_study.screen_table(curves(), (0.9, 0.95))]
    for table in (*tables, weights_study.screen_table([layers()])):
        Console(width=80).print(table)
    shown = capsys.readouterr().out
    assert shown.count(name) == 2 and "percentile" not in shown and "…" not in shown
    assert shown.count("30.0 ± 0.0") == shown.count("/ 40.0") == 3
    assert shown.count("GHN-QAT, rescaled") == 1
    assert shown.count("1100 ± 1273") == shown.count("1 never") == 2
    assert shown.count("torch's default") == 1 and shown.count("-48.1") == 3


@pytest.mark.parametrize(
    ("command", "module", "function", "result"),
    [
        ("ghn-study", study, "run_study", [outcome("a", 0, {("FP32", ""): [0.25]})]),
        ("ghn-start", start_study, "run_starts", curves()),
        ("ghn-weights", weights_study, "run_weights", [layers()]),
    ],
)
def test_commands(monkeypatch, tmp_path, command, module, function, result):
    called = []
    monkeypatch.setattr(module, function, lambda *a, **k: called.append((a, k)) or result)
    words = ["--epochs", "6", "--seeds", "2", "--jobs", "1", "--set", "batch_size=16"]
    done = CliRunner().invoke(app, [command, "--out", str(tmp_path / "x"), *words])
    assert done.exit_code == 0, done.output
    assert f"x/{'quantized' if function == 'run_study' else command[4:]}/report.md" in done.output
    ((arguments, named),) = called
    assert arguments[-1] == tmp_path / "x" and named == {"seeds": range(2), "jobs": 1}
    plan = arguments[-2].ghn if function == "run_starts" else arguments[-2]
    assert (plan.epochs, plan.tuning_epochs, plan.train) == (6, 3, {"batch_size": 16})
    refused = CliRunner().invoke(app, [command, "--set", "lr=1"])
    assert refused.exit_code == 2 and "--set: lr must be left to --lr" in refused.output
    assert len(called) == 1


def test_a_run_that_gave_up_is_a_row():
    way = ("W4A4", "minmax")
    found = [
        outcome("a", 0, {way: [0.2, 0.4]}),
        outcome("a", 1, {way: [0.5, 0.5]}),
        outcome("b", 0, {}, skipped=101, steps=150),
        outcome("b", 1, {way: [0.6, 0.6]}),
        outcome("c", 0, {}),
        outcome("c", 1, {}),
    ]
    rows = accuracy_table(found, "id")[1]
    assert rows[1:] == [["b", "60.0 / 60.0 (1 gave up)"], ["c", "gave up"]]
    rows = difference_table(found, "id", [("b", "a"), ("c", "a")])[1]
    assert rows == [["b - a", "+10.0 (1 of 1)"], ["c - a", "gave up"]]
    assert training_table(found)[1][1][-2:] == ["101, 0", "0, 0"]


def test_a_study_goes_on_past_a_run_that_gives_up(tmp_path, monkeypatch):
    def fail(self, loss, norm):
        if self.training.quantizer.kind == "none":
            return True
        raise FloatingPointError("ghn: gradients must be finite")

    monkeypatch.setattr(GhnRecipe, "accepts", fail)
    monkeypatch.setitem(STUDIES, "small", Study(("w2", "q"), (("w2", "q"),)))
    for _ in range(2):
        first, second = run_study("small", PLAN, tmp_path, seeds=range(1))
        assert first.scores == () and first.steps == 0 and len(second.scores) == 4
        assert (tmp_path / "runs" / "w2" / "seed0" / GAVE_UP).exists()
    assert "gave up" in (tmp_path / "small" / "report.md").read_text()


def test_steps_to_an_accuracy_by_hand():
    points = ((20, 0.4), (40, 0.92), (60, 0.91))
    curves = [Curve("a", 4, 0, points), Curve("a", 4, 1, ((20, 0.95), (40, 0.5), (60, 0.89)))]
    assert curves[0].steps_to(0.9) == 40 and curves[0].steps_to(0.95) == math.inf
    columns, rows = start_table(curves, (0.9, 0.95, 0.99))
    assert columns[2:5] == ["steps to 90 %", "steps to 95 %", "steps to 99 %"]
    assert rows[0][:5] == ["W4A4", "a", "30 ± 14", "20, 1 never", "never"]
    assert rows[0][5:] == ["67.5 ± 38.9", "90.0 ± 1.4"]


def test_bad_studies(tmp_path):
    with pytest.raises(ValueError, match=r"ghn-study: study must be one of .*, got 'all'"):
        run_study("all", PLAN, tmp_path / "x")
    with pytest.raises(ValueError, match="ghn-study: seeds must be at least one, got none"):
        run_study("heads", PLAN, tmp_path / "x", seeds=[])
    with pytest.raises(ValueError, match="ghn-start: bits must be of 8, 4 and 2"):
        StartPlan(PLAN, default_qat("digits", {}), bits=(3,))
    told = Plan(evaluation=EvalPlan(bits=(3,)))
    with pytest.raises(ValueError, match="ghn-eval: bits must be among 2, 4, 8, 32"):
        run_study("widths", told, tmp_path / "x")
    assert not (tmp_path / "x").exists()
