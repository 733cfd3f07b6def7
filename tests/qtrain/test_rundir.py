"""A run directory: whole files or none, one config, metrics cut back to the checkpoint."""

import json

import pytest
import torch
from qtrain.rundir import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    MODEL,
    RunDir,
    config_differences,
    load_model_file,
    read_metrics,
)


def opened(path, **config):
    run = RunDir(path, config or {"lr": 0.1})
    run.create()
    return run


def test_nothing_is_written_before_create(tmp_path):
    RunDir(tmp_path / "run", {"lr": 0.1})
    assert not list(tmp_path.iterdir())


def test_config_clash_names_the_keys(tmp_path):
    opened(tmp_path / "run", train={"lr": 0.1, "model": "cnn", "widths": (1, 2)})
    RunDir(tmp_path / "run", {"train": {"lr": 0.1, "model": "cnn", "widths": (1, 2)}})
    before = (tmp_path / "run" / CONFIG).read_bytes()
    with pytest.raises(ValueError) as error:
        RunDir(tmp_path / "run", {"train": {"lr": 0.2, "model": "cnn", "widths": (1, 3)}})
    text = str(error.value)
    assert "train.lr (0.1 there, 0.2 asked for)" in text and "train.widths ([1, 2] there" in text
    assert "model" not in text and "--overwrite" in text
    assert (tmp_path / "run" / CONFIG).read_bytes() == before


def test_differences_of_nested_and_missing_keys():
    lines = config_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "d": None}, "c": 3})
    assert lines == ["a.d ('nothing' there, None asked for)", "c (2 there, 3 asked for)"]


def test_overwrite_replaces_a_run_only(tmp_path):
    run = opened(tmp_path / "run", lr=0.1)
    run.append({"step": 1})
    again = RunDir(tmp_path / "run", {"lr": 0.2}, overwrite=True)
    assert run.metrics() == [{"step": 1}]
    again.create()
    assert again.metrics() == [] and json.loads((again.path / CONFIG).read_text())["lr"] == 0.2

    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"must be new, empty or hold a run.*thesis.tex"):
        RunDir(strange, {"lr": 0.2}, overwrite=True)
    (strange / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="must be written by qtrain"):
        RunDir(strange, {"lr": 0.2}, overwrite=True)
    assert (strange / "thesis.tex").read_text() == "years of work"


def test_a_run_of_another_kind_is_not_overwritten(tmp_path):
    """A report on a model that is written into the model's own directory would delete it."""
    opened(tmp_path, train={"lr": 0.1}, recipe={"name": "float"})
    for other in ({"flatness": {}}, {"train": {"lr": 0.1}, "recipe": {"name": "ptq"}}):
        with pytest.raises(ValueError, match=r"must be another one, got one that holds .* float"):
            RunDir(tmp_path, other, overwrite=True)
    RunDir(tmp_path, {"train": {"lr": 0.2}, "recipe": {"name": "float"}}, overwrite=True)


def test_killed_while_the_config_was_written(tmp_path):
    (tmp_path / f"{CONFIG}.part").write_bytes(b'{"lr": 0')
    assert json.loads((opened(tmp_path).path / CONFIG).read_text())["lr"] == 0.1


def test_a_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="must be a directory, got a file"):
        RunDir(tmp_path / "run", {})


def test_checkpoint_cuts_the_metrics(tmp_path):
    run = opened(tmp_path)
    run.append({"step": 1})
    run.save_checkpoint({"step": 1, "weights": torch.arange(3.0)})
    run.append({"step": 2})
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert read_metrics(tmp_path / METRICS) == [{"step": 1}, {"step": 2}]
    saved = run.load_checkpoint()
    assert saved["step"] == 1 and torch.equal(saved["weights"], torch.arange(3.0))
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n'


def test_no_checkpoint_no_metrics(tmp_path):
    run = opened(tmp_path)
    run.append({"step": 1})
    assert run.load_checkpoint() is None and run.metrics() == []


def test_metrics_shorter_than_the_checkpoint_knows(tmp_path):
    run = opened(tmp_path)
    run.append({"step": 1})
    run.save_checkpoint({"step": 1})
    (tmp_path / METRICS).write_bytes(b"")
    with pytest.raises(ValueError, match=r"metrics.jsonl must have the 12 bytes .*got 0"):
        run.load_checkpoint()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_checkpoint(tmp_path, damage):
    run = opened(tmp_path)
    run.save_checkpoint({"step": 1, "weights": torch.zeros(1000)})
    path = tmp_path / CHECKPOINT
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flip":
        # inside the zeros of the weights, where a zip reader would not look
        data[data.index(bytes(2000)) + 700] ^= 1
    elif damage == "empty":
        data.clear()
    else:
        torch.save({"step": 1}, path)
        data = bytearray(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint\.pt must be a whole"):
        run.load_checkpoint()


def test_model_file(tmp_path):
    run = opened(tmp_path)
    run.save_model({"w": torch.arange(6.0).view(2, 3).T}, {"model": "cnn"})
    for path in (tmp_path, tmp_path / MODEL):
        state, meta = load_model_file(path)
        assert torch.equal(state["w"], torch.arange(6.0).view(2, 3).T) and meta == {"model": "cnn"}
    whole = (tmp_path / MODEL).read_bytes()
    (tmp_path / MODEL).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        load_model_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*nowhere"):
        load_model_file(tmp_path / "nowhere")
