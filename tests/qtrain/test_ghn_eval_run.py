"""qtrain ghn-eval: its files, stopping and going on, other processes, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from ghn_small import NETS, PLAN, make_ghn
from PIL import Image
from qtrain.cli import app, ghn_use
from qtrain.data import load_dataset
from qtrain.ghn import evaluate_run
from qtrain.ghn.checkpoint import save_ghn
from qtrain.ghn.evaluate import evaluate_networks, score_net
from qtrain.ghn.evaluate_report import table
from qtrain.ghn.evaluate_run import GhnSource, drawn, read_scores, run_evaluation
from qtrain.ghn.space import draw_net, write_nets
from qtrain.rundir import METRICS, RunDir
from torch import nn
from typer.testing import CliRunner

assert ghn_use.app is app  # its import adds the commands


def write_checkpoint(path, ghn, **train):
    """As a training run leaves it."""
    run = RunDir(path, {})
    run.create()
    recipe = {"name": "ghn", "training": {"space": "digits"}}
    meta = {"ghn": ghn.config.to_dict(), "recipe": recipe, "train": train}
    run.save_model(ghn.state_dict(), meta)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("ghn") / "run"
    return write_checkpoint(path, make_ghn(), dataset="digits", data_options={})


def nets_of(splits=("id", "bn-free"), count=2):
    return drawn("digits", splits, count=count, seed=1)


def test_a_run_and_its_files(tmp_path, checkpoint, monkeypatch):
    data = load_dataset("digits")
    source = GhnSource.load(checkpoint)
    assert (source.dataset, source.space) == ("digits", "digits")
    out = tmp_path / "eval"
    scores = run_evaluation(source, nets_of(), out, PLAN)
    assert scores == evaluate_networks(make_ghn(), NETS, data, PLAN)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "report.md",
        "accuracy.png",
    }
    with Image.open(out / "accuracy.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("L").getcolors(256)) > 10
    shown = (out / "report.md").read_text()
    for row in table(scores)[1]:
        assert " | ".join(row) in shown
    assert "2 networks of id, 2 networks of bn-free" in shown
    assert "statistics of 96 training images" in shown and "from 64 training images" in shown

    def never(*_):
        raise AssertionError("a finished run is read back")

    monkeypatch.setattr(evaluate_run, "score_net", never)
    before = (out / "results.json").read_bytes()
    assert run_evaluation(source, nets_of(), out, PLAN) == scores == read_scores(out)
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"recipe.seed \(5 there, 6 asked for\)"):
        run_evaluation(source, nets_of(), out, replace(PLAN, seed=6))
    with pytest.raises(ValueError, match=r"nets.count \(2 there, 1 asked for\)"):
        run_evaluation(source, nets_of(count=1), out, PLAN)
    (out / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold the results of a finished run"):
        run_evaluation(source, nets_of(), out, PLAN)


def test_a_stopped_run_goes_on(tmp_path, checkpoint, monkeypatch):
    source, nets = GhnSource.load(checkpoint), nets_of()
    whole = run_evaluation(source, nets, tmp_path / "whole", PLAN)
    made = []

    class Killed(BaseException):
        pass

    def counted(ghn, net, *rest):
        if len(made) == 2:
            raise Killed
        made.append((net.split, net.index))
        return score_net(ghn, net, *rest)

    monkeypatch.setattr(evaluate_run, "score_net", counted)
    out = tmp_path / "stopped"
    with pytest.raises(Killed):
        run_evaluation(source, nets, out, PLAN)
    assert made == [("id", 0), ("id", 1)] and not (out / "results.json").exists()
    with open(out / METRICS, "ab") as file:  # and a line that was cut off
        file.write(b'{"net": 2, "sco')
    made[:] = [None, None, None]
    assert run_evaluation(source, nets, out, PLAN) == whole
    assert made[3:] == [("bn-free", 0), ("bn-free", 1)]
    for name in ("results.json", METRICS):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_do_not_matter(tmp_path, checkpoint, monkeypatch):
    source, plan = GhnSource.load(checkpoint), replace(PLAN, methods=("minmax",))
    nets = nets_of()
    one = run_evaluation(source, nets, tmp_path / "1", plan)
    # a process of its own
    alone = replace(nets, nets=nets.nets[:1])
    assert run_evaluation(source, alone, tmp_path / "2", plan, jobs=2) == one[:2]

    def last_first(jobs, work, *, label, processes):
        assert processes == 3
        return [(job, work(job)) for job in reversed(jobs)]

    monkeypatch.setattr(evaluate_run, "run_all", last_first)
    assert run_evaluation(source, nets, tmp_path / "3", plan, jobs=3) == one
    files = [(tmp_path / n / "results.json").read_bytes() for n in "13"]
    assert files[0] == files[1]


TINY = ["--bits", "4", "--methods", "minmax", "--batchnorm-images", "64", "--range-images", "32"]


def call(*words):
    return CliRunner().invoke(app, ["ghn-eval", *map(str, words)])


def test_command(tmp_path, checkpoint):
    out = tmp_path / "eval"
    words = [checkpoint, "--nets", "1", "--out", out, *TINY]
    done = call(*words, "--bits", "4,2", "--mixed", "--split", "id,bn-free")
    assert done.exit_code == 0, done.output
    scores = read_scores(out)
    assert [s.split for s in scores] == ["id"] * 4 + ["bn-free"] * 4
    assert [s.bits for s in scores[:4]] == ["FP32", "W4A4", "W2A2", "mixed 2/4"]
    for row in table(scores)[1]:
        assert all(cell in done.output for cell in row)
    config = json.loads((out / "config.json").read_text())
    splits = ["id", "bn-free"]
    assert config["nets"] == {"space": "digits", "splits": splits, "count": 1, "seed": 1}
    assert (config["recipe"]["seed"], config["recipe"]["mixed"]) == (1, [2, 4])
    again = call(*words, "--bits", "4,2", "--mixed", "--split", "id,bn-free")
    assert again.exit_code == 0 and again.output.splitlines()[-1] == f"{out}/report.md"


def test_splits_that_are_evaluated():
    nets = drawn("digits", count=2, seed=4)
    splits = ["id", "wide", "deep", "dense", "bn-free"]
    assert nets.described["splits"] == splits
    assert nets.nets == tuple(draw_net("digits", split, 4, i) for split in splits for i in (0, 1))
    assert drawn("vit", count=1).described["splits"] == ["id", "wide", "deep"]


def test_command_with_a_file_of_networks(tmp_path, checkpoint):
    nets = [draw_net("digits", split, 7, i) for split, i in (("id", 0), ("train", 3), ("id", 1))]
    write_nets(tmp_path / "nets.jsonl", nets)
    words = [checkpoint, "--space-file", tmp_path / "nets.jsonl", *TINY]
    done = call(*words, "--out", tmp_path / "eval")
    assert done.exit_code == 0, done.output
    origins = [(s.split, s.seed, s.index) for s in read_scores(tmp_path / "eval")[::2]]
    assert origins == [("id", 7, 0), ("id", 7, 1), ("train", 7, 3)]
    done = call(*words, "--split", "id", "--nets", "1", "--out", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert read_scores(tmp_path / "one") == read_scores(tmp_path / "eval")[:2]
    # the file is known by what it holds
    (tmp_path / "nets.jsonl").rename(tmp_path / "moved.jsonl")
    words[2] = tmp_path / "moved.jsonl"
    assert call(*words, "--out", tmp_path / "eval").exit_code == 0


def test_a_checkpoint_that_says_less(tmp_path, checkpoint):
    save_ghn(make_ghn(bit_widths=(4, 8)), tmp_path / "ghn")
    source = GhnSource.load(tmp_path / "ghn", dataset="shapes", space="vit")
    assert (source.dataset, source.space, source.data_options) == ("shapes", "vit", {})
    options = {"train_size": 64}
    path = write_checkpoint(tmp_path / "shapes", make_ghn(), dataset="shapes", data_options=options)
    assert GhnSource.load(path).data_options == options
    assert GhnSource.load(path, dataset="digits").data_options == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "id,broad"], "split must be one of train, id, wide, .* in digits, got broad"),
        (["--split", "id,id"], "ghn-eval: split must be each once, got id, id"),
        (["--space-file", "WHOLE", "--split", "id,id"], "split must be each once, got id, id"),
        (["--split", "dense", "--space", "vit"], "split must be one of train, id, wide, deep in v"),
        (["--space", "large"], "space must be one of paper, digits, vit, got large"),
        (["--nets", "0"], "ghn-eval: nets must be at least 1, got 0"),
        (["--bits", "4,99"], "--bits: it must be whole numbers from 1 to 16"),
        (["--bits", "4", "--mixed"], "ghn-eval: mixed must be two widths or more, or none"),
        (
            ["--methods", "median"],
            "ptq: method must be one of minmax, percentile, mse, got 'median",
        ),
        (["--methods", "mse,mse"], "ghn-eval: methods must be each once, got mse, mse"),
        (["--batchnorm-images", "2000"], "images must be at most the 1297 training examples"),
        (["--range-images", "0"], "calibration: images must be at least 1, got 0"),
        (["--dataset", "nothing"], "data: dataset must be one of digits"),
        (["--space-file", "BROKEN"], "got at line 2"),
        (["--space-file", "ABSENT"], "ghn-eval: space file must be a file of ghn-space, got no"),
        (["--space-file", "WHOLE", "--split", "deep"], "split must be one of id in .*, got deep"),
        (["--space-file", "WHOLE", "--space", "vit"], "--space-file: it must stand without --sp"),
    ],
)
def test_bad_input(tmp_path, checkpoint, words, message):
    files = {name: tmp_path / name for name in ("BROKEN", "WHOLE", "ABSENT")}
    write_nets(files["WHOLE"], NETS[:1])
    files["BROKEN"].write_bytes(files["WHOLE"].read_bytes() + b'{"seed": 1}\n')
    before = sorted(tmp_path.rglob("*"))
    given = [files.get(word, word) for word in words]
    done = call(checkpoint, "--out", tmp_path / "eval", "--nets", "1", *given)
    assert done.exit_code == 2, done.output
    assert_says(done.output, message)
    assert sorted(tmp_path.rglob("*")) == before


def assert_says(output, message):
    with pytest.raises(ValueError, match=message):
        raise ValueError(output)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("silent", [], "must say its dataset, got a file that does not; name it with --dataset"),
        ("other", ["--dataset", "digits"], "must be of a GHN, got a file without its settings"),
        ("absent", ["--dataset", "digits"], "must be a model.safetensors or a run directory with"),
        ("cut", ["--dataset", "digits"], "must be a whole safetensors file, got"),
        ("wrong", ["--dataset", "digits"], "must be of its configuration, got embedding.primitive"),
        ("told", ["--dataset", "digits"], "bits must be among 4, 8, which the GHN knows, got 2"),
    ],
)
def test_bad_checkpoints(tmp_path, kind, words, message):
    path = tmp_path / kind
    if kind == "other":
        run = RunDir(path, {})
        run.create()
        run.save_model({"weight": torch.zeros(3)}, {})
    elif kind == "wrong":
        ghn = make_ghn()
        ghn.embedding.primitive = nn.Embedding(3, 16)
        write_checkpoint(path, ghn)
    elif kind != "absent":
        save_ghn(make_ghn(bit_widths=(4, 8)), path)
    if kind == "cut":
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    done = call(path, "--out", tmp_path / "eval", "--nets", "1", *words)
    assert done.exit_code == 2, done.output
    assert_says(done.output, message)
    assert not (tmp_path / "eval").exists()


def test_networks_that_cannot_be_built_for_the_images(tmp_path, checkpoint, monkeypatch):
    data = replace(load_dataset("digits"), size=21)
    monkeypatch.setattr(evaluate_run, "load_dataset", lambda *_: data)
    with pytest.raises(ValueError, match="size must be a multiple of 2 for vit_tiny, got 21"):
        run_evaluation(GhnSource.load(checkpoint), drawn("vit", ("id",), count=1), tmp_path / "x")
    assert not (tmp_path / "x").exists()
