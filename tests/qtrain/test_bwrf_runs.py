"""Whole BWRF runs: killed and gone on with, on two ranks, from the command line."""

import json
import subprocess
import sys

import pytest
import torch
from qtrain.bwrf_config import BwrfConfig
from qtrain.bwrf_run import Bwrf
from qtrain.data import load_dataset
from qtrain.qat import Qat, qat_qconfig
from qtrain.recipe import Recipe, new_model
from qtrain.rundir import CONFIG, METRICS, MODEL, load_model_file, read_metrics
from qtrain.source import FloatSource
from test_commands import call, one_line
from test_loop import Killed, bits, run, tiny

NET = {"widths": [4, 8, 8], "strides": [2, 1, 2]}
QUICK = ["--epochs", 1, "--cpu", "--weight-bits", 2, "--activation-bits", 2]


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    """Two float runs that differ in their seed, of one architecture."""
    folder = tmp_path_factory.mktemp("float")
    for name, seed in (("float", 0), ("other", 1)):
        run(tiny(model_options=NET, epochs=4, seed=seed), Recipe(), folder / name)
    return folder


def recipe_of(folder, kind=Bwrf, **options):
    start, other = (FloatSource.load(folder / name) for name in ("float", "other"))
    return kind(start, qat_qconfig("lsq", 2, 2), BwrfConfig(**options), teacher=other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "sampled", "schedule": "linear"},
        {"mode": "single", "effect": "forward", "schedule": "exponential"},
    ],
    ids=["prefix", "sampled", "single"],
)
def test_interrupted_run_ends_at_the_same_bits(tmp_path, float_dir, options):
    class Mortal(Bwrf):
        die_at = None

        def on_step_end(self, model, step):
            if step == self.die_at:
                raise Killed

    config = tiny(model_options=NET, epochs=3, log_every=4, checkpoint_every=7)
    run(config, recipe_of(float_dir, **options), tmp_path / "whole")
    for die_at in (3, 8, 17, 29):
        recipe = recipe_of(float_dir, Mortal, **options)
        recipe.die_at = die_at
        with pytest.raises(Killed):
            run(config, recipe, tmp_path / "killed")
    run(config, recipe_of(float_dir, **options), tmp_path / "killed")
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    logged = [r for r in read_metrics(tmp_path / "whole" / METRICS) if "loss" in r]
    for record in logged:
        parts = record["task"] + record["distill"] + record["replaced"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5) and record["replaced"] > 0


def test_without_its_terms_it_is_qat_to_the_bit(tmp_path, float_dir):
    config = tiny(model_options=NET)
    start = FloatSource.load(float_dir / "float")
    run(config, Qat(start, qat_qconfig("lsq", 2, 2)), tmp_path / "qat")
    run(config, recipe_of(float_dir, alpha=0.0, beta=0.0), tmp_path / "bwrf")
    run(config, recipe_of(float_dir), tmp_path / "whole")
    qat, bwrf, whole = (load_model_file(tmp_path / n)[0] for n in ("qat", "bwrf", "whole"))
    assert set(qat) == set(bwrf) == set(whole)
    assert all(torch.equal(value, bwrf[name]) for name, value in qat.items())
    assert not all(torch.equal(value, whole[name]) for name, value in qat.items())


RANK_PROGRAM = """
import sys, torch
from qkernels.nn import set_quantization
from qtrain.bwrf_config import BwrfConfig
from qtrain.bwrf_run import Bwrf
from qtrain.loop import train
from qtrain.progress import Track
from qtrain.qat import qat_qconfig
from qtrain.recipe import TrainConfig
from qtrain.source import FloatSource

class Float(Bwrf):
    def setup(self, model):
        student = super().setup(model)
        set_quantization(student, False)
        return student

folder, suffix = sys.argv[1:]
start, teacher = (FloatSource.load(f"{folder}/{name}") for name in ("float", "other"))
config = TrainConfig(**start.settings(), epochs=1, batch_size=128, lr=3e-3, log_every=3)
for mode, kind in (("prefix", Float), ("single", Float), ("sampled", Bwrf)):
    # DDP wants a gradient of every parameter, learned scales too
    qconfig = qat_qconfig("minmax" if kind is Float else "lsq", 4, 4)
    recipe = kind(start, qconfig, BwrfConfig(mode=mode), teacher=teacher)
    with Track(0, "", quiet=True) as track:
        done = train(config, recipe, f"{folder}/{mode}{suffix}", cpu=True, track=track)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
torch.save(done.model.state_dict(), f"{folder}/state{suffix}.{rank}")
"""


def test_two_ranks_are_one_run(tmp_path):
    """Gradients that come through the mixed networks are averaged over the ranks as all others are:
    without quantization, which makes much of a rounding, two ranks do what one does on the joint
    batch. With it they have the same bits as each other."""
    vit = {"model": "vit_tiny", "model_options": {"depth": 2, "width": 12}}
    for name, seed in (("float", 0), ("other", 1)):
        run(tiny(**vit, epochs=2, seed=seed), Recipe(), tmp_path / name)
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    # without a GPU several processes start with --multi_gpu alone; they talk through gloo
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    two = [*launch, "--multi_gpu", "--num_processes", "2"]
    for launcher, suffix in ((two, "2"), ([sys.executable], "1")):
        command = [*launcher, "program.py", str(tmp_path), suffix]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    before = load_model_file(tmp_path / "float")[0]
    for mode in ("prefix", "single"):
        one, two = (read_metrics(tmp_path / f"{mode}{n}" / METRICS) for n in (1, 2))
        assert len(one) == len(two) == 5 and one[-2]["replaced"] > 0
        for left, right in zip(one, two, strict=True):
            assert right == pytest.approx(left, rel=2e-4)
        one, two = (load_model_file(tmp_path / f"{mode}{n}")[0] for n in (1, 2))
        for name, value in before.items():
            moved = (one[name] - value).norm()
            assert moved > 0 and (two[name] - one[name]).norm() < 0.02 * moved, name
    left, right = (torch.load(tmp_path / f"state2.{rank}") for rank in (0, 1))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert not torch.equal(left["head.weight"], before["head.weight"])


def test_command(tmp_path, float_dir):
    out = tmp_path / "bwrf"
    how = ["--teacher", float_dir / "other", "--blocks", "features.0, features.2", *QUICK]
    assert "W2A2" in call("bwrf", float_dir / "float", "--out", out, *how).output
    assert {path.name for path in out.iterdir()} >= {CONFIG, METRICS, MODEL, "report.md"}
    recipe = json.loads((out / CONFIG).read_text())["recipe"]
    start, other = (FloatSource.load(float_dir / name).digest for name in ("float", "other"))
    assert (recipe["source"], recipe["teacher"]) == (start, other)
    assert recipe["replacement"]["blocks"] == ["features.0", "features.2"]
    # the file is that of a qat run: it reports beside one, and is no float model
    call("qat", float_dir / "float", "--out", tmp_path / "qat", *QUICK)
    bwrf, qat = (load_model_file(tmp_path / name)[0] for name in ("bwrf", "qat"))
    assert {k: v.shape for k, v in bwrf.items()} == {k: v.shape for k, v in qat.items()}
    assert call("report", out, tmp_path / "qat").output.count("W2A2") == 2
    error = one_line(call("bwrf", out, "--out", tmp_path / "again", *QUICK, code=2))
    assert "must be of a float model, got one of bwrf" in error
    clash = one_line(call("bwrf", float_dir / "float", "--out", out, *QUICK, code=2))
    assert "recipe.teacher" in clash and "recipe.replacement.blocks" in clash


def test_mixed_precision(float_dir):
    """The recipe enters autocast for what runs outside of the student's forward."""
    data = load_dataset("digits")
    batch = data.train.x[:32], data.train.y[:32]
    losses = {}
    for precision in ("no", "bf16"):
        recipe = recipe_of(float_dir, mode="single")
        config = tiny(model_options=NET, mixed_precision=precision)
        recipe.bind(config, data)
        model = recipe.setup(new_model(config, data))
        recipe.initialize(model, data, config)
        losses[precision] = recipe.loss(model, batch, 0)
    assert losses["bf16"] != losses["no"] and losses["bf16"].dtype == torch.float32
    torch.testing.assert_close(losses["bf16"], losses["no"], rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "all"], "bwrf: mode must be one of prefix, single, sampled, got 'all'"),
        (["--blocks", "features.0,layer9"], "blocks must be names of modules of Cnn"),
        (["--blocks", "features.1,features.0"], "in the order of the forward"),
        (["--blocks", "features.0"], "blocks must be two names or more"),
        (["--blocks", ""], "blocks must be two names or more"),
        (["--mode", "single", "--block", "4"], "bwrf: block must be in 1..3, got 4"),
        (["--method", "none"], "qat: method must be one of"),
        (["--schedule", "step"], "schedule must be one of linear, exponential, got 'step'"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--teacher", "nothing"], "nothing must be a model.safetensors or a run directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, float_dir, arguments, words):
    out = ["--out", tmp_path / "run"]
    error = one_line(call("bwrf", float_dir / "float", *out, *QUICK, *arguments, code=2))
    assert words in error
    assert not list(tmp_path.iterdir())


def test_teacher_of_another_architecture(tmp_path, float_dir):
    run(tiny(epochs=1), Recipe(), tmp_path / "wide")
    how = ["--teacher", tmp_path / "wide", "--out", tmp_path / "run", *QUICK]
    error = one_line(call("bwrf", float_dir / "float", *how, code=2))
    assert "bwrf: teacher must be of the student's architecture, cnn with options" in error
    assert not (tmp_path / "run").exists()
