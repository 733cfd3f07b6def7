"""Whole GHN runs: resumption, two processes, mixed precision, the command line."""

import subprocess
import sys

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from qtrain.cli import app
from qtrain.data import load_dataset, train_batches
from qtrain.ghn.checkpoint import load_ghn
from qtrain.ghn.quantizers import Quantizer
from qtrain.ghn.run import settings_for
from qtrain.ghn.train import GhnRecipe
from qtrain.loop import train
from qtrain.recipe import learning_rate, make_optimizer
from qtrain.rundir import METRICS, MODEL, load_model_file, read_metrics
from qtrain.seeds import seed_globals
from torch.nn.utils import clip_grad_norm_
from typer.testing import CliRunner

TINY = {"width": 16, "heads": 2, "layers": 1, "max_shape": [8, 8, 3, 3]}
FEW = {"nets": 4, "meta_batch": 2, "held_out": 1}
SET = ["model_options.width=16", "model_options.heads=2", "model_options.layers=1"]
SET += ["model_options.max_shape=[8,8,3,3]", "log_every=2"]


class KilledError(Exception):
    pass


class Dying(GhnRecipe):
    def __init__(self, training, die_at=None):
        super().__init__(training)
        self.die_at = die_at

    def on_step_end(self, model, step):
        if step == self.die_at:
            raise KilledError


@pytest.mark.parametrize("kind", ["sim", "noise"])
def test_interrupted_run_ends_at_the_same_bits(tmp_path, kind):
    short = {"epochs": 2, "batch_size": 400, "checkpoint_every": 2, "log_every": 2, "eval_every": 1}
    how = {**FEW, "quantizer": Quantizer(kind), "bits": (4, 2)}
    config, training = settings_for("digits", train=short, ghn=TINY, training=how)
    train(config, Dying(training), tmp_path / "whole", cpu=True)
    for die_at in (1, 3, 4):
        with pytest.raises(KilledError):
            train(config, Dying(training, die_at), tmp_path / "killed", cpu=True)
    train(config, Dying(training), tmp_path / "killed", cpu=True)
    for name in (METRICS, MODEL):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_metrics(tmp_path / "whole" / METRICS)[-1]["step"] == 6


def test_two_processes_share_the_networks_and_the_images(tmp_path):
    """By hand: each rank's gradient of its network on its images, and the step with their mean."""
    arguments = ["ghn", "--nets", "4", "--meta-batch", "2", "--epochs", "1", "--batch-size", "400"]
    arguments += ["--held-out", "1"]
    arguments += ["--quantizer", "noise", "--bits", "2", "--cpu", "--out", str(tmp_path / "two")]
    arguments += [part for item in SET for part in ("--set", item)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "qtrain", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    _, meta = load_model_file(tmp_path / "two")
    how = {**FEW, "quantizer": Quantizer("noise"), "bits": (2,)}
    train_settings = {"epochs": 1, "batch_size": 400, "log_every": 2}
    config, training = settings_for("digits", train=train_settings, ghn=TINY, training=how)
    assert meta["recipe"]["training"] == {**training.describe()}
    data = load_dataset("digits")
    ranks = []
    for rank in range(2):
        recipe = GhnRecipe(training)
        recipe.bind(config, data)
        recipe.rank, recipe.world = rank, 2
        recipe._watch = lambda loss: None  # nothing to reduce here
        ranks.append(recipe)
    seed_globals(config.seed, 0, "init")
    model = ranks[0].build(config, data)
    optimizer = make_optimizer(ranks[0].param_groups(model, config), config)
    for step, (x, y) in enumerate(train_batches(data.train, 400, seed=0, epoch=0)):
        optimizer.zero_grad()
        for rank, recipe in enumerate(ranks):
            (recipe.loss(model, (x[rank::2], y[rank::2]), step) / 2).backward()
        clip_grad_norm_(model.parameters(), 5.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, 3)
        optimizer.step()
    ours, theirs = model.state_dict(), load_ghn(tmp_path / "two").state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_bf16():
    """The GHN under autocast, as Accelerate has it, and the networks under the recipe's own."""
    data = load_dataset("digits")
    batch = next(iter(train_batches(data.train, 64, seed=0, epoch=0)))
    losses = {}
    for precision in ("no", "bf16"):
        changed = {"mixed_precision": precision}
        how = {**FEW, "quantizer": Quantizer("sim"), "bits": (4,)}
        config, training = settings_for("digits", train=changed, ghn=TINY, training=how)
        recipe = GhnRecipe(training)
        recipe.bind(config, data)
        torch.manual_seed(0)
        model = recipe.build(config, data)
        cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        model.forward = convert_outputs_to_fp32(cast(model.forward))
        loss = recipe.loss(model, batch, 0)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        losses[precision] = loss.detach()
    assert losses["bf16"] != losses["no"] and losses["bf16"].dtype == torch.float32
    torch.testing.assert_close(losses["bf16"], losses["no"], rtol=0.05, atol=0.0)


def run(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def test_commands_train_and_evaluate(tmp_path):
    small = ["--nets", 4, "--meta-batch", 2, "--epochs", 1, "--batch-size", 400, "--cpu"]
    small += ["--held-out", 1]
    shape = [part for item in SET for part in ("--set", item)]
    first = run("ghn", "--out", tmp_path / "q", *small, *shape)
    assert first.exit_code == 0, first.output
    tuned = [*small, "--quantizer", "paper", "--bits", "4,2", "--tell-bits"]
    second = run("ghn", "--start", tmp_path / "q", "--out", tmp_path / "qat", *tuned)
    assert second.exit_code == 0, second.output
    assert load_ghn(tmp_path / "qat").config.bit_widths == (2, 4)
    assert load_ghn(tmp_path / "qat").config.width == 16
    scored = run(
        "ghn-eval", tmp_path / "qat", "--nets", 1, "--split", "id", "--bits", "4,2", "--cpu",
        "--out", tmp_path / "scores",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert "W4A4" in scored.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "cifar"], "ghn: preset must be one of paper, digits, shapes, got 'cifar'"),
        (["--bits", "4"], "ghn: bits must be none without a quantizer"),
        (["--quantizer", "ste", "--bits", "4"], "ghn: kind must be one of none, sim, noise, paper"),
        (["--tell-bits"], "ghn: bits must be some to tell the GHN, got none"),
        (["--set", "training.net=3"], "--set: "),
        (["--encoder", "gru"], "ghn: encoder must be one of graphormer, gated, got 'gru'"),
    ],
)
def test_bad_commands_leave_nothing(tmp_path, arguments, message):
    outcome = run("ghn", "--out", tmp_path / "run", "--cpu", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_kind(tmp_path):
    assert run("train", "--epochs", 1, "--cpu", "--out", tmp_path / "cnn").exit_code == 0
    outcome = run("ghn", "--start", tmp_path / "cnn", "--out", tmp_path / "run", "--cpu")
    assert outcome.exit_code == 2 and "must be of a GHN, got a file without" in outcome.output
