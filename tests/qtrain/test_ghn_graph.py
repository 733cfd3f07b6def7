"""The graph of a network: the published counts, graphs by hand, and the two ways of tracing."""

from collections import Counter

import pytest
import torch
from qtrain.ghn.graph import FARTHEST, PRIMITIVES, adjacency, build_graph
from qtrain.ghn.rules import NoPrimitiveError
from qtrain.ghn.trace import UntraceableError, by_export, by_fx
from qtrain.models import build_model
from torch import nn
from torch.nn import functional as F


def edges(graph, without=()):
    keep = [i for i, node in enumerate(graph.nodes) if node.primitive not in without]
    return len(keep), int(graph.adjacency[keep][:, keep].count_nonzero())


def primitives(graph):
    return [node.primitive for node in graph.nodes]


def same(first, second):
    """Equal but for the names that the tracers give to operations without parameters."""
    assert primitives(first) == primitives(second)
    for a, b in zip(first.nodes, second.nodes, strict=True):
        assert (a.shape, a.parameters, a.groups) == (b.shape, b.parameters, b.groups)
        assert a.name == b.name or not a.parameters
    assert torch.equal(first.adjacency, second.adjacency)
    return True


@pytest.mark.parametrize(
    ("name", "whole", "without_max_pool"),
    [
        # what is known of the ResNets' graphs leaves their max pooling out
        ("resnet18", (53, 1354), (52, 1302)),
        ("resnet50", (127, 7953), (126, 7827)),
        ("mobilenet_v2", (118, 6874), (118, 6874)),
    ],
)
def test_counts_of_known_models_on_the_meta_device(name, whole, without_max_pool):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.get_model(name)
        graph = build_graph(model)
    assert edges(graph) == whole
    assert edges(graph, {"max_pool"}) == without_max_pool
    assert not graph.undecoded(model)
    assert graph.adjacency.device.type == "cpu" and graph.adjacency.dtype == torch.int64


class Tiny(nn.Module):
    """One of most things: its graph is written out below."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=True)
        self.deep = nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.wide = nn.Conv2d(16, 6, 3, groups=2, dilation=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = x + self.norm(self.deep(x)) * 2.0
        y = torch.cat([y, self.pool(x)], 1)
        y = F.dropout(self.wide(y), training=self.training)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def test_a_graph_by_hand():
    graph = build_graph(Tiny())
    wanted = [
        ("input", "x", (), (), 1, []),
        ("conv", "stem", (8, 3, 3, 3), ("stem.weight",), 1, [0]),
        ("bias", "stem", (8,), ("stem.bias",), 1, [1]),
        ("sep_conv", "deep", (8, 1, 3, 3), ("deep.weight",), 8, [2]),
        ("bn", "norm", (8,), ("norm.weight", "norm.bias"), 1, [3]),
        ("sum", "add", (), (), 1, [2, 4]),
        ("max_pool", "pool", (), (), 1, [2]),
        ("concat", "cat", (), (), 1, [5, 6]),
        ("dil_conv", "wide", (6, 8, 3, 3), ("wide.weight",), 2, [7]),
        ("bias", "wide", (6,), ("wide.bias",), 1, [8]),
        ("glob_avg", "adaptive_avg_pool2d", (), (), 1, [9]),
        ("conv", "head", (5, 6, 1, 1), ("head.weight",), 1, [10]),
        ("bias", "head", (5,), ("head.bias",), 1, [11]),
    ]
    for node, (primitive, name, shape, parameters, groups, _) in zip(
        graph.nodes, wanted, strict=True
    ):
        found = (node.primitive, node.name, node.shape, node.parameters, node.groups)
        assert found == (primitive, name, shape, parameters, groups)
        assert node.primitive in PRIMITIVES
    direct = {(i, j) for j, row in enumerate(wanted) for i in row[-1]}
    assert {tuple(e) for e in (graph.adjacency == 1).nonzero().tolist()} == direct
    # the shortest way counts: from the stem's bias around the depthwise convolution
    assert graph.adjacency[2, 7] == 2 and graph.adjacency[3, 7] == 3
    assert graph.adjacency[0, 12] == 9
    assert graph.adjacency[5, 6] == 0 and graph.adjacency[3, 6] == 0
    assert not graph.adjacency.tril().any()


def test_virtual_edges_end_where_they_should():
    matrix = adjacency([[i - 1] if i else [] for i in range(60)])
    i, j = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    assert torch.equal(matrix, torch.where((j > i) & (j - i <= FARTHEST), j - i, 0))


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mobile", "vit_tiny"])
def test_every_parameter_of_ours_is_decoded_once(name):
    model = build_model(name, channels=3, classes=7, size=32)
    graph = build_graph(model)
    filled = [p for node in graph.nodes for p in node.parameters]
    assert sorted(filled) == sorted(name for name, _ in model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for node in graph.nodes:
        for parameter in node.parameters:
            shape = shapes[parameter]
            assert node.shape == (shape if len(shape) != 2 else (*shape, 1, 1))
    kinds = Counter(type(m) for m in model.modules())
    assert primitives(graph).count("bn") == kinds[nn.BatchNorm2d]
    assert primitives(graph).count("glob_avg") == primitives(graph).count("input") == 1


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    graph = build_graph(model)
    assert not graph.undecoded(model)
    layers = {"conv": 50, "bias": 50, "ln": 25, "msa": 12}
    # 24 residual sums, and the positions'; the class token and the positions are embeddings
    rest = {"input": 1, "sum": 25, "concat": 1, "pos_enc": 2}
    assert Counter(primitives(graph)) == {**layers, **rest}
    shapes = {n.name: n.shape for n in graph.nodes if n.primitive == "pos_enc"}
    assert shapes == {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192)}
    # attention reads what its projection makes, and the next projection reads attention
    at = primitives(graph).index("msa")
    assert graph.nodes[at - 1].parameters == ("blocks.0.attn.qkv.bias",)
    assert graph.nodes[at + 1].parameters == ("blocks.0.attn.proj.weight",)
    assert graph.adjacency[at - 1, at] == graph.adjacency[at, at + 1] == 1


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.how = how

    def forward(self, x):  # [N, 4, 8]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(1, 2) / 8**0.5
        if self.how == "biased":
            scores = scores + self.table
        if self.how == "einsum":
            return torch.einsum("nij,njd->nid", scores.softmax(-1), v)
        return torch.matmul(F.dropout(F.softmax(scores, -1), 0.1), v)


def test_attention_written_out_is_attention():
    fused, manual, einsum = (build_graph(Attention(how)) for how in ("fused", "manual", "einsum"))
    assert primitives(fused) == ["input", *["conv", "bias"] * 3, "msa"]
    assert (fused.adjacency[:, -1] == 1).nonzero().flatten().tolist() == [2, 4, 6]
    assert same(fused, manual) and same(fused, einsum)
    biased = build_graph(Attention("biased"))
    assert primitives(biased) == ["input", *["conv", "bias"] * 3, "pos_enc", "sum", "msa"]
    assert (biased.adjacency[:, -1] == 1).nonzero().flatten().tolist() == [6, 8]
    theirs = build_graph(TorchAttention())
    assert primitives(theirs) == ["input", "conv", "bias", "msa", "conv", "bias"]
    assert theirs.nodes[1].shape == (24, 8, 1, 1)


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = self.scale * F.silu(self.stem(x))
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return (x * gate).mean((2, 3))


def test_a_gate_on_channels_is_cse_without_its_average():
    model = Gate()
    graph = build_graph(model)
    squeeze = ["conv", "bias", "conv", "bias", "cse"]
    assert primitives(graph) == ["input", "conv", *squeeze, "glob_avg"]
    assert (graph.adjacency[:, 6] == 1).nonzero().flatten().tolist() == [1, 5]
    assert graph.adjacency[1, 2] == 1
    assert graph.undecoded(model) == ("scale",)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        self.spare(x)
        return self.second(self.first(self.first(x)))


def test_shared_weights_are_decoded_once():
    model = Shared()
    graph = build_graph(model)
    assert [n.parameters for n in graph.nodes] == [
        (),
        ("first.weight",),
        ("first.bias",),
        (),
        (),
        (),
    ]
    assert [n.shape for n in graph.nodes[3:]] == [()] * 3
    assert graph.undecoded(model) == ("second.weight", "spare.weight", "spare.bias")


class Branches(nn.Module):
    """Branches on the size of its input, which torch.fx does not know."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x if x.shape[-1] > 4 else F.interpolate(x, 8))


@pytest.mark.parametrize(
    "model", [Tiny(), Gate(), Branches(Tiny())], ids=lambda m: type(m).__name__
)
def test_the_second_way_gives_the_same_graph(model):
    graph = build_graph(model, torch.zeros(1, 3, 12, 12))
    exported = by_export(model.eval(), torch.zeros(1, 3, 12, 12))
    if isinstance(model, Branches):
        with pytest.raises(UntraceableError):
            by_fx(model)
        plain = build_graph(model.inner)
        assert primitives(plain) == primitives(graph)
        assert torch.equal(plain.adjacency, graph.adjacency)
        assert graph.nodes[1].parameters == ("inner.stem.weight",)
    assert same(graph, exported)


def test_export_needs_no_example_and_no_weights():
    with torch.device("meta"):
        model = Branches(build_model("cnn", channels=1, classes=10, size=8))
    graph = build_graph(model)
    assert not graph.undecoded(model)
    assert primitives(graph).count("conv") == 5


class Peeks(Tiny):
    def forward(self, x):
        y = self.stem(x)
        return super().forward(x) if y.sum() > 0 else y


def test_a_model_that_cannot_be_traced():
    model = Peeks().train()
    model.norm.eval()
    with pytest.raises(ValueError) as caught:
        build_graph(model, torch.zeros(1, 3, 12, 12))
    text = str(caught.value)
    assert "graph: model must be one that torch.fx or torch.export can trace, got Peeks" in text
    assert "torch.fx stopped after node 'gt'" in text and "control flow" in text
    assert "torch.export stopped (" in text and "\n" not in text
    assert model.training and model.stem.training and not model.norm.training


class Wraps(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.free = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        raise NotImplementedError


class Flat(Wraps):
    def forward(self, x):
        return self.line(x.flatten(2))


class Product(Wraps):
    def forward(self, x):
        return self.a(x) * self.b(x)


class Bilinear(Wraps):
    def forward(self, x):
        return self.c(torch.matmul(self.a(x), self.b(x)))


class Weighs(Wraps):
    def forward(self, x):
        return F.prelu(x, self.free[0, :3])


class Writes(Wraps):
    def forward(self, x):
        y = self.a(x)
        y[:, :2].add_(self.b(x)[:, :2])
        return y


class Accumulates(Wraps):
    def forward(self, x):
        y = self.a(x)
        y.add_(self.b(x))
        return y


def test_export_sees_what_is_written_in_place():
    model = Accumulates(**convs("a", "b"))
    with pytest.raises(NoPrimitiveError, match="only writes in place, 'add_'"):
        by_fx(model)
    graph = build_graph(model, torch.zeros(1, 3, 8, 8))
    assert primitives(graph) == ["input", *["conv", "bias"] * 2, "sum"]
    assert (graph.adjacency[:, -1] == 1).nonzero().flatten().tolist() == [2, 4]


def convs(*names):
    return {name: nn.Conv2d(3, 3, 1) for name in names}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Flat(line=nn.Conv1d(3, 4, 1)), "'line' (Conv1d), which has parameters and none"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), "'1' (GroupNorm)"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), "'0' (ConvTranspose2d)"),
        (nn.Sequential(nn.LayerNorm((3, 8, 8))), "norms over one dimension, got '0'"),
        (Product(**convs("a", "b")), "got 'mul' at node 'mul' of different activations"),
        (Bilinear(**convs("a", "b", "c")), "got 'matmul', whose product 'c' reads"),
        (Weighs(), "got 'prelu' at node 'prelu', which reads 'free'"),
        (Writes(**convs("a", "b")), "only writes in place, 'add_' at node 'add_'"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))),
            "plain parameters, got '0', whose weight is computed",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_an_operation_without_a_primitive(model, words):
    with pytest.raises(NoPrimitiveError) as caught:
        build_graph(model, torch.zeros(1, 3, 8, 8))
    assert words in str(caught.value)
    assert str(caught.value).startswith("graph: model must ")


class Defaults(Tiny):
    def forward(self, x, mask=None, double=False):
        y = super().forward(x)
        y = y if mask is None else y * mask
        return y + y if double else y


def test_arguments_with_defaults_keep_them():
    assert same(build_graph(Defaults()), build_graph(Tiny()))
