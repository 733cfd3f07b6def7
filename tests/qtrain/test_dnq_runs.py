"""Whole DNQ runs: killed and gone on with, on two ranks, from the command line, as a study.

Processes start in a folder of their own: `python -m` puts the present one first, and the checkout's
qkernels/ would hide the installed one and its compiled kernels.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from qtrain.dnq import Dnq, DnqConfig
from qtrain.dnq_run import PRESETS, PtqPlan, phases, run_dnq, settings_for
from qtrain.dnq_study import STUDIES, comparison
from qtrain.models import MODELS
from qtrain.report import RESULTS
from qtrain.rundir import CHECKPOINT, METRICS, MODEL, load_model_file, read_checkpoint, read_metrics
from qtrain.study import Score, accuracy_table, difference_table, paired
from test_commands import call, one_line
from test_dnq import settings
from test_dnq_train import run
from test_loop import Killed, bits

QUICK = ["--adaround-iterations", "0", "--ptq-bits", "3", "--cpu"]
NET = ["--set", "model_options.widths=[4,8,8,8]", "--set", "model_options.strides=[1,2,1,2]"]


@pytest.mark.parametrize(
    "changed",
    [{}, {"permanent": True, "ramp": "cosine"}, {"weight_noise": "discrete"}],
    ids=["temporary", "permanent", "discrete"],
)
def test_interrupted_run_ends_at_the_same_bits(tmp_path, changed):
    """In the warm-up, in the first and last step of epochs with noise, and while averaging."""

    class Mortal(Dnq):
        die_at = None

        def on_step_end(self, model, step):
            super().on_step_end(model, step)
            if step == self.die_at:
                raise Killed

    config = settings(checkpoint_every=7, log_every=4, swa_start=0.7)
    dnq = DnqConfig(weight_bits=2, activation_bits=3, warmup_epochs=1, ramp_epochs=2, **changed)
    run(config, Dnq(dnq), tmp_path / "whole")
    for die_at in (3, 10, 13, 20, 28, 34):
        recipe = Mortal(dnq)
        recipe.die_at = die_at
        with pytest.raises(Killed):
            run(config, recipe, tmp_path / "killed")
    run(config, Dnq(dnq), tmp_path / "killed")
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_sigkill_in_every_phase(tmp_path):
    """kill -9 in the warm-up, under noise and while averaging; then as if nothing had happened."""
    arguments = [
        "dnq",
        "--epochs",
        "24",
        "--warmup-epochs",
        "8",
        "--ramp-epochs",
        "8",
        *QUICK,
        *NET,
    ]
    arguments += ["--set", "checkpoint_every=5", "--set", "log_every=3", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for start, end in ((40, 160), (220, 360), (400, 480)):
        command = [sys.executable, "-m", "qtrain", *arguments, str(killed)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        reached, deadline = 0, time.monotonic() + 100
        while reached < start:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
            if (killed / CHECKPOINT).exists():
                reached = read_checkpoint(killed / CHECKPOINT)["step"]
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert start <= read_checkpoint(killed / CHECKPOINT)["step"] < end
    for out in (killed, whole):
        call(*arguments, out)
    assert bits(killed) == bits(whole)
    assert (killed / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()
    assert read_metrics(whole / METRICS)[-1]["step"] == 480
    assert not list(killed.glob("*.part"))


def two_ranks(folder, *arguments):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "qtrain"]
    return subprocess.run(
        [*launch, *map(str, arguments)], check=True, capture_output=True, cwd=folder, timeout=300
    )


def test_two_ranks_are_one_run(tmp_path):
    """Without BatchNorm and activation noise two ranks do what one does on the joint batch: the
    same weights and the same statistics, to rounding."""
    arguments = ["dnq", "--model", "vit_tiny", "--epochs", "4", "--activation-noise", "none"]
    arguments += ["--set", "model_options.depth=1", "--set", "model_options.width=24", *QUICK]
    # a small rate: rounding differences grow in training, by how much depends on the processor (at
    # 0.05 to 1e-5 or to 1e-4 of the weights), and 1e-4 is a hundredth of a step of the 8-bit head
    arguments += ["--lr", "0.005"]
    arguments += ["--set", "log_every=5", "--set", "eval_every=1", "--out"]
    two_ranks(tmp_path, *arguments, tmp_path / "two")
    call(*arguments, tmp_path / "one")
    one, two = (read_metrics(tmp_path / out / METRICS) for out in ("one", "two"))
    assert len(one) == len(two) > 10
    for left, right in zip(one, two, strict=True):
        assert right == pytest.approx(left, rel=1e-3)
    one, two = (read_checkpoint(tmp_path / out / CHECKPOINT) for out in ("one", "two"))
    for name, recorder in one["recipe"]["wqer"].items():
        other = two["recipe"]["wqer"][name]
        assert recorder["updates"] == other["updates"] == 2
        mean, square = (recorder["ema"][row] - other["ema"][row] for row in (0, 2))
        size = recorder["ema"][2].max()
        assert square.abs().max() < 2e-3 * size
        # min-max ranges put the largest weight of a channel on a tie: by its last bit its error is
        # half a step up or down, which moves the mean by a step over the channel's elements
        weight = one["model"][name].flatten(1)
        step = 2 * weight.abs().amax(1) / (15 if "blocks" in name else 255)
        assert (mean.abs() <= 1.01 * step / weight.shape[1] + 2e-3 * size.sqrt()).all()


RANK_PROGRAM = """
import sys, torch
from qtrain.dnq import Dnq, DnqConfig
from qtrain.dnq_run import settings_for
from qtrain.loop import train
from qtrain.progress import Track
import torch.distributed as dist

class Watch(Dnq):
    def loss(self, model, batch, step):
        if step == 45:
            noise = model.module.features[0][0].input_noise
            self.drawn = noise(torch.zeros(4, 1, 8, 8)).clone()
        return super().loss(model, batch, step)

recipe = Watch(DnqConfig(3, 3, warmup_epochs=2, ramp_epochs=1, ramp="constant"))
config = settings_for("digits", epochs=4, model_options={"widths": [4, 8], "strides": [2, 2]})
with Track(0, "", quiet=True) as track:
    result = train(config, recipe, sys.argv[1], cpu=True, track=track)
state = {k: v.clone() for k, v in result.model.state_dict().items()}
stats = {n: tuple(t.clone() for t in s) for h in recipe.handles for n, s in h.stats.items()}
found = {"state": state, "drawn": recipe.drawn, "stats": stats}
torch.save(found, f"{sys.argv[1]}.{dist.get_rank()}")
"""


def test_ranks_agree_but_for_activation_noise(tmp_path):
    """With BatchNorm and all noise: weights, buffers and statistics equal, drop-in noise not."""
    program = tmp_path / "program.py"
    program.write_text(RANK_PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(program), str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    left, right = (torch.load(tmp_path / f"run.{rank}") for rank in (0, 1))
    assert left["state"].keys() == right["state"].keys()
    for name, value in left["state"].items():
        assert torch.equal(value, right["state"][name]), name
    assert left["stats"] and left["stats"].keys() == right["stats"].keys()
    for name, parts in left["stats"].items():
        assert all(map(torch.equal, parts, right["stats"][name])), name
    assert left["drawn"].abs().max() > 0 and not torch.equal(left["drawn"], right["drawn"])


def test_one_process_by_accelerate_is_warned_of(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command = [*launch, "-m", "qtrain", "train", "--epochs", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert torch.cuda.is_available() or "accelerate launch started one process" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dnq"
    how = ["--epochs", 4, "--ptq-bits", "8,2", "--cpu", "--adaround-iterations", 20]
    outcome = call("dnq", "--out", out, *how, *NET)
    return out, outcome.output, how


def test_the_command_leaves_a_run(finished):
    out, text, how = finished
    assert "W8A8" in text and "W2A2" in text and "AdaRound" in text
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", METRICS, MODEL, RESULTS, "report.md", "curves.png"}
    rows = json.loads((out / RESULTS).read_text())["rows"]
    # float; two widths by three ranges, folded or not, and AdaRound
    assert len(rows) == 1 + 2 * (3 * 2 + 1)
    assert rows[0]["bits"] is None and all(0 <= row["accuracy"] <= 1 for row in rows)
    # called again it is read back
    stamps = {file: file.stat().st_mtime_ns for file in (out / RESULTS, out / MODEL)}
    assert "W2A2" in call("dnq", "--out", out, *how, *NET).output
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    # the model is a float one, for ptq and the like
    assert "W4A4" in call("ptq", out, "--out", out.parent / "ptq", "--bits", 4).output
    _, meta = load_model_file(out)
    assert meta["recipe"]["warmup_epochs"] == 2 and meta["recipe"]["ramp_epochs"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "mnist"], "dnq: preset or dataset must be one of digits, shapes, cifar10"),
        (["--preset", "best"], "dnq: preset or dataset must be one of"),
        (["--preset", "paper"], "data: cifar100 must be at"),
        (["--weight-noise", "pink"], "weight_noise must be one of"),
        (
            ["--warmup-epochs", "39", "--ramp-epochs", "2"],
            "at most the 40 epochs of the run, got 39",
        ),
        (["--calibration-images", "1298"], "at most the 1297 training examples, got 1298"),
        (["--percentile", "99"], "percentile must be None unless a method is percentile, got 99"),
        (["--set", "swa_lr=-1"], "train: swa_lr must be positive and finite, got -1"),
        (["--set", "momentum=-1"], "train: momentum must be in"),
        (["--set", "model_options.widths=[4,8]"], "widths and strides must be equally many, got 2"),
        (["--dataset", "shapes", "--set", "data_options.train_size=80"], "at most the 80 training"),
        (["--ptq-bits", "8,0"], "--ptq-bits: it must be whole numbers from 1 to 16"),
        (["--ptq-bits", ""], "--ptq-bits: it must be whole numbers from 1 to 16"),
        (["--set", "nesterov=1"], "train: nesterov must be true or false, got 1"),
        (["--set", "optimizer=adamw"], "train: nesterov must be false without SGD and momentum"),
        (["--set", "label_smoothing=1"], "train: label_smoothing must be in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, arguments, words):
    outcome = call("dnq", "--out", tmp_path / "run", "--cpu", *arguments, code=2)
    assert words in one_line(outcome)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["--weight-bits", "--activation-bits"])
def test_no_bits_are_refused_by_the_command_line(tmp_path, name):
    outcome = call("dnq", "--out", tmp_path / "run", name, "0", code=2)
    assert name in outcome.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bits": ()}, "ptq: bits must be at least one, got none"),
        ({"bits": (0,)}, "bits must be .*16.* got 0"),
        ({"methods": ("entropy",)}, "method must be one of"),
        ({"folds": ()}, "ptq: folds must be at least one"),
        ({"percentile": 200.0}, "percentile must be"),
        ({"first_last_bits": 99}, "first_last_bits must be in 1..16"),
    ],
)
def test_bad_plans(changed, words):
    with pytest.raises(ValueError, match=words):
        PtqPlan(**changed)


def test_a_model_that_cannot_be_folded_is_not_trained(tmp_path, monkeypatch):
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))

    monkeypatch.setitem(MODELS, "branching", lambda *sizes, **options: Branching())
    config = settings(model="branching", model_options={}, epochs=1)
    with pytest.raises(ValueError, match=r"must be one that torch\.fx can trace"):
        run_dnq(config, DnqConfig(), tmp_path / "run", cpu=True, quiet=True)
    assert not list(tmp_path.iterdir())
    rows = run_dnq(
        config,
        DnqConfig(),
        tmp_path / "run",
        plan=PtqPlan(bits=(4,), folds=(False,), adaround=None),
        cpu=True,
        quiet=True,
    )
    assert len(rows) == 4


def test_another_config_is_another_run(finished):
    out, _, how = finished
    error = one_line(call("dnq", "--out", out, *how, *NET, "--decay", "0.5", code=2))
    assert "recipe.decay (0.9 there, 0.5 asked for)" in error


def test_presets():
    paper = settings_for("paper")
    assert (paper.dataset, paper.epochs, paper.swa_start) == ("cifar100", 400, 0.75)
    assert (paper.nesterov, paper.label_smoothing, paper.schedule) == (True, 0.1, "cosine")
    assert phases(paper.epochs) == {"warmup_epochs": 200, "ramp_epochs": 100}
    for preset in PRESETS:
        assert settings_for(preset, lr=0.01).lr == 0.01
    other = settings_for("shapes", model="cnn")
    assert other.model_options == {} and other.data_options["difficulty"] == 0.7
    small = settings_for("shapes", data_options={"train_size": 64}, model_options={"width": 4})
    assert small.data_options == {"difficulty": 0.7, "train_size": 64}
    assert small.model_options == {"width": 4}
    elsewhere = settings_for("paper", dataset="shapes", data_options={"train_size": 64})
    assert elsewhere.data_options == {"train_size": 64} and elsewhere.epochs == 400


def test_study(tmp_path):
    arguments = ["dnq-study", "controls", "--out", tmp_path, "--seeds", 2, "--bits", "3,2"]
    arguments += ["--epochs", 4, "--jobs", 2, *NET]
    text = call(*arguments).output
    for arm in STUDIES["controls"].arms:
        assert arm.name in text
    report = (tmp_path / "controls" / "report.md").read_text()
    assert "2 seeds (0, 1)" in report and "minus SWA only" in report
    scores = json.loads((tmp_path / "controls" / RESULTS).read_text())["scores"]
    # five arms, two widths, two ways of quantizing, two seeds; without noise one run serves both
    assert len(scores) == 5 * 2 * 2 * 2
    runs = list((tmp_path / "runs").glob("*/*/seed*"))
    assert len(runs) == 2 * (2 + 3 * 2)
    # runs that are there are read back; another study shares them
    stamps = {run: (run / MODEL).stat().st_mtime_ns for run in runs}
    before = (tmp_path / "controls" / RESULTS).read_bytes()
    call(*arguments)
    call(*[{"controls": "discrete"}.get(a, a) for a in arguments])
    assert stamps == {run: (run / MODEL).stat().st_mtime_ns for run in runs}
    assert (tmp_path / "controls" / RESULTS).read_bytes() == before
    assert "discrete" in (tmp_path / "discrete" / "report.md").read_text()
    # a clash is found before anything is run
    clash = one_line(call(*arguments, "--lr", "0.5", "--seeds", 3, code=2))
    assert "train.lr (0.05 there, 0.5 asked for)" in clash
    assert len(list((tmp_path / "runs").glob("*/*/seed*"))) == len(runs) + 4
    few = ["--dataset", "shapes", "--set", "data_options.train_size=200"]
    error = one_line(call("dnq-study", "calibration", "--out", tmp_path / "x", *few, code=2))
    assert "at most the 200 training examples, got 1024" in error
    error = one_line(call("dnq-study", "--set", "seed=7", "--out", tmp_path / "x", code=2))
    assert "seed must be left to --seeds" in error
    assert not (tmp_path / "x").exists()
    error = one_line(call("dnq-study", "all", "--out", tmp_path / "x", code=2))
    assert "study must be one of controls, parts, ramps" in error


def test_study_tables_by_hand():
    def score(arm, seed, accuracy):
        return Score(arm, (2, 2), "PTQ minmax", seed, accuracy, 1.0, 0.9)

    linear = [score("linear", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    cosine = [score("cosine", seed, value) for seed, value in enumerate((0.6, 0.6, 0.9))]
    constant = [score("constant", seed, value) for seed, value in enumerate((0.4, 0.5, 0.6))]
    scores = [*linear, *cosine, *constant]
    assert paired(cosine, list(reversed(linear))) == pytest.approx([0.1, 0.0, 0.2])
    columns, rows = accuracy_table(comparison("ramps"), scores)
    assert columns == ["bits", "arm", "float", "PTQ minmax"]
    assert rows[0] == ["W2A2", "linear", "90.00 ± 0.00", "60.00 ± 10.00"]
    columns, rows = difference_table(comparison("ramps"), scores)
    assert columns[-1] == "minus linear" and len(rows) == 2
    assert rows[0][-1] == "+10.00 ± 10.00 (2 of 3)" and rows[1][-1] == "-10.00 ± 0.00 (0 of 3)"
