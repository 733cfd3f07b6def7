"""The loop: killed at any moment it ends at the same bits; settings are checked; SWA averages."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from qtrain.cli import app
from qtrain.data import load_dataset
from qtrain.loop import evaluate, train
from qtrain.progress import Track
from qtrain.recipe import Recipe, TrainConfig, learning_rate, make_optimizer
from qtrain.rundir import CHECKPOINT, METRICS, MODEL, read_checkpoint, read_metrics
from typer.testing import CliRunner

TINY = {"model_options": {"widths": [4, 8], "strides": [2, 2]}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


class Noisy(Recipe):
    """Draws from torch's global generator in each step, and has a state of its own."""

    def __init__(self, die_at=None):
        self.die_at, self.mean = die_at, torch.zeros(())

    def loss(self, model, batch, step):
        x, y = batch
        return super().loss(model, (x + torch.rand_like(x) * self.mean, y), step)

    def on_step_end(self, model, step):
        if step == self.die_at:
            raise Killed
        self.mean = 0.9 * self.mean + 0.1 * next(model.parameters()).detach().abs().mean()

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def tiny(**settings):
    usual = {"epochs": 3, "batch_size": 128, "log_every": 4, "checkpoint_every": 7, **TINY}
    return TrainConfig(**{**usual, **settings})


def run(config, recipe, out, **how):
    with Track(1, "", quiet=True) as track:
        return train(config, recipe, out, cpu=True, track=track, **how)


def leaves(value):
    """The numbers in a checkpoint, tensors as bytes: its pickle also tells who shares a string."""
    if isinstance(value, dict):
        return {key: leaves(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [leaves(item) for item in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def bits(path):
    """Everything a run leaves, byte for byte."""
    files = {name: (path / name).read_bytes() for name in (MODEL, METRICS)}
    return {**files, CHECKPOINT: leaves(read_checkpoint(path / CHECKPOINT))}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "sgd", "lr": 0.1, "clip": 1.0, "swa_start": 0.3}],
    ids=["adamw", "sgd, clip, swa"],
)
def test_interrupted_run_ends_at_the_same_bits(tmp_path, settings, two_threads):
    config = tiny(**settings)
    run(config, Noisy(), tmp_path / "whole")
    # before the first checkpoint; just before, at and after one; in the last step
    for die_at in (3, 6, 7, 19, 29):
        with pytest.raises(Killed):
            run(config, Noisy(die_at), tmp_path / "killed")
    run(config, Noisy(), tmp_path / "killed")
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    # a finished run is read back, not trained on
    again = run(config, Noisy(die_at=0), tmp_path / "killed")
    assert again.steps == 30 and bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_sigkill(tmp_path):
    """A process that is killed, and its run gone on with, against one that is left alone."""
    arguments = ["train", "--cpu", "--epochs", "15", "--set", "model_options.widths=[8,16,8,8]"]
    arguments += ["--set", "checkpoint_every=5", "--set", "log_every=3", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "qtrain", *arguments, str(killed)]
    # not in the checkout, whose qkernels/ would hide the installed one
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    reached, deadline = 0, time.monotonic() + 100
    while reached < 60:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
        if (killed / CHECKPOINT).exists():
            reached = read_checkpoint(killed / CHECKPOINT)["step"]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert read_checkpoint(killed / CHECKPOINT)["step"] < 300
    for out in (killed, whole):
        outcome = CliRunner().invoke(app, [*arguments, str(out)])
        assert outcome.exit_code == 0, outcome.output
    assert bits(killed) == bits(whole)
    assert read_metrics(whole / METRICS)[-1]["step"] == 300
    assert not list(killed.glob("*.part"))


def test_two_processes_are_one_run(tmp_path):
    """Each rank takes its half of the batch; without BatchNorm the run is the same."""
    arguments = ["train", "--model", "vit_tiny", "--epochs", "1", "--cpu", "--set", "log_every=5"]
    arguments += ["--set", "model_options.depth=1", "--set", "model_options.width=24"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "qtrain", *arguments, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "one")])
    assert outcome.exit_code == 0, outcome.output
    one, two = (read_metrics(tmp_path / out / METRICS) for out in ("one", "two"))
    assert len(one) == len(two) == 5
    for left, right in zip(one, two, strict=True):
        # the gradient's mean over ranks is summed in another order
        assert right == pytest.approx(left, rel=1e-4)


def test_it_learns(tmp_path):
    result = run(TrainConfig(epochs=4, lr=5e-3), Recipe(), tmp_path)
    assert result.test_accuracy > 0.93
    scores = evaluate(result.model, result.data.test)
    assert scores == {"test_loss": result.test_loss, "test_accuracy": result.test_accuracy}
    losses = [r["loss"] for r in read_metrics(tmp_path / METRICS) if "loss" in r]
    assert len(losses) == 4 and losses[-1] < 0.3 < losses[0]


def test_swa_averages_the_ends_of_epochs(tmp_path):
    """Against the mean of the weights that the recipe sees; BatchNorm is measured anew."""
    seen = []

    class Watch(Recipe):
        def on_step_end(self, model, step):
            if step % 10 == 9:
                seen.append([p.detach().clone() for p in model.parameters()])

    config = tiny(epochs=4, swa_start=0.5, swa_lr=1e-3)
    result = run(config, Watch(), tmp_path)
    assert len(seen) == 4
    for parameter, third, fourth in zip(result.model.parameters(), *seen[2:], strict=True):
        torch.testing.assert_close(parameter.detach(), (third + fourth) / 2)
    assert result.model.features[0][1].num_batches_tracked == 10
    assert read_metrics(tmp_path / METRICS)[-1]["swa"] is True


def test_learning_rate():
    config = tiny(lr=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert all(a >= b for a, b in pairwise(rates[9:]))
    flat = tiny(lr=1.0, warmup=0.0, schedule="constant", swa_start=0.8)
    assert {learning_rate(flat, step, 100) for step in range(80)} == {1.0}
    assert {learning_rate(flat, step, 100) for step in range(80, 100)} == {0.1}


def test_decay_spares_vectors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    config = tiny(weight_decay=0.5)
    optimizer = make_optimizer(Recipe().param_groups(model, config), config)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.5, 0.0, 0.0, 0.0]


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="train: loss must be finite, got nan at step 4 "):

        class Broken(Recipe):
            def loss(self, model, batch, step):
                return super().loss(model, batch, step) * float("nan")

        run(tiny(), Broken(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "train: epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "train: epochs must be a whole number, got 1.5"),
        ({"lr": -1.0}, "train: lr must be positive and finite, got -1.0"),
        ({"lr": "high"}, "train: lr must be a number, got 'high'"),
        ({"clip": True}, "train: clip must be a number or null, got True"),
        ({"warmup": 1.0}, "train: warmup must be in"),
        ({"optimizer": "lion"}, "train: optimizer must be one of sgd, adamw, got 'lion'"),
        ({"schedule": "poly"}, "train: schedule must be one of"),
        ({"mixed_precision": "fp8"}, "train: mixed_precision must be one of no, fp16, bf16"),
        ({"swa_start": 1.0}, "train: swa_start must be in"),
        ({"model_options": [3]}, "train: model_options must be a mapping"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


@pytest.mark.parametrize("settings", [{"model": "nope"}, {"dataset": "nope"}, {"batch_size": 9999}])
def test_a_run_that_cannot_start_leaves_nothing(tmp_path, settings):
    with pytest.raises(ValueError, match="must be"):
        run(TrainConfig(**settings), Recipe(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_evaluate_by_hand():
    data = load_dataset("digits")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    scores = evaluate(model, data.test)
    assert model.training
    logits = model.eval()(data.test.x).double()
    loss = torch.nn.functional.cross_entropy(logits, data.test.y)
    right = (logits.argmax(1) == data.test.y).double().mean()
    assert scores["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert scores["test_accuracy"] == pytest.approx(right.item())
