"""What predicted weights score: against the same by hand, whatever the order."""

import math
from dataclasses import replace

import pytest
import torch
from ghn_small import NETS, PLAN, make_ghn
from PIL import Image
from qtrain.data import load_dataset
from qtrain.ghn.evaluate import (
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
from qtrain.ghn.genotype import Draw
from qtrain.ghn.graph import build_graph
from qtrain.loop import evaluate
from qtrain.models import Cnn
from qtrain.ptq import calibration_images, ptq_qconfig, quantize_after_training
from qtrain.recipe import TrainConfig
from torch import nn
from torch.optim.swa_utils import update_bn

from qkernels.nn import QuantLayer, fold_batchnorm, prepare


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def ground(data):
    return Ground.of(data, PLAN)


def by_hand(ghn, net, data, bits=None):
    """A network with predicted weights and statistics of 96 images, and the images for ranges."""
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
    assert bits[graph.nodes[0].name] == told[first]
    for row, node in enumerate(graph.nodes):
        if node.name in told:
            assert bits[node.name] == told[node.name]
        elif row:  # as the latest that it reads: a norm as its convolution
            source = (graph.adjacency[:, row] == 1).nonzero().max()
            assert bits[node.name] == bits[graph.nodes[source].name]
    joined = [row for row, node in enumerate(graph.nodes) if node.primitive in ("sum", "concat")]
    widths = [
        {bits[graph.nodes[i].name] for i in range(row) if graph.adjacency[i, row] == 1}
        for row in joined
    ]
    assert any(len(w) > 1 for w in widths)
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
    assert third.cells() == ("deep", "FP32", "-", "20.0", "-", "20.0", "-", "1")


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
