"""The space of networks: drawn alike everywhere, no genotype in two splits, all of them whole."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from qtrain.cli import app
from qtrain.cli import ghn as ghn_command
from qtrain.ghn.genotype import OPERATIONS, TRAINABLE, Cell, Draw, Genotype, draw_genotype
from qtrain.ghn.graph import build_graph
from qtrain.ghn.networks import ConvSpec, VitSpec
from qtrain.ghn.space import (
    SPACES,
    SPLITS,
    Net,
    Ranges,
    draw_net,
    draw_nets,
    draw_spec,
    parameter_count,
    read_nets,
    split_of,
    write_nets,
)
from torch import nn
from typer.testing import CliRunner

from qkernels.nn import fold_batchnorm

assert ghn_command  # its import adds the command


def digits(split="train", count=12, seed=0):
    return draw_nets("digits", split, seed, count, quiet=True)


def build(net, channels=1, classes=10, size=8, seed=0):
    torch.manual_seed(seed)
    return net.build(channels, classes, size)


def test_a_net_is_what_its_seed_split_and_index_say():
    nets = digits()
    assert [draw_net("digits", "train", 0, i) for i in (5, 2)] == [nets[5], nets[2]]
    assert len({net.spec for net in nets}) == len(nets)
    other = {net.spec for net in digits(seed=1)} | {net.spec for net in digits("id")}
    assert not other & {net.spec for net in nets}
    # in every process and with every version of Python: the file of a space need not be kept
    genotypes = [draw_spec(space, "train", 0, 0)[0].digest for space in SPACES]
    assert genotypes == ["3fe1358883833058", "22d711f479e21902", "dbe0bc966a739cb9"]


@pytest.mark.parametrize("space", SPACES)
def test_no_genotype_is_in_two_splits(space):
    splits = SPACES[space].splits
    drawn = {
        split: {draw_spec(space, split, seed, i)[0].digest for seed in (0, 1) for i in range(100)}
        for split in splits
    }
    seen = Counter(genotype for genotypes in drawn.values() for genotype in genotypes)
    assert set(seen.values()) == {1}
    assert all(len(genotypes) > 60 for genotypes in drawn.values())


def test_an_index_of_another_split_is_drawn_again():
    for index in range(20):
        spec, number = draw_spec("digits", "id", 3, index)
        assert split_of(spec) == "id"
        draws = [Draw(3, index, f"digits/id/{i}") for i in range(number + 1)]
        # cells, sums, then the genotype: the ranges of id are 4 cells and 1 or 2 sum nodes
        found = []
        for draw in draws:
            assert draw.between(4, 4) == 4
            genotype = draw_genotype(draw, draw.between(1, 2))
            found.append(split_of(ConvSpec(genotype, 4, 8, 2, "plain", 3, True, 0, True, True)))
        assert found[-1] == "id" and "id" not in found[:-1]


def test_splits_differ_in_what_they_are_named_for():
    specs = {split: [draw_spec("paper", split, 0, i)[0] for i in range(60)] for split in SPLITS}
    sums = {split: {len(s.genotype.normal.sums) for s in specs[split]} for split in SPLITS}
    cells = {split: {s.cells for s in specs[split]} for split in SPLITS}
    widths = {split: {s.width for s in specs[split]} for split in SPLITS}
    for split in SPLITS:
        assert {s.norm for s in specs[split]} == {split != "bn-free"}
        assert widths[split] <= set(range(128, 513, 64) if split == "wide" else range(32, 129, 16))
        assert cells[split] <= set(range(10, 37) if split == "deep" else range(4, 19))
        assert sums[split] <= set(range(2, 11) if split == "dense" else range(1, 5))
    assert max(cells["deep"]) > 18 and max(sums["dense"]) > 4 and len(widths["train"]) > 5
    long = [s for s in specs["train"] if s.cells > 10]
    assert long and {len(s.genotype.normal.sums) for s in long} <= {1, 2}
    built = [build(net) for net in digits("bn-free", 4)]
    for model in built:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert any(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_a_net_is_narrowed_to_the_parameters_that_it_may_have():
    ranges = {most: Ranges((4, 4), (2, 2), (64,), most) for most in (10**9, 60_000)}
    free, bound = (
        [draw_net(replace(SPACES["digits"], splits={"id": r}), "id", 0, i) for i in range(6)]
        for r in ranges.values()
    )
    assert all(net.spec.width == 64 for net in free)
    for before, net in zip(free, bound, strict=True):
        assert before.parameters > 60_000 >= net.parameters
        assert net.parameters == parameter_count(net.spec, 1, 10, 8)
        assert net.spec.width % 8 == 0
        assert replace(net.spec, width=64) == before.spec


def test_operations_are_drawn_evenly_and_none_of_them_is_lost():
    draw = Draw(0, 0, "a test")
    genotypes = [draw_genotype(draw, 3) for _ in range(600)]
    counts = Counter(op for g in genotypes for op in g.normal.operations())
    count = sum(counts.values())
    for op in OPERATIONS:
        # four standard deviations about a tenth
        assert abs(counts[op] - count / 10) < 4 * (0.09 * count) ** 0.5
    weightless = [not set(g.reduce.operations()) & set(TRAINABLE) for g in genotypes]
    assert 0.42 < sum(weightless) / 600 < 0.6
    assert all(set(g.normal.operations()) & set(TRAINABLE) for g in genotypes)
    # 3 sum nodes have 6 terms, of which 3 may be "none", one of 11 choices
    missing = 6 * 600 - count
    assert abs(missing - 1800 / 11) < 4 * (1800 * 10 / 121) ** 0.5
    assert any(0 not in g.normal.read() for g in genotypes)


@pytest.mark.parametrize(
    ("channels", "classes", "size"), [(1, 10, 8), (3, 7, 32), (2, 3, 9), (3, 5, 130)]
)
def test_nets_take_any_images(channels, classes, size):
    for net in digits(count=4) + digits("bn-free", 2):
        model = build(net, channels, classes, size).eval()
        x = torch.randn(2, channels, size, size)
        logits = model(x)
        assert logits.shape == (2, classes) and logits.isfinite().all()
        assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("split", SPLITS)
def test_every_parameter_has_a_part_and_is_decoded(split):
    for net in digits(split, 3):
        model = build(net)
        x = torch.randn(8, 1, 8, 8)
        (model(x) * torch.randn(8, 10)).sum().backward()
        still = [name for name, p in model.named_parameters() if p.grad is None]
        assert not still
        graph = build_graph(model)
        assert not graph.undecoded(model)
        reads = graph.adjacency == 1
        # whole: all but the last node is read, and all but the input reads
        assert reads[:-1].any(1).all() and reads[:, 1:].any(0).all()
        assert sum(p.numel() for p in model.parameters()) == net.parameters


def test_all_operations_are_built_as_they_are_named():
    ones = {op: Cell((((op, 1),),), (2,)) for op in OPERATIONS}
    found = {}
    for op, cell in ones.items():
        spec = ConvSpec(Genotype(cell, cell), 1, 8, 1, "plain", 3, False, 0, True, True)
        model = build(Net("mine", "train", 0, 0, 0, 0, spec))
        # stem conv and norm, the operation, mean, linear weight and bias
        graph = build_graph(model)
        found[op] = [(n.primitive, n.shape[2:]) for n in graph.nodes[3:-3]]
    norm = ("bn", ())

    def conv(k):
        return ("conv", (k, k))

    def deep(kind, k):
        return [(kind, (k, k)), conv(1), norm]

    assert found == {
        "skip": [],
        "max_pool_3x3": [("max_pool", ())],
        "avg_pool_3x3": [("avg_pool", ())],
        "sep_conv_3x3": deep("sep_conv", 3) * 2,
        "sep_conv_5x5": deep("sep_conv", 5) * 2,
        "dil_conv_3x3": deep("dil_conv", 3),
        "dil_conv_5x5": deep("dil_conv", 5),
        "conv_1x1": [conv(1), norm],
        "conv_3x3": [conv(3), norm],
        "inverted_3x3": [conv(1), norm, *deep("sep_conv", 3)],
    }


@pytest.mark.parametrize("split", ["train", "dense"])
def test_batchnorm_folds_wholly(split):
    for net in digits(split, 4):
        model = build(net)
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8) + 1)
        x = torch.randn(4, 1, 8, 8)
        folded = fold_batchnorm(model.eval())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_file_brings_the_nets_back(tmp_path):
    nets = digits(count=5) + digits("dense", 2) + draw_nets("vit", "id", 0, 2, quiet=True)
    write_nets(tmp_path / "new" / "nets.jsonl", nets)
    back = read_nets(tmp_path / "new" / "nets.jsonl")
    assert back == nets
    first = build(nets[0]).state_dict()
    second = build(back[0]).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = (tmp_path / "new" / "nets.jsonl").read_bytes()
    write_nets(tmp_path / "again.jsonl", back)
    assert (tmp_path / "again.jsonl").read_bytes() == before


def cell(value):
    return value["spec"]["genotype"]["normal"]


@pytest.mark.parametrize(
    ("change", "words"),  # a line as it is, or what breaks a good one
    [
        ('{"space": "digits", "spl', "line 1 column"),
        ("", "Expecting value"),
        ("[1, 2]", "net must be a JSON object"),
        (lambda v: v.pop("seed"), "net must be of the keys .*seed"),
        (lambda v: v.update(seed="0"), "seed must be a whole number"),
        (lambda v: v.update(kind="gan"), "kind must be one of conv, vit, got gan"),
        (lambda v: v.update(split="all"), "split must be one of train, id"),
        (lambda v: v["spec"].update(width=0), "width must be at least 2, got 0"),
        (lambda v: v["spec"].update(stem=3), "stem must be one of plain, pool, deep"),
        (lambda v: v["spec"].update(depth=3), "spec must be that of a conv network"),
        (lambda v: v["spec"].pop("genotype"), "spec must be that of a conv network"),
        (lambda v: cell(v)["sums"][0][0].__setitem__(0, "fft"), "operation must be one"),
        (lambda v: cell(v)["sums"][0][0].__setitem__(1, 7), "of earlier states"),
        (lambda v: cell(v)["sums"][0][0].__setitem__(1, 0.5), "whole numbers"),
        (lambda v: cell(v)["sums"].append([["skip", 1]]), "that nothing reads"),
        (lambda v: cell(v).update(concat=[2, 9]), "concat must be of states"),
        (lambda v: cell(v).update(sums=[[["skip", 0]]], concat=[2]), "last cell is lost"),
        (lambda v: cell(v).update(sums=5), "spec must be that of a conv network"),
        (lambda v: v.update(genotype="0" * 16), "genotype must be [0-9a-f]{16}, the hash"),
    ],
)
def test_a_broken_line_is_named(tmp_path, change, words):
    path = tmp_path / "nets.jsonl"
    write_nets(path, digits(count=2))
    line = change
    if not isinstance(change, str):
        value = json.loads(path.read_text().splitlines()[0])
        change(value)
        line = json.dumps(value)
    path.write_text(path.read_text() + line + "\n")
    match = rf"^ghn-space: {path} must hold a network on each line, got at line 3: .*({words})"
    with pytest.raises(ValueError, match=match):
        read_nets(path)


def test_an_empty_file_is_no_space(tmp_path):
    (tmp_path / "nets.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file must be one with networks, got .*nets\.jsonl"):
        read_nets(tmp_path / "nets.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("big", "train", 0, 0), "space must be one of paper, digits, vit, got big"),
        (("vit", "dense", 0, 0), "split must be one of train, id, wide, deep in vit, got dense"),
        (("digits", "train", 0, -1), "index must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=f"ghn-space: {words}"):
        draw_net(*arguments)


def test_a_specification_that_cannot_be_built():
    genotype = next(s for s in digits() if len(s.spec.genotype.normal.concat) == 2).spec.genotype
    with pytest.raises(ValueError, match="preprocess must be true unless"):
        ConvSpec(genotype, 4, 8, 1, "plain", 3, False, 0, True, True)
    with pytest.raises(ValueError, match=r"block must be \(heads, ratio\), heads dividing 32"):
        VitSpec(32, ((3, 2),))


def test_vits():
    nets = draw_nets("vit", "train", 0, 3, quiet=True)
    for net in nets:
        model = build(net, 1, 10, 8)
        (model(torch.randn(4, 1, 8, 8)) * torch.randn(4, 10)).sum().backward()
        assert all(p.grad.any() for p in model.parameters())
        graph = build_graph(model)
        assert not graph.undecoded(model)
        primitives = [node.primitive for node in graph.nodes]
        assert primitives.count("msa") == len(net.spec.blocks)
        assert primitives.count("pos_enc") == 1
        ratios = [block.mlp[0].out_features // net.spec.width for block in model.blocks]
        assert ratios == [ratio for _, ratio in net.spec.blocks]


def call(*arguments, code=0):
    outcome = CliRunner().invoke(app, ["ghn-space", *map(str, arguments)])
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_the_command(tmp_path):
    out = tmp_path / "id.jsonl"
    table = call("--count", 3, "--split", "id", "--seed", 4, "--out", out).output
    assert "3 networks of digits/id" in table and "parameters" in table
    assert read_nets(out) == digits("id", 3, seed=4)
    there = out.read_bytes()
    error = call("--count", 2, "--out", out, code=2).stderr
    assert "out must be a new file" in error and "--overwrite" in error
    assert "split must be one of" in call("--split", "x", "--out", tmp_path / "x", code=2).stderr
    assert out.read_bytes() == there and [p.name for p in tmp_path.iterdir()] == ["id.jsonl"]
    call("--count", 2, "--out", out, "--overwrite")
    assert read_nets(out) == digits(count=2)
