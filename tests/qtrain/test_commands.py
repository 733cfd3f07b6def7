"""The command line: each command end to end, and errors in one line."""

import json

import pytest
from qtrain.cli import app, parse_settings
from qtrain.rundir import CHECKPOINT, CONFIG, METRICS, MODEL
from typer.testing import CliRunner

SMALL = ["--epochs", "1", "--cpu", "--set", "model_options.widths=[4,8,8,8]"]


def call(*arguments, code=0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


def one_line(outcome):
    """The error, alone on stderr: no traceback, no second line."""
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "float"
    outcome = call("train", "--out", out, *SMALL)
    assert "FP32" in outcome.output and "report.md" in outcome.output
    return out


def test_help():
    text = call("--help").output
    for command in ("demo", "train", "ptq", "qat", "report"):
        assert command in text
        assert "Usage" in call(command, "--help").output


def test_train_leaves_a_run(float_dir):
    files = {path.name for path in float_dir.iterdir()}
    assert files == {CONFIG, METRICS, CHECKPOINT, MODEL, "report.md", "curves.png"}
    assert "# float: float of cnn on digits" in (float_dir / "report.md").read_text()
    assert (float_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((float_dir / CONFIG).read_text())
    assert config["train"]["model_options"] == {"widths": [4, 8, 8, 8]}


def test_ptq_and_qat(float_dir, tmp_path):
    bits = ["--weight-bits", 4, "--activation-bits", 4]
    assert "W4A4" in call("ptq", float_dir, "--out", tmp_path / "ptq", *bits).output
    how = ["--epochs", 1, "--cpu", "--method", "minmax"]
    assert "W4A4" in call("qat", float_dir, "--out", tmp_path / "qat", *bits, *how).output
    for name in ("ptq", "qat"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files >= {CONFIG, METRICS, MODEL, "report.md"}
        assert any(file.endswith(".png") for file in files)
    table = call("report", float_dir, tmp_path / "ptq", tmp_path / "qat").output
    assert table.count("W4A4") == 2 and table.count("FP32") == 1


def test_errors_are_one_line(float_dir, tmp_path):
    clash = one_line(call("train", "--out", float_dir, *SMALL, "--lr", "0.5", code=2))
    assert "train.lr (0.005 there, 0.5 asked for)" in clash
    unknown = one_line(call("train", "--out", tmp_path / "x", "--dataset", "mnist", code=2))
    assert "digits, shapes, cifar10, cifar100, imagefolder, got 'mnist'" in unknown
    unknown = one_line(call("train", "--out", tmp_path / "x", "--model", "nope", code=2))
    assert "cnn, resnet8, resnet20, mobile, vit_tiny" in unknown
    missing = one_line(call("ptq", tmp_path / "nothing", "--out", tmp_path / "x", code=2))
    assert "nothing must be a model.safetensors or a run directory" in missing
    missing = one_line(call("report", tmp_path, code=2))
    assert "must be a run directory" in missing
    assert not list(tmp_path.iterdir())


def test_truncated_checkpoint(float_dir, tmp_path):
    out = tmp_path / "run"
    call("train", "--out", out, *SMALL)
    whole = (out / CHECKPOINT).read_bytes()
    (out / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    error = one_line(call("train", "--out", out, *SMALL, code=2))
    assert f"{out / CHECKPOINT} must be a whole checkpoint" in error and "--overwrite" in error
    call("train", "--out", out, *SMALL, "--overwrite")
    assert (out / MODEL).read_bytes() == (float_dir / MODEL).read_bytes()


def test_debug_keeps_the_traceback(tmp_path):
    outcome = CliRunner().invoke(app, ["--debug", "report", str(tmp_path)])
    assert isinstance(outcome.exception, FileNotFoundError)


def test_settings():
    parsed = parse_settings(["clip=1.0", "data_options.seed=3", "data_options.root=a=b", "clip=2"])
    assert parsed == {"clip": 2, "data_options": {"seed": 3, "root": "a=b"}}


@pytest.mark.parametrize("item", ["clip", "clipp=1", "clip.x=1", "data_options=1"])
def test_bad_settings(item):
    with pytest.raises(ValueError, match=r"--set: it must be NAME=VALUE .*got '" + item):
        parse_settings([item])
