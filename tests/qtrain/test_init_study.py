"""init-study: a study from end to end, its tables, and refusals."""

import json
import pickle
from pathlib import Path

import pytest
from qtrain import init_study
from qtrain.data import load_dataset
from qtrain.init_blocks import BlockNet
from qtrain.init_outcome import METHODS, Combination, LayerRange, Outcome, layer_ranges
from qtrain.init_report import (
    law_table,
    main_table,
    rank_table,
    report_text,
    short_table,
    side_table,
)
from qtrain.init_study import Plan, run_study, run_task, settings_for, tasks
from qtrain.loop import evaluate
from qtrain.ptq import calibration_images, sweep
from qtrain.recipe import TrainConfig
from qtrain.report import REPORT, RESULTS, Row, read_rows
from qtrain.rundir import MODEL, RunDir
from qtrain.source import FloatSource
from qtrain.study import PICTURE
from test_commands import call, one_line

NET = {"widths": [4, 8], "strides": [2, 2]}


@pytest.fixture
def here(monkeypatch):
    """The pool's work in this process, without the time that processes take to start; jobs go there
    as bytes."""

    def in_turn(jobs, work, **how):
        return ((job, work(pickle.loads(pickle.dumps(job)))) for job in jobs)

    monkeypatch.setattr(init_study, "run_all", in_turn)


PLAN = Plan(bits=(2,), images=64)
TWO = {"blocks": ["separable"], "initialisers": ["he_normal", "uniform_small"], "batchnorm": [True]}


def tiny(**changed):
    return settings_for("digits", **{"epochs": 1, "model_options": NET, **changed})


def test_study(tmp_path, here, monkeypatch):
    outcomes = run_study(tiny(), PLAN, tmp_path, **TWO, seeds=[0, 1])
    places = [(o.combination.initialiser, o.seed) for o in outcomes]
    assert places == [
        ("he_normal", 0),
        ("he_normal", 1),
        ("uniform_small", 0),
        ("uniform_small", 1),
    ]
    assert len({o.accuracy for o in outcomes}) > 1
    # the scores are those of the model that the run left
    run, first = tmp_path / "runs/separable-bn/he_normal/seed0", outcomes[0]
    source, data = FloatSource.load(run), load_dataset("digits")
    net = source.fill(BlockNet(1, 10, "separable", **NET)).eval()
    batches = calibration_images(data, TrainConfig(), 64)
    assert evaluate(net, data.test)["test_accuracy"] == first.accuracy
    how = {"bits": [(2, 2), (2, 16)], "methods": ["minmax"], "folds": [True]}
    (both, alone) = sweep(net, data.test, batches, per_tensor=True, **how)
    assert first.loss("tensor", (2, 2)) == 100 * (first.accuracy - both.accuracy)
    assert first.loss("tensor", (2, 16)) == 100 * (first.accuracy - alone.accuracy)
    assert both.method == METHODS["tensor"] == "PTQ minmax, per tensor"
    assert first.layers == layer_ranges(net, batches)
    assert read_rows(run) == list(first.rows)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / RESULTS).read_text())["outcomes"]
    assert [Outcome.from_dict(value) for value in kept] == outcomes
    # read back, without training or quantizing
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.delattr(init_study, "train")
        patch.delattr(init_study, "sweep")
        assert run_study(tiny(), PLAN, tmp_path, **TWO, seeds=[0, 1]) == outcomes
    pictures = {path for path in before if path.suffix == ".png"}
    assert all(path.read_bytes() == text for path, text in before.items() if path not in pictures)
    # other widths: the nets are quantized again, and not trained again
    models = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"**/{MODEL}")}
    again = run_study(tiny(), Plan(bits=(3,), images=64), tmp_path, **TWO, seeds=[0, 1])
    assert [o.accuracy for o in again] == [o.accuracy for o in outcomes]
    assert [row.bits for row in again[0].rows[1:4]] == [(3, 3), (3, 16), (16, 3)]
    assert models == {path: path.stat().st_mtime_ns for path in models} and len(models) == 4
    # other training in the same place
    with pytest.raises(ValueError, match=r"train.epochs \(1 there, 2 asked for\)"):
        run_study(tiny(epochs=2), PLAN, tmp_path, **TWO, seeds=[0])


def test_a_stopped_study_goes_on(tmp_path, here, monkeypatch):
    whole = run_study(tiny(), PLAN, tmp_path / "whole", **TWO, seeds=[0])

    def stopped(jobs, work, **how):
        yield jobs[0], work(jobs[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(init_study, "run_all", stopped)
        run_study(tiny(), PLAN, tmp_path / "parts", **TWO, seeds=[0])
    runs = tmp_path / "parts" / "runs" / "separable-bn"
    assert [path.parent.parent.name for path in runs.glob("*/*/config.json")] == ["he_normal"]
    # and the first was stopped between training and quantization
    (runs / "he_normal/seed0" / RESULTS).unlink()
    trained = (runs / "he_normal/seed0" / MODEL).stat().st_mtime_ns
    assert run_study(tiny(), PLAN, tmp_path / "parts", **TWO, seeds=[0]) == whole
    assert (runs / "he_normal/seed0" / MODEL).stat().st_mtime_ns == trained
    results = [(tmp_path / name / RESULTS).read_bytes() for name in ("whole", "parts")]
    assert results[0] == results[1]


def test_a_run_that_diverges_is_a_row(tmp_path, here, monkeypatch):
    wild = tiny(optimizer="sgd", lr=1e30)
    arguments = {**TWO, "batchnorm": [False], "initialisers": ["normal_large"], "seeds": [0]}
    (outcome,) = run_study(wild, PLAN, tmp_path, **arguments)
    assert outcome.failure == "loss not finite" and outcome.rows == () and outcome.accuracy is None
    row = "| separable | no | normal_large | 0 of 1 | not finite | did not train | - |"
    text = (tmp_path / REPORT).read_text()
    assert row in text and "- separable no normal_large, seed 0: loss not finite" in text
    monkeypatch.delattr(init_study, "train")
    assert run_study(wild, PLAN, tmp_path, **arguments) == [outcome]


def test_a_net_at_chance_did_not_train(tmp_path):
    still = tiny(lr=1e-12)
    one = Combination("conv", False, "normal_small")
    (task,) = tasks(still, PLAN, tmp_path, [one], [0])
    outcome = run_task(task)
    assert outcome.failure == "accuracy below 55 %" and outcome.accuracy < 0.3
    assert len(outcome.rows) == 1 + 2 * 3


def outcome_of(initialiser, seed, lost, *, batchnorm=True, failure=None, weight=1.0):
    """Of accuracy 90 %, less `lost` points at 2 bits per tensor, half of that per channel."""
    rows = [Row("float", None, 0.9, 1.0)]
    for name, share in (("channel", 0.5), ("tensor", 1.0)):
        rows += [
            Row(METHODS[name], bits, 0.9 - share * lost / 100, 1.0)
            for bits in Plan(bits=(2,)).widths()
        ]
    layers = (
        LayerRange("a", weight, 2.0, 0.5, 3.0, 4.0),
        LayerRange("b", 0.1, 8.0, 0.25, 6.0, 2.0),
    )
    return Outcome(Combination("conv", batchnorm, initialiser), seed, failure, tuple(rows), layers)


def test_tables():
    plan = Plan(bits=(2,))
    short = "accuracy below 55 %"
    outcomes = [
        outcome_of("he_normal", 0, 10, weight=1.0),
        outcome_of("he_normal", 1, 20, weight=3.0),
        outcome_of("he_uniform", 0, 40, weight=4.0),
        outcome_of("he_uniform", 1, 90, failure=short),
        outcome_of("he_normal", 0, -0.01, batchnorm=False, weight=0.5),
        outcome_of("normal_large", 0, 0, failure=short),
    ]
    columns, rows = main_table(plan, outcomes)
    assert columns[:7] == [
        "block",
        "BN",
        "initialiser",
        "trained",
        "float, %",
        "W2A2\nper channel",
        "W2A2\nper tensor",
    ]
    assert columns[7:] == ["max w", "max x", "share", "peak w", "peak x"]
    assert rows[0] == [
        "conv",
        "yes",
        "he_normal",
        "2 of 2",
        "90.0 ± 0.0",
        "7.5 ± 3.5",
        "15.0 ± 7.1",
        "2",
        "8",
        "0.25",
        "6",
        "4",
    ]
    # only seeds that trained count
    assert rows[1][3:8] == ["1 of 2", "90.0", "20.0", "40.0", "4"]
    assert rows[2][1] == "no" and rows[2][6] == "0.0"
    assert rows[3][3:7] == ["0 of 1", "90.0", "did not train", "-"]
    columns, rows = side_table(plan, outcomes)
    assert columns[3:] == ["W2A16\nper channel", "W2A16\nper tensor", "W16A2\nper channel"]
    assert rows[1][3:] == ["20.0", "40.0", "20.0"]
    assert short_table(plan, outcomes)[1][3] == ["conv BN normal_large", "90.0", "-", "-"]
    # the seeds that both trained: 40 - 10 points, half of that per channel
    assert law_table(plan, outcomes)[1] == [
        ["he_uniform less he_normal", "+15.0 (0 of 1)", "+30.0 (0 of 1)"]
    ]
    both = [*outcomes, outcome_of("he_uniform", 2, 30), outcome_of("he_normal", 2, 40)]
    assert law_table(plan, both)[1][0][2] == "+10.0 ± 28.3 (1 of 2)"
    # losses rise with max w; all the other figures are equal. One run without BatchNorm has no rank
    assert rank_table(plan, outcomes)[1][1] == ["W2A2", "per tensor", "+1.00", "-", "-", "-", "-"]
    falling = [outcome_of("he_normal", s, -s, batchnorm=False, weight=s + 1) for s in range(1, 4)]
    mixed = rank_table(plan, [*outcomes, *falling])[1][1]
    assert mixed == ["W2A2", "per tensor", "0.00", "-", "-", "-", "-"]
    text = report_text(tiny(), plan, outcomes)
    assert "4 runs that trained" in text and f"he_uniform, seed 1: {short}" in text


def test_settings():
    shapes = settings_for("shapes", data_options={"train_size": 640}, epochs=3)
    assert shapes.model == "blocknet" and shapes.model_options["widths"] == [16, 32, 64]
    assert (shapes.data_options["train_size"], shapes.data_options["difficulty"]) == (640, 0.5)
    (task,) = tasks(tiny(), PLAN, Path("out"), [Combination("residual", False, "he_normal")], [4])
    assert task.config.model_options == {**NET, "block": "residual", "batchnorm": False}
    assert task.config.seed == 4 and task.out.parts == (
        "out",
        "runs",
        "residual-plain",
        "he_normal",
        "seed4",
    )
    assert task.recipe().describe() == {"name": "float", "initialiser": "he_normal"}


def test_command(tmp_path, here):
    arguments = [
        "--out",
        tmp_path,
        "--blocks",
        "conv",
        "--initialisers",
        "he_uniform",
        "--seeds",
        1,
    ]
    arguments += ["--no-batchnorm", "--per-tensor", "--bits", "2", "--epochs", 1, "--jobs", 1]
    arguments += [f"--set=model_options.{name}={value}" for name, value in NET.items()]
    output = call("init-study", *arguments).output
    assert "conv he_uniform" in output and "report.md" in output
    kept = json.loads((tmp_path / RESULTS).read_text())
    assert kept["plan"]["granularities"] == ["tensor"]
    assert {row["method"] for row in kept["outcomes"][0]["rows"]} == {"float", METHODS["tensor"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "conv,dense"], "init-study: blocks must be some of conv, separable"),
        (["--initialisers", "he"], "init-study: initialisers must be some of normal_small"),
        (["--initialisers", "he_normal,he_normal"], "each once, got he_normal, he_normal"),
        (["--set", "seed=7"], "seed must be left to --seeds"),
        (["--set", "model=cnn"], "init-study: model must be blocknet, got cnn"),
        (["--set", "model_options.block=conv"], "model_options.block must be left to the study"),
        (
            ["--set", "model_options.widths=[4]"],
            "models: widths and strides must be some and equally",
        ),
        (["--bits", "17"], "--bits: it must be whole numbers from 1 to 16"),
        (["--calibration-images", "9999"], "images must be at most the 1297 training examples"),
        (["--dataset", "mnist"], "digits, shapes, cifar10"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, arguments, words):
    error = one_line(call("init-study", "--out", tmp_path / "study", *arguments, code=2))
    assert words in error and not list(tmp_path.iterdir())


def test_granularities_are_known():
    with pytest.raises(ValueError, match="init-study: granularities must be of channel, tensor"):
        Plan(granularities=("row",))


def test_a_damaged_result_is_named(tmp_path):
    (task,) = tasks(tiny(), PLAN, tmp_path, [Combination("conv", True, "he_normal")], [0])
    task.out.mkdir(parents=True)
    run = RunDir(task.out, {"train": vars(task.config), "recipe": task.recipe().describe()})
    run.create()
    (task.out / RESULTS).write_text("{}")
    with pytest.raises(ValueError, match=r"results.json must hold the results of a finished run"):
        run_task(task)
