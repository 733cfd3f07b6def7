"""The study over seeds: runs that are kept, tables that follow the scores."""

import json
from dataclasses import replace

import pytest
from qtrain.adaround import AdaRound
from qtrain.basin_measure import BasinConfig
from qtrain.basin_result import QAT
from qtrain.basin_run import BasinData
from qtrain.basin_study import (
    ADAROUND,
    ARMS,
    CONTROL,
    METHOD,
    claims,
    diagnosis_table,
    gain,
    run_study,
    scores,
    settings_for,
)
from qtrain.basin_train import Schedule
from qtrain.cli import app, basin
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
    reports = run_study(base, tmp_path, CONFIG, images, seeds=(1, 0), jobs=1)
    assert list(reports) == [0, 1]
    found = scores(reports)
    assert [s.arm for s in found] == [arm for arm in ARMS for _ in range(2)]
    qat = [s for s in found if s.arm == QAT]
    assert [s.accuracy for s in qat] == [r.width(2).qat.test_accuracy for r in reports.values()]
    assert [s.float_accuracy for s in qat] == [r.home.test_accuracy for r in reports.values()]
    text = (tmp_path / "report.md").read_text()
    assert all(arm in text for arm in ARMS) and (tmp_path / "study.png").exists()
    columns, rows = diagnosis_table(reports)
    assert len(rows) == 1 and len(rows[0]) == len(columns)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["verdicts"]["1"] == reports[1].verdict
    # another seed goes on from what is there
    made = (tmp_path / "seed0" / "float" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"evaluation_images must be in 1\.\.1297, got 5000"):
        run_study(base, tmp_path, CONFIG, replace(images, evaluation_images=5000), seeds=[0])
    with pytest.raises(ValueError, match="basin-study: seeds must be at least one, got none"):
        run_study(base, tmp_path, CONFIG, images, seeds=[])
    assert (tmp_path / "seed0" / "float" / "model.safetensors").stat().st_mtime_ns == made


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
