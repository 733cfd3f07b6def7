"""bwrf-study: its arms, what they share, and what it measures."""

import json
import pickle
from dataclasses import replace

import pytest
from qtrain import bwrf_study
from qtrain.bwrf_study import NAMES, Plan, arms_of, measured, settings_for, tasks, time_factor
from qtrain.loop import train
from qtrain.progress import Track
from qtrain.recipe import Recipe
from qtrain.report import RESULTS
from qtrain.rundir import CONFIG, MODEL
from test_commands import call, one_line

NET = {"widths": [4, 8, 8], "strides": [2, 2, 1]}


@pytest.fixture
def plan():
    return Plan(settings_for("digits", epochs=4, model_options=NET), bits=(4, 2))


def test_arms_differ_in_what_they_are_named_for():
    modes, references = arms_of("modes", 3)
    assert [a.changed for a in modes[:2]] == [None, None] and modes[1].longer
    assert [a.changed for a in modes[2:]] == [
        {"beta": 0.0},
        {},
        {"mode": "single"},
        {"mode": "sampled"},
    ]
    assert references == modes[:3]
    depths, references = arms_of("depths", 3)
    assert [a.changed["block"] for a in depths[2:]] == [1, 2, 3] and references == depths[:2]
    for name in NAMES:
        arms, references = arms_of(name, 4)
        assert len({a.slug for a in arms}) == len({a.name for a in arms}) == len(arms)
        assert all(reference in arms for reference in references)
    # one treatment has one directory in all studies
    every = [arm for name in NAMES for arm in arms_of(name, 4)[0]]
    for arm in every:
        assert all(arm.changed == other.changed for other in every if other.slug == arm.slug)


def test_tasks_share_all_but_the_arm(plan, tmp_path):
    arms, _ = arms_of("modes", 3)
    found = tasks(arms, plan, tmp_path, [0, 1], longer=2.6)
    assert len(found) == 2 * 6 * 2 == len({task.out for task in found})
    for task in found:
        epochs = 10 if task.arm.longer else 4
        assert task.config == replace(plan.qat, seed=task.seed, epochs=epochs)
        assert task.source == tmp_path / "runs" / "float" / f"seed{task.seed}"
    assert plan.float_config(1) == replace(plan.qat, seed=1, epochs=20, lr=5e-3)


def test_presets():
    shapes = settings_for("shapes")
    assert (shapes.model, shapes.model_options) == ("resnet8", {"width": 8})
    assert shapes.data_options["difficulty"] == 0.7
    mobile = settings_for("shapes", model="mobile", data_options={"train_size": 64})
    assert mobile.model_options == {} and mobile.data_options["train_size"] == 64
    assert mobile.data_options["difficulty"] == 0.7
    assert settings_for("cifar10", model="resnet20").data_options == {}


def test_time_is_measured_once_for_a_directory(plan, tmp_path, monkeypatch):
    source = tmp_path / "float"
    with Track(1, "", quiet=True) as track:
        train(replace(plan.qat, epochs=1), Recipe(), source, cpu=True, track=track)
    assert measured(plan, source, rounds=2) > 0
    answers = iter([2.5, 3.5])
    monkeypatch.setattr(bwrf_study, "measured", lambda plan, source: next(answers))
    assert [time_factor(plan, source, tmp_path) for _ in range(3)] == [2.5] * 3
    assert json.loads((tmp_path / "time.json").read_text())["time_factor"] == 2.5
    assert time_factor(replace(plan, bits=(2,)), source, tmp_path) == 2.5
    assert time_factor(replace(plan, time_factor=1.2), source, tmp_path) == 1.2
    other = replace(plan, qat=replace(plan.qat, batch_size=32))
    assert time_factor(other, source, tmp_path) == 3.5


def test_study(tmp_path, monkeypatch):
    def in_this_process(jobs, work, **how):
        """Without the time that processes take to start; jobs go there as bytes."""
        return ((job, work(pickle.loads(pickle.dumps(job)))) for job in jobs)

    monkeypatch.setattr(bwrf_study, "run_all", in_this_process)
    arguments = ["--out", tmp_path, "--dataset", "digits", "--bits", 2, "--epochs", 1, "--jobs", 1]
    arguments += ["--float-epochs", 2, "--seeds", 2, "--time-factor", 2.4]
    arguments += [f"--set=model_options.{name}={value}" for name, value in NET.items()]
    text = call("bwrf-study", "modes", *arguments).output
    report = (tmp_path / "modes" / "report.md").read_text()
    for arm in ("plain QAT", "longer QAT, 2 epochs", "distillation only", "prefix", "sampled"):
        assert f"| {arm} |" in report
    assert "W2A2" in text and "2 seeds (0, 1)" in report
    scores = json.loads((tmp_path / "modes" / RESULTS).read_text())["scores"]
    assert len(scores) == 6 * 2
    assert len({(s["seed"], s["float_accuracy"]) for s in scores}) == 2
    assert len({s["accuracy"] for s in scores}) > 6
    longer = json.loads((tmp_path / "runs/qat-time/w2a2/seed1" / CONFIG).read_text())
    assert longer["train"]["epochs"] == 2 and longer["train"]["seed"] == 1
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"**/{MODEL}")}
    assert len(runs) == 2 + 6 * 2
    # another study shares the runs that it has in common
    call("bwrf-study", "effects", *arguments)
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
    assert len(list((tmp_path / "runs").glob(f"**/{MODEL}"))) == len(runs) + 2 * 2
    # a clash is found before anything is run
    clash = one_line(call("bwrf-study", "modes", *arguments, "--float-lr", 0.5, code=2))
    assert "train.lr (0.005 there, 0.5 asked for)" in clash


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all"], "bwrf-study: study must be one of modes, depths, schedules, effects, got 'all'"),
        (["--set", "seed=7"], "seed must be left to --seeds"),
        (["--bits", "0"], "--bits: it must be whole numbers from 1 to 16"),
        (["--method", "none"], "qat: method must be one of"),
        (["--time-factor", "0"], "bwrf-study: time_factor must be positive, got 0"),
        (["--dataset", "mnist"], "digits, shapes, cifar10"),
        (["--model", "timm/regnetx_002"], "model must be one with two blocks or more"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, arguments, words):
    error = one_line(call("bwrf-study", "--out", tmp_path / "study", *arguments, code=2))
    assert words in error and not list(tmp_path.iterdir())
