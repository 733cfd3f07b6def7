"""Progress, tables and step times."""

import json

import pytest
import torch
from qtrain import progress
from qtrain.data import load_dataset
from qtrain.progress import Track
from qtrain.recipe import Recipe, TrainConfig, new_model
from qtrain.report import Row, markdown_table, plot_accuracy, plot_curves, read_rows, row_dicts
from qtrain.timing import WARM_UP, median_step_seconds

ROWS = [
    Row("float", None, 0.985, 0.05, 0.002),
    Row("PTQ", (2, 4), 0.5, 1.25),
    Row("QAT LSQ", (2, 4), 0.97, 0.1, 0.003, 1.5),
]


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    with Track(4, "float") as track:
        track.advance(1)
        track.relabel("QAT")
        track.advance(2, "loss 0.5")
    assert capsys.readouterr().out == "float: 1/4, 0 s\nQAT: 3/4, 0 s, loss 0.5\n"


def test_no_lines_before_two_seconds_or_when_quiet(capsys, monkeypatch):
    with Track(2, "float") as track:
        track.advance()
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    with Track(2, "float", quiet=True) as track:
        track.advance()
    assert capsys.readouterr().out == ""


def test_markdown_table():
    assert markdown_table(ROWS).splitlines() == [
        "| model | bits | accuracy | loss | s / step | QAT step / float step |",
        "|---|---|---:|---:|---:|---:|",
        "| float | FP32 | 98.5 % | 0.0500 | 0.00200 | - |",
        "| PTQ | W2A4 | 50.0 % | 1.2500 | - | - |",
        "| QAT LSQ | W2A4 | 97.0 % | 0.1000 | 0.00300 | 1.50 |",
    ]


def test_rows_survive_their_file(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"rows": row_dicts(ROWS)}))
    assert read_rows(tmp_path) == ROWS


def test_a_run_without_an_evaluation(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {"name": "float"}}))
    with pytest.raises(ValueError, match=r"report: .* must hold a run that was evaluated"):
        read_rows(tmp_path)


def test_plots(tmp_path):
    plot_accuracy(tmp_path / "a.png", ROWS)
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    plot_curves(tmp_path / "c.png", {"x": [*records, {"step": 2, "test_accuracy": 0.5}]})
    for name in ("a.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "c.png"}


def test_steps_take_turns_and_leave_the_weights():
    config = TrainConfig(model_options={"widths": [4, 4], "strides": [2, 2]})
    data, order = load_dataset("digits"), []

    class Named(Recipe):
        def __init__(self, name):
            self.called = name

        def loss(self, model, batch, step):
            order.append(self.called)
            return super().loss(model, batch, step)

    models = {name: new_model(config, data) for name in "ab"}
    before = [p.detach().clone() for p in models["a"].parameters()]
    candidates = {name: (model, Named(name)) for name, model in models.items()}
    seconds = median_step_seconds(candidates, data, config, rounds=3)
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == WARM_UP + 3 and set(rounds) == {"ab", "ba"}
    assert set(seconds) == {"a", "b"} and min(seconds.values()) > 0
    assert all(torch.equal(p, q) for p, q in zip(models["a"].parameters(), before, strict=True))
