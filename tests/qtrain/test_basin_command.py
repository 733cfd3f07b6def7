"""qtrain basin from a checkpoint, by the command line."""

import json
import shlex

import pytest
from PIL import Image
from qtrain.basin_measure import BasinConfig
from qtrain.basin_pictures import draw
from qtrain.basin_run import BasinData, read_report
from qtrain.basin_train import Schedule
from qtrain.cli import app, basin
from qtrain.loop import train
from qtrain.recipe import Recipe, TrainConfig
from qtrain.report import read_rows
from typer.testing import CliRunner

assert basin.app is app
TINY = ["--steps", "4", "--record-every", "2", "--adaround-iterations", "2", "--slice-points", "2"]
TINY += ["--evaluation-images", "32", "--calibration-images", "32", "--batch-size", "32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("float") / "run"
    options = {"widths": [4, 8], "strides": [2, 2]}
    config = TrainConfig(model="cnn", model_options=options, epochs=2, label_smoothing=0.1)
    train(config, Recipe(), out)
    return out


def call(*words):
    return CliRunner().invoke(app, ["basin", *map(str, words)])


def test_command(checkpoint, tmp_path):
    out = tmp_path / "run"
    done = call(checkpoint, "--out", out, "--bits", "3,2", *TINY)
    assert done.exit_code == 0, done.output
    report = read_report(out / "results.json")
    assert [width.bits for width in report.widths] == [3, 2]
    for sentence in report.verdict:
        assert sentence in done.output and sentence in (out / "report.md").read_text()
    # the float model's score is that of the run it comes from
    trained = read_rows(checkpoint)[0]
    assert (report.home.test_accuracy, report.home.test_loss) == (trained.accuracy, trained.loss)
    rows = read_rows(out)
    assert len(rows) == 1 + 2 * 7 and rows[1].bits == (3, 32)
    assert rows[0].accuracy == report.home.test_accuracy
    settings = json.loads((out / "config.json").read_text())["recipe"]
    assert settings["evaluation_images"] == 32 and settings["schedule"]["steps"] == 4
    shown = (out / "report.md").read_text()
    again = next(line for line in shown.splitlines() if line.startswith("Again: `qtrain basin"))
    before = (out / "results.json").read_bytes()
    # the command in the report is the one that made it: a finished run is read back
    program, *words = shlex.split(again.split("`")[1])
    assert program == "qtrain" and words[:2] == ["basin", str(checkpoint)]
    made = (out / "w2" / "results.json").stat().st_mtime_ns
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (out / "results.json").read_bytes() == before and "no option" not in shown
    assert (out / "w2" / "results.json").stat().st_mtime_ns == made
    assert not list(out.rglob("*.part"))


def test_pictures_are_whole(checkpoint, tmp_path):
    out = tmp_path / "run"
    assert call(checkpoint, "--out", out, "--bits", "2", *TINY).exit_code == 0
    report = read_report(out / "results.json")
    names = draw(report, out)
    assert len(names) == 4
    for name in names:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG" and len(picture.convert("L").getcolors(256)) > 10
        assert f"({name})" in (out / "report.md").read_text()


def test_without_a_plane(checkpoint, tmp_path):
    out = tmp_path / "run"
    # the last of an option counts
    words = [*TINY, "--bits", "2", "--slice-points", "0"]
    assert call(checkpoint, "--out", out, *words).exit_code == 0
    assert not (out / "basin_slices.png").exists()
    assert "basin_slices" not in (out / "report.md").read_text()
    assert read_report(out / "results.json").width(2).plane is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "4,x"], "--bits: it must be whole numbers from 1 to 16"),
        (["--bits", "17"], "--bits: it must be whole numbers from 1 to 16"),
        (["--grid", "lsq"], "basin: grid must be one of minmax, mse, got 'lsq'"),
        (["--evaluation-images", "5000"], "examples must be in 1..1297"),
        (["--calibration-images", "5000"], "images must be at most the 1297"),
        (["--steps", "0"], "basin: steps must be at least 1, got 0"),
        (["--adaround-iterations", "0"], "adaround: iterations must be at least 1, got 0"),
    ],
)
def test_bad_input_leaves_nothing(checkpoint, tmp_path, words, message):
    out = tmp_path / "run"
    done = call(checkpoint, "--out", out, *TINY, *words)
    assert done.exit_code == 2 and message in done.output
    assert not out.exists()


def test_a_run_is_no_float_checkpoint(checkpoint, tmp_path):
    out = tmp_path / "run"
    assert call(checkpoint, "--out", out, "--bits", "2", *TINY).exit_code == 0
    done = call(out / "w2", "--out", tmp_path / "other", *TINY)
    assert done.exit_code == 2 and "must be of a float model, got one of basin" in done.output
    done = call(checkpoint, "--out", out, "--bits", "3", *TINY)
    assert done.exit_code == 2 and "recipe.bits ([2] there, [3] asked for)" in done.output


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (BasinConfig, "profile_points", 2.5),
        (BasinConfig, "slice_points", 2.5),
        (BasinConfig, "slice_points", False),
        (BasinConfig, "first_last_bits", 8.0),
        (BasinConfig, "seed", 0.5),
        (Schedule, "steps", 2.5),
        (Schedule, "record_every", True),
        (BasinData, "evaluation_images", 2.5),
    ],
)
def test_whole_numbers(make, name, value):
    with pytest.raises(TypeError, match=f"basin: {name} must be a whole number, got {value}"):
        make(**{name: value})
    with pytest.raises(TypeError, match=r"basin: bits must be a whole number, got 2\.5"):
        BasinConfig(bits=(2.5,))
