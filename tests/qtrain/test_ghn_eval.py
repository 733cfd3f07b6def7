"""What predicted weights score: against the same by hand, whatever the order and the processes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from qtrain.cli import app, ghn_use
from qtrain.data import load_dataset
from qtrain.ghn import evaluate_run
from qtrain.ghn.checkpoint import save_ghn
from qtrain.ghn.config import GhnConfig
from qtrain.ghn.evaluate import (
    EvalPlan,
    Ground,
    NetScore,
    drawn_bits,
    evaluate_networks,
    layer_names,
    materialize,
    node_bits,
    score_net,
    told_bits,
)
from qtrain.ghn.evaluate_report import plot_histograms, summarise, table
from qtrain.ghn.evaluate_run import GhnSource, drawn, read_scores, run_evaluation
from qtrain.ghn.genotype import Draw
from qtrain.ghn.graph import build_graph
from qtrain.ghn.model import Ghn
from qtrain.ghn.space import draw_net, write_nets
from qtrain.loop import evaluate
from qtrain.models import Cnn
from qtrain.ptq import calibration_images, ptq_qconfig, quantize_after_training
from qtrain.recipe import TrainConfig
from qtrain.rundir import METRICS, RunDir
from torch import nn
from torch.optim.swa_utils import update_bn
from typer.testing import CliRunner

from qkernels.nn import QuantLayer, fold_batchnorm, prepare

assert ghn_use.app is app  # its import adds the commands
SMALL = {"width": 16, "heads": 2, "layers": 1, "max_shape": (8, 8, 5, 5), "classes": 10}
PLAN = EvalPlan(bits=(4,), batchnorm_images=96, range_images=64, batch_size=32, seed=5)
NETS = tuple(draw_net("digits", split, 1, i) for split in ("id", "bn-free") for i in (0, 1))


def make_ghn(**settings):
    torch.manual_seed(0)
    ghn = Ghn(GhnConfig(**{**SMALL, **settings}))
    if ghn.embedding.bits is not None:
        nn.init.normal_(ghn.embedding.bits.weight)
    return ghn


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def ground(data):
    return Ground.of(data, PLAN)


def by_hand(ghn, net, data, bits=None):
    """A network with predicted weights and statistics of 96 images, folded."""
    model = net.build(1, 10, 8)
    (weights,) = ghn.predict([build_graph(model)], bits=bits, skeletons=[model])
    model.load_state_dict({k: v.detach() for k, v in weights.items()}, strict=False)
    images = calibration_images(data, TrainConfig(batch_size=32, seed=5), 96)
    update_bn(images, model)
    return model.eval(), images[:2]


def quantized_by_hand(model, images, data, method, bits, **changes):
    share = 99.0 if method == "percentile" else None
    config = ptq_qconfig(method, bits, bits, percentile=share, first_last_bits=8)
    config = replace(config, **changes)
    folded = fold_batchnorm(model)
    return evaluate(quantize_after_training(folded, config, images, fold=False), data.test)


def assert_row(score, expected):
    found = {"test_loss": score.loss, "test_accuracy": score.accuracy}
    assert found == expected, (score, expected)


def test_rows_are_those_by_hand(data, ground):
    ghn, net = make_ghn(), NETS[0]
    plan = replace(PLAN, bits=(8, 4))
    scores = score_net(ghn, net, ground, plan)
    model, images = by_hand(ghn, net, data)
    assert [(s.bits, s.method) for s in scores] == [
        ("FP32", ""),
        ("W8A8", "minmax"),
        ("W8A8", "percentile"),
        ("W4A4", "minmax"),
        ("W4A4", "percentile"),
    ]
    assert {(s.split, s.seed, s.index) for s in scores} == {("id", 1, 0)}
    assert_row(scores[0], evaluate(model, data.test))
    for score in scores[1:]:
        bits = int(score.bits[1])
        assert_row(score, quantized_by_hand(model, images, data, score.method, bits))
    assert len({score.loss for score in scores}) == 5


def test_a_ghn_with_bit_widths_is_told_them(data, ground):
    ghn, net = make_ghn(bit_widths=(2, 4)), NETS[0]
    plan = replace(PLAN, bits=(4, 2), methods=("minmax",))
    scores = score_net(ghn, net, ground, plan)
    for score, bits in zip(scores, (None, 4, 2), strict=True):
        model, images = by_hand(ghn, net, data, bits)
        if bits is None:
            assert_row(score, evaluate(model, data.test))
        else:
            assert_row(score, quantized_by_hand(model, images, data, "minmax", bits))


def test_mixed_precision_gives_each_layer_its_bits(data, ground):
    ghn, net = make_ghn(), NETS[1]
    plan = replace(PLAN, bits=(), methods=("minmax",), mixed=(8, 2, 4))
    model, images = by_hand(ghn, net, data)
    layers = drawn_bits(model, net, plan)
    names = [n for n, m in fold_batchnorm(model).named_modules() if isinstance(m, LAYERS)]
    assert list(layers) == names[1:-1] and set(layers.values()) == {2, 4, 8}
    draw = Draw(5, 1, "mixed/digits/id/1")
    assert list(layers.values()) == [draw.pick((2, 4, 8)) for _ in layers]
    prepared = prepare(fold_batchnorm(model), plan.qconfig("minmax", 8, layers))
    found = {n: m for n, m in prepared.named_modules() if isinstance(m, QuantLayer)}
    for name, layer in found.items():
        for quantizer in (layer.weight_fake_quant, layer.input_fake_quant):
            assert quantizer.spec.bits == layers.get(name, 8)
    before, row = score_net(ghn, net, ground, plan)
    assert (before.bits, row.bits, row.method) == ("FP32", "mixed 2/4/8", "minmax")
    overrides = {name: ptq_qconfig("minmax", bits, bits) for name, bits in layers.items()}
    expected = quantized_by_hand(model, images, data, "minmax", 8, overrides=overrides)
    assert_row(row, expected)
    other = drawn_bits(model, net, replace(plan, seed=6))
    assert other.keys() == layers.keys() and other != layers


LAYERS = (nn.Conv2d, nn.Linear)


def test_mixed_precision_is_told_layer_by_layer(data, ground):
    ghn, net = make_ghn(bit_widths=(2, 4)), NETS[0]
    plan = replace(PLAN, bits=(), methods=("minmax",), mixed=(2, 4))
    skeleton = net.build(1, 10, 8)
    graph = build_graph(skeleton)
    layers = drawn_bits(skeleton, net, plan)
    told = told_bits(skeleton, layers, ghn, plan)
    first, *_, last = layer_names(skeleton)
    assert told == {first: None, **layers, last: None}  # of 8 bits the GHN knows nothing
    knowing = make_ghn(bit_widths=(2, 4, 8))
    assert told_bits(skeleton, layers, knowing, plan) == {first: 8, **layers, last: 8}
    bits = node_bits(graph, told)
    assert bits.keys() == {node.name for node in graph.nodes}
    for row, node in enumerate(graph.nodes):
        if node.name in told:
            assert bits[node.name] == told[node.name]
        elif node.primitive == "bn":  # of the convolution in front
            (source,) = (graph.adjacency[:, row] == 1).nonzero().flatten().tolist()
            assert bits[node.name] == told[graph.nodes[source].name]
    # the weights are those for that mapping
    model, images = by_hand(ghn, net, data, bits)
    overrides = {name: ptq_qconfig("minmax", b, b) for name, b in layers.items()}
    expected = quantized_by_hand(model, images, data, "minmax", 4, overrides=overrides)
    assert_row(score_net(ghn, net, ground, plan)[1], expected)
    # layers all alike are as a network in one width
    everywhere = node_bits(graph, dict.fromkeys(told, 2))
    assert set(everywhere.values()) == {2}


def test_a_module_gets_weights_and_statistics(data):
    ghn = make_ghn()
    torch.manual_seed(3)
    model = Cnn(1, 10, (4, 8), (2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = materialize(model, ghn, data, plan=PLAN)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (weights,) = ghn.predict([build_graph(model)], skeletons=[model])
    model.load_state_dict({k: v.detach() for k, v in weights.items()}, strict=False)
    update_bn(calibration_images(data, TrainConfig(batch_size=32, seed=5), 96), model)
    for name, value in made.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    net = materialize(NETS[0], ghn, data, plan=PLAN)
    expected, _ = by_hand(ghn, NETS[0], data)
    assert evaluate(net, data.test) == evaluate(expected, data.test)


def test_order_does_not_matter(data, ground):
    ghn = make_ghn()
    forward = evaluate_networks(ghn, NETS, data, PLAN)
    torch.manual_seed(99)
    backward = evaluate_networks(ghn, NETS[::-1], data, PLAN)
    key = ("split", "index")
    assert sorted(forward, key=lambda s: [getattr(s, k) for k in key]) == sorted(
        backward, key=lambda s: [getattr(s, k) for k in key]
    )
    assert forward[:3] == score_net(ghn, NETS[0], ground, PLAN)


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_network_that_is_not_finite_is_a_row_like_others(data, ground, value):
    ghn = make_ghn()
    with torch.no_grad():
        ghn.head.block.bias.fill_(value)
    plan = replace(PLAN, mixed=(2, 4))
    scores = score_net(ghn, NETS[2], ground, plan)
    share = float((data.test.y == 0).float().mean())
    assert [(s.bits, s.loss) for s in scores] == [
        ("FP32", None),
        *[("W4A4", None)] * 2,
        *[("mixed 2/4", None)] * 2,
    ]
    assert all(s.accuracy == pytest.approx(share) for s in scores[1:])
    sound = score_net(make_ghn(), NETS[2], ground, plan)
    rows = summarise([*scores, *sound])
    assert [(row.nets, row.not_finite) for row in rows] == [(2, 1)] * 5
    assert rows[1].loss == sound[1].loss
    assert [row[-1] for row in table(scores)[1]] == ["1"] * 5


def test_summary():
    scores = [
        NetScore("id", 1, i, bits, method, accuracy, loss)
        for bits, method, rows in (
            ("FP32", "", ((0.5, 1.0), (0.75, 0.5), (0.25, 3.0))),
            ("W4A4", "minmax", ((0.5, 1.0), (0.1, None), (0.3, 2.0))),
        )
        for i, (accuracy, loss) in enumerate(rows)
    ]
    scores.append(NetScore("deep", 1, 0, "FP32", "", 0.2, None))
    first, second, third = summarise(scores)
    assert (first.split, first.bits, first.nets, first.not_finite) == ("id", "FP32", 3, 0)
    assert (first.mean, first.sd, first.best, first.loss) == (0.5, 0.25, 0.75, 1.5)
    assert (second.mean, second.best, second.loss) == (pytest.approx(0.3), 0.5, 1.5)
    assert second.cells() == ("id", "W4A4", "minmax", "30.0", "20.0", "50.0", "1.500", "1")
    assert third.split == "deep" and math.isnan(third.sd) and math.isnan(third.loss)


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


def test_a_run_and_its_files(tmp_path, checkpoint, data, monkeypatch):
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

    def never(job):
        raise AssertionError("a finished run is read back")

    monkeypatch.setattr(evaluate_run, "_work", never)
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
    real, made = evaluate_run._work, []

    class Killed(BaseException):
        pass

    def counted(job):
        if len(made) == 2:
            raise Killed
        made.append(job.number)
        return real(job)

    monkeypatch.setattr(evaluate_run, "_work", counted)
    out = tmp_path / "stopped"
    with pytest.raises(Killed):
        run_evaluation(source, nets, out, PLAN)
    assert made == [0, 1] and not (out / "results.json").exists()
    with open(out / METRICS, "ab") as file:  # and a line that was cut off
        file.write(b'{"net": 2, "sco')
    made[:] = [None, None, None]
    assert run_evaluation(source, nets, out, PLAN) == whole
    assert made[3:] == [2, 3]
    for name in ("results.json", METRICS):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_do_not_matter(tmp_path, checkpoint):
    source, plan = GhnSource.load(checkpoint), replace(PLAN, methods=("minmax",))
    nets = nets_of(("id",))
    one, two = (run_evaluation(source, nets, tmp_path / str(n), plan, jobs=n) for n in (1, 2))
    assert one == two and len(one) == 2 * 2
    files = [(tmp_path / n / "results.json").read_bytes() for n in "12"]
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
    nets = [draw_net("digits", split, 7, i) for i in (0, 1) for split in ("train", "id")]
    write_nets(tmp_path / "nets.jsonl", nets)
    words = [checkpoint, "--space-file", tmp_path / "nets.jsonl", *TINY]
    done = call(*words, "--out", tmp_path / "eval")
    assert done.exit_code == 0, done.output
    origins = [(s.split, s.seed, s.index) for s in read_scores(tmp_path / "eval")[::2]]
    assert origins == [("train", 7, 0), ("train", 7, 1), ("id", 7, 0), ("id", 7, 1)]
    done = call(*words, "--split", "id", "--nets", "1", "--out", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert read_scores(tmp_path / "one") == read_scores(tmp_path / "eval")[4:6]
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


def test_histograms(tmp_path):
    """One split in float alone has one axis; a bar is where its networks are."""
    scores = [NetScore("id", 1, i, "FP32", "", 0.5, 1.0) for i in range(3)]
    plot_histograms(tmp_path / "one.png", scores)
    plot_histograms(tmp_path / "other.png", [replace(s, accuracy=0.9) for s in scores])
    pictures = []
    for name in ("one.png", "other.png"):
        with Image.open(tmp_path / name) as picture:
            pictures.append(
                torch.tensor(list(picture.convert("L").tobytes())).reshape(picture.size[::-1])
            )
    first, second = ((p < 200).float().sum(0) for p in pictures)
    bars = (first - second).abs() > 50
    assert bars.sum() > 4 and first[bars].amax() > 100
