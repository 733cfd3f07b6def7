"""The study over seeds: runs that are kept, tables that follow the scores."""

import json
import shlex
from dataclasses import replace

import pytest
from qtrain.adaround import AdaRound
from qtrain.basin_measure import BasinConfig
from qtrain.basin_result import QAT
from qtrain.basin_run import BasinData
from qtrain.basin_study import CONFIG as BASE
from qtrain.basin_study import command_of, run_study, settings_for
from qtrain.basin_study_report import (
    ADAROUND,
    ARMS,
    CONTROL,
    METHOD,
    claims,
    diagnosis_table,
    gain,
    scores,
)
from qtrain.basin_train import Schedule
from qtrain.cli import app, basin
from qtrain.cli.options import parse_settings
from qtrain.study import Score
from typer.testing import CliRunner

assert basin.app is app
CONFIG = BasinConfig(
    bits=(2,),
    schedule=Schedule(steps=2),
    adaround=AdaRound(iterations=1),
    profile_points=2,
    slice_points=0,
)
TINY = {"widths": [4, 8], "strides": [2, 2]}


def test_study(tmp_path):
    base = settings_for("digits", model="cnn", model_options=TINY, epochs=1)
    images = BasinData(evaluation_images=32, calibration_images=32)
    reports = run_study(base, tmp_path, CONFIG, images, seeds=(2, 1), jobs=1)
    assert list(reports) == [1, 2]
    found = scores(reports)
    assert [s.arm for s in found] == [arm for arm in ARMS for _ in range(2)]
    qat = [s for s in found if s.arm == QAT]
    assert [s.accuracy for s in qat] == [r.width(2).qat.test_accuracy for r in reports.values()]
    assert [s.float_accuracy for s in qat] == [r.home.test_accuracy for r in reports.values()]
    text = (tmp_path / "report.md").read_text()
    assert all(arm in text for arm in ARMS) and (tmp_path / "study.png").exists()
    columns, rows = diagnosis_table(reports)
    assert len(rows) == 1 and len(rows[0]) == len(columns)
    command = next(line for line in text.splitlines() if line.startswith("Again: `qtrain"))
    assert command == (
        "Again: `qtrain basin-study --dataset digits --seeds 3 --bits 2 --steps 2 --lr 0.001 "
        "--grid minmax --batchnorm frozen --adaround-iterations 1 --epochs 1 --model cnn --set "
        "'model_options.widths=[4,8]' --set 'model_options.strides=[2,2]'`; it has no option for "
        "schedule.record_every 10, profile_points 2, slice_points 0, evaluation_images 32, "
        "calibration_images 32, the seeds 1, 2 alone."
    )
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["verdicts"]["1"] == reports[1].verdict
    # a report that is there with other settings is refused before a seed that comes first is made
    with pytest.raises(ValueError, match=r"seed1/basin must hold .*grid \('minmax' there, 'mse'"):
        other = replace(CONFIG, grid="mse")
        run_study(base, tmp_path, other, images, seeds=range(3), jobs=1)
    assert not (tmp_path / "seed0").exists()
    made = (tmp_path / "seed1" / "float" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"evaluation_images must be in 1\.\.1297, got 5000"):
        run_study(base, tmp_path, CONFIG, replace(images, evaluation_images=5000), seeds=[0])
    with pytest.raises(ValueError, match="basin-study: seeds must be at least one, got none"):
        run_study(base, tmp_path, CONFIG, images, seeds=[])
    assert (tmp_path / "seed1" / "float" / "model.safetensors").stat().st_mtime_ns == made


def test_the_command_of_a_report_makes_it_again(tmp_path):
    words = ["basin-study", "--out", str(tmp_path), "--seeds", "1", "--jobs", "1", "--bits", "2"]
    words += ["--steps", "2", "--adaround-iterations", "1", "--epochs", "1", "--model", "cnn"]
    changed = ("batch_size=128", "lr=0.0125", "optimizer=adamw", "model_options.widths=[4,8]")
    for setting in (*changed, "model_options.strides=[2,2]"):
        words += ["--set", setting]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.md").read_text()
    program, *again = shlex.split(text.split("Again: `")[1].split("`")[0])
    assert program == "qtrain" and "no option" not in text
    assert {w for w in again if "=" in w} == {w for w in words if "=" in w}
    parts = [tmp_path / "seed0" / part for part in ("float/config.json", "basin/w2/results.json")]
    before = [(part.stat().st_mtime_ns, part.read_bytes()) for part in parts]
    done = CliRunner().invoke(app, [*again, "--out", str(tmp_path), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert [(part.stat().st_mtime_ns, part.read_bytes()) for part in parts] == before


def test_what_no_command_gives_is_named():
    base = replace(settings_for("digits"), dataset="cifar10", model_options={}, clip=1.0)
    line = command_of(base, replace(BASE, seed=3), BasinData(batch_size=64), [0])
    missing = "it has no option for dataset cifar10, no model_options.width"
    assert line.endswith(f"--set clip=1.0`; {missing}")
    options = {"width": 8, "norm": "true", "act": "relu"}
    word = replace(settings_for("digits"), model_options=options)
    words = shlex.split(command_of(word, BASE, BasinData(), [0, 1]).strip("`"))
    settings = parse_settings([w for w in words if "=" in w])
    assert settings == {"model_options": {"norm": "true", "act": "relu"}}


def test_settings():
    shapes = settings_for("shapes", data_options={"difficulty": 0.5})
    assert dict(shapes.data_options) == {"difficulty": 0.5, "train_size": 2560}
    assert settings_for("digits").model == "resnet20"
    assert settings_for("digits", model="mobile").model_options == {}
    with pytest.raises(ValueError, match="basin-study: dataset must be one of digits, shapes"):
        settings_for("mnist")
    done = CliRunner().invoke(app, ["basin-study", "--set", "seed=3"])
    assert done.exit_code == 2 and "seed must be left to --seeds" in done.output


def test_claims_follow_the_differences():
    # by hand: mean 2, deviation 1, error 0.58
    assert gain([1.0, 2.0, 3.0]) == "gain" and gain([-1.0, -2.0, -3.0]) == "loss"
    assert gain([-1.0, 2.0, 3.0]) == "tie" and gain([5.0]) == "one seed"
    found = []
    for arm, values in ((QAT, (0.9, 0.8)), (ADAROUND, (0.8, 0.71)), (CONTROL, (0.95, 0.75))):
        for seed, accuracy in enumerate(values):
            found.append(Score(arm, (2, 32), METHOD, seed, accuracy, 0.1, 0.95))
    _, rows = claims(found)
    assert rows == [["W2", "+1.30", "+9.50\n± 0.71", "gain", "+3.41", "+0.00\n± 7.07", "tie"]]
