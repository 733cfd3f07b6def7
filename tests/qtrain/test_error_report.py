"""The report of quantization errors, and the command error-model end to end."""

import io
import json
from dataclasses import replace

import pytest
import torch
from qtrain.cli import app
from qtrain.error_model import LayerErrors, error_model
from qtrain.error_report import (
    DISTANCES,
    MOST_ROWS,
    RATIOS,
    chosen,
    plot_histograms,
    report_text,
)
from qtrain.progress import Track
from qtrain.report import markdown_grid, rich_grid
from qtrain.rundir import CONFIG
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner


def test_grids_of_awkward_names():
    head, rows = ["x", "clean\nloss"], [["[a]|" + 40 * "b", "1\n± 2"]]
    grid = markdown_grid(head, rows, left=1)
    assert grid.splitlines() == [
        "| x | clean loss |",
        "|---|---:|",
        "| [a]\\|" + 40 * "b" + " | 1 ± 2 |",
    ]
    console = Console(file=io.StringIO(), record=True, width=30)
    console.print(rich_grid(head, rows, "", left=1, narrow=True))
    shown = console.export_text()
    assert "[a]|" in shown and shown.count("b") == 40


def test_a_deep_net_is_shown_in_part(tmp_path):
    assert chosen(MOST_ROWS) == list(range(MOST_ROWS))
    assert chosen(53) == [0, 1, 2, 3, 24, 25, 26, 27, 49, 50, 51, 52]
    assert chosen(13) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    with Track(1, "", quiet=True) as quiet:
        model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(9, 8)
        (row,) = error_model(model, [x], bits=[4], track=quiet)
    rows = [replace(row, layer=f"layer{i}") for i in range(53)]
    plot_histograms(tmp_path / "x.png", rows)
    recipe = {"method": "percentile", "percentile": 99.9, "images": 9, "fold": False}
    recipe["first_last_bits"] = 8
    config = {"train": {"model": "m", "dataset": "d", "seed": 3}, "recipe": recipe}
    text = report_text(config, rows, {4: "x.png"})
    assert "12 of 53 layers: the first 4, 4 in the middle, the last 4." in text
    assert "percentile 99.9" in text and "not folded." in text and "Seed 3." in text
    assert "First and last layer: at least 8 bits." in text
    assert text.count("| layer52 |") == 3
    assert text.count("KS rest uniform") == 1
    # what qkernels takes where no percentile is given
    default = {**config, "recipe": {**recipe, "percentile": None, "first_last_bits": None}}
    text = report_text(default, rows, {4: "x.png"})
    assert "ranges by percentile 99.0 over" in text and "has the bits of the others" in text


def call(*arguments, code=0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "float"
    call("train", "--out", out, "--epochs", "1", "--cpu", "--set", "model_options.widths=[4,8,8,8]")
    return out


def test_command(float_dir, tmp_path):
    out = tmp_path / "errors"
    command = ["error-model", float_dir, "--out", out, "--bits", "4,2"]
    outcome = call(*command)
    assert outcome.output.count("features.3.0") == 2 and "SQNR" in outcome.output
    assert "report.md" in outcome.output
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    pictures = {RATIOS, DISTANCES, "errors_4_bits.png", "errors_2_bits.png"}
    assert set(files) == {CONFIG, "results.json", "report.md", *pictures}
    assert all(files[name].startswith(b"\x89PNG") for name in pictures)
    rows = [LayerErrors.from_dict(row) for row in json.loads(files["results.json"])["layers"]]
    assert [(row.bits, row.layer) for row in rows][4:6] == [(4, "head"), (2, "features.0.0")]
    # 100 images of 8x8 pixels
    assert rows[0].activation.count == 6400
    assert [row.weight.bits for row in rows] == [8, 4, 4, 4, 8, 8, 2, 2, 2, 8]
    for row in rows[6:9]:
        assert row.weight.sqnr < 15 and row.ratio > 0
    # again, from the results and afresh: the same bytes
    for extra in ([], ["--overwrite"]):
        assert call(*command, *extra).output == outcome.output
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    other = call(*command, "--seed", 1, code=2)
    assert "train.seed (0 there, 1 asked for)" in other.stderr


def test_command_gives_the_first_and_last_layer_their_bits(float_dir, tmp_path):
    for given, bits in ((6, 6), (0, 2)):
        out = tmp_path / str(given)
        call("error-model", float_dir, "--out", out, "--bits", 2, "--first-last-bits", given)
        rows = json.loads((out / "results.json").read_text())["layers"]
        for side in ("weight", "activation"):
            assert [row[side]["bits"] for row in rows] == [bits, 2, 2, 2, bits]


def test_a_finished_run_is_read_back(float_dir, tmp_path):
    command = ["error-model", float_dir, "--out", tmp_path, "--bits", 4]
    before = call(*command).output
    file = tmp_path / "results.json"
    kept = json.loads(file.read_text())
    kept["layers"][1]["weight"]["sqnr"] = 77.7
    file.write_text(json.dumps(kept))
    after = call(*command).output
    assert "77.7" in after and "77.7" not in before
    assert "77.7" in (tmp_path / "report.md").read_text()
    for damage in ({}, {"layers": [{"layer": "x"}]}, {"layers": [{**kept["layers"][0], "y": 1}]}):
        file.write_text(json.dumps(damage))
        (line,) = call(*command, code=2).stderr.strip().splitlines()
        assert f"error-model: {file} must hold the results" in line and "--overwrite" in line


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--bits", "0"], "--bits: it must be whole numbers from 1 to 16"),
        (["--bits", "8,17"], "got '8,17'"),
        (["--calibration-images", 1298], "at most the 1297 training examples, got 1298"),
        (["--method", "lsq"], "method must be one of minmax, percentile, mse, got 'lsq'"),
        (["--percentile", 99.0], "percentile must be None unless"),
        (["--model", "resnet8"], "weights must be those of resnet8"),
    ],
)
def test_command_errors(float_dir, tmp_path, extra, text):
    outcome = call("error-model", float_dir, "--out", tmp_path / "x", *extra, code=2)
    assert text in outcome.stderr and len(outcome.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_command_refuses_other_files(float_dir, tmp_path):
    call("qat", float_dir, "--out", tmp_path / "qat", "--epochs", 1, "--cpu")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for path, text in (
        (tmp_path / "qat", "must be of a float model, got one of qat"),
        (tmp_path / "foreign.safetensors", "must say its dataset and model"),
        (tmp_path / "nothing", "must be a model.safetensors or a run directory"),
    ):
        outcome = call("error-model", path, "--out", tmp_path / "x", code=2)
        assert text in outcome.stderr and len(outcome.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
