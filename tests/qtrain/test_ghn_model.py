"""The graph hypernetwork as a whole: what it predicts for which graphs."""

import pytest
import torch
from ghn_graphs import Branches, Residual, branches_graph, make_graph, residual_graph
from qtrain.ghn.config import GhnConfig, ghn2, ghn3
from qtrain.ghn.embedding import NodeEmbedding, channel_vocabulary, kernel_vocabulary
from qtrain.ghn.graph import PRIMITIVES, Graph, Node
from qtrain.ghn.model import Ghn, targets_of
from torch import nn
from torch.func import functional_call

SETTINGS = {
    "width": 16,
    "heads": 2,
    "layers": 2,
    "max_shape": (8, 8, 5, 5),
    "classes": 5,
    "rank": 4,
    "factor_size": 64,
}
KINDS = [
    {"encoder": encoder, "head": head}
    for encoder in ("graphormer", "gated")
    for head in ("tiled", "low_rank")
]
GRAPHS = (branches_graph(), residual_graph(), branches_graph(width=10))


def make_ghn(seed=0, **settings):
    torch.manual_seed(seed)
    return Ghn(GhnConfig(**{**SETTINGS, **settings}))


def networks(device=None):
    with torch.device(device or "cpu"):
        return [Branches(), Residual(), Branches(width=10)]


def flat(prediction):
    return torch.cat([value.flatten() for value in prediction.values()])


@pytest.mark.parametrize(
    ("config", "expected"), [(ghn2(), 1_620_764), (ghn3("t"), 4_531_500)], ids=["ghn2", "ghn3-t"]
)
def test_parameters_of_the_papers(config, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in Ghn(config).parameters()) == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_predictions_run_in_their_skeletons_and_train_the_whole_ghn(kind):
    ghn = make_ghn(**kind)
    predictions = ghn.predict(GRAPHS, skeletons=networks("meta"))
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    for prediction, network in zip(predictions, networks(), strict=True):
        shapes = {name: p.shape for name, p in network.named_parameters()}
        assert {name: value.shape for name, value in prediction.items()} == shapes
        y = functional_call(network, prediction, (x,))
        losses.append(y.square().mean() + y.std())
    torch.stack(losses).mean().backward()
    for name, parameter in ghn.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    used = {PRIMITIVES.index(node.primitive) for graph in GRAPHS for node in graph.nodes}
    rows = ghn.embedding.primitive.weight.grad.abs().amax(1).nonzero().flatten()
    assert set(rows.tolist()) == used


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_a_graph_in_a_batch_is_as_by_itself(kind):
    ghn = make_ghn(**kind).double()
    for graph, batched in zip(GRAPHS, ghn.predict(GRAPHS), strict=True):
        (alone,) = ghn.predict([graph])
        assert alone.keys() == batched.keys()
        torch.testing.assert_close(flat(alone), flat(batched), rtol=1e-10, atol=1e-12)


def test_ranges_and_sizes_of_what_is_predicted():
    ghn = make_ghn(encoder="gated")
    prediction = ghn.predict(GRAPHS)[2]
    norm, bias = prediction["bn.weight"], prediction["bn.bias"]
    assert (norm > 0).all() and (norm < 2).all() and norm.std() > 0
    assert (bias > -1).all() and (bias < 1).all() and bias.std() > 0
    targets = {node.name: t for node, t in all_targets(GRAPHS[2]) if node.primitive != "bias"}
    assert targets["depthwise"].gain == (1 / 9) ** 0.5  # no ReLU behind it
    assert targets["stem"].gain == (2 / 9) ** 0.5  # one input channel, but not depthwise
    assert targets["flat"].gain == (1 / 30) ** 0.5
    assert targets["pointwise"].gain == (2 / 10) ** 0.5


def all_targets(graph, classes=5):
    config = GhnConfig(classes=classes)
    return [(graph.nodes[index], target) for index, target in targets_of(graph, config)]


@pytest.mark.parametrize("head", ["tiled", "low_rank"])
def test_a_gain_is_a_factor_on_weights_alone(head):
    plain, scaled = make_ghn(head=head), make_ghn(head=head, gain=0.5)
    scaled.load_state_dict(plain.state_dict())
    for one, other in zip(plain.predict(GRAPHS), scaled.predict(GRAPHS), strict=True):
        for name, value in one.items():
            factor = 0.5 if value.dim() > 1 else 1.0
            torch.testing.assert_close(other[name], factor * value, msg=name)


def test_only_a_last_layer_of_the_configs_classes_is_a_classifier():
    kinds = [(node.name, target.kind) for node, target in all_targets(branches_graph())]
    assert kinds[-2:] == [("head", "classifier"), ("head", "class_bias")]
    assert {kind for _, kind in kinds[:-2]} == {"weight", "vector"}
    # 5 output channels in the middle are no classifier, nor is a last layer of 7 classes
    others = all_targets(branches_graph(width=5, classes=7)) + all_targets(residual_graph())
    assert {target.kind for _, target in others} == {"weight", "vector"}


def test_same_bits_each_time():
    runs = []
    for _ in range(2):
        ghn = make_ghn()
        total = torch.cat([flat(p) for p in ghn.predict(GRAPHS)])
        total.square().mean().backward()
        runs.append(torch.cat([total, *(p.grad.flatten() for p in ghn.parameters())]))
    assert torch.equal(*runs)


def test_bit_widths_make_no_difference_before_they_are_trained():
    plain, told = make_ghn(), make_ghn(bit_widths=(2, 4, 8))
    told.load_state_dict(plain.state_dict(), strict=False)
    expected = [flat(p) for p in plain.predict(GRAPHS)]
    for bits in (None, 4, [2, None, {"stem": 8}]):
        for value, prediction in zip(expected, told.predict(GRAPHS, bits=bits), strict=True):
            assert torch.equal(value, flat(prediction))


def test_bit_widths_of_a_network_and_of_a_layer():
    ghn = make_ghn(bit_widths=(2, 4))
    torch.nn.init.normal_(ghn.embedding.bits.weight)
    graph = GRAPHS[0]

    def predicted(bits):
        return flat(ghn.predict([graph], bits=bits)[0])

    everywhere = {node.name: 2 for node in graph.nodes}
    assert torch.equal(predicted(2), predicted(everywhere))
    assert torch.equal(predicted(None), predicted({}))
    mixed = [
        predicted(b) for b in (None, 2, 4, {"stem": 4}, {"flat": 4}, {**everywhere, "flat": 4})
    ]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(mixed) for b in mixed[:i])

    ghn.predict([graph], bits={"stem": 4})[0]["stem.weight"].square().mean().backward()
    assert ghn.embedding.bits.weight.grad.abs().amax(1).nonzero().flatten().tolist() == [1, 2]


def test_position_embeddings():
    """16 tokens in a 4 x 4 square with a class token in front; not scaled, not bounded."""
    nodes = [
        Node("input", "x"),
        Node("conv", "patches", (12, 3, 4, 4), ("patches.weight",)),
        Node("pos_enc", "add", (1, 17, 12), ("positions",)),
        Node("pos_enc", "cat", (1, 1, 12), ("token",)),
        Node("ln", "norm", (12,), ("norm.weight", "norm.bias")),
    ]
    graph = make_graph(nodes, [(), (0,), (1,), (2,), (3,)])
    ghn = make_ghn()
    (prediction,) = ghn.predict([graph])
    positions = prediction["positions"]
    assert positions.shape == (1, 17, 12) and prediction["token"].shape == (1, 1, 12)
    assert positions[0, 0].count_nonzero() == 0 and prediction["token"].count_nonzero() == 12
    assert torch.cdist(positions[0, 1:], positions[0, 1:]).count_nonzero() == 16 * 15
    assert torch.equal(positions[0, :, 8:], positions[0, :, :4])  # tiled along the channels
    assert [t.gain for _, t in all_targets(graph)[1:3]] == [1, 1]


def test_vocabularies():
    assert len(channel_vocabulary(10)) == 391 and kernel_vocabulary(11)[-3:] == [11, 14, 16]
    with torch.device("meta"):
        embedding = NodeEmbedding(ghn2())
    assert embedding.channel.num_embeddings == 392 and embedding.kernel.num_embeddings == 9
    channels, kernels = channel_vocabulary(10), kernel_vocabulary(11)
    cases = {
        (64, 3, 3, 3): (64, 3, 3, 3),
        (10, 5, 2, 12): (10, 8, 3, 11),
        (71, 72, 13, 40): (64, 64, 14, 16),
        (73, 9000, 15, 1): (80, 8192, 14, 1),
        (48,): (48, 1, 1, 1),
    }
    for shape, known in cases.items():
        rows = embedding.shape_rows(Node("conv", "c", shape))
        assert (*(channels[r] for r in rows[:2]), *(kernels[r] for r in rows[2:])) == known
    assert embedding.shape_rows(Node("sum", "add")) == (391, 391, 8, 8)


def graph_with(node, adjacency=None):
    default = torch.tensor([[0, 1], [0, 0]])
    return Graph((Node("input", "x"), node), default if adjacency is None else adjacency)


CONV = Node("conv", "c", (4, 3, 3, 3), ("c.weight",))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (graph_with(CONV, torch.tensor([[0, 1], [1, 0]])), "adjacency must be upper triangular"),
        (graph_with(CONV, torch.tensor([[0, -1], [0, 0]])), "adjacency must be upper triangular"),
        (graph_with(CONV, torch.zeros(3, 3)), r"adjacency must be of shape \(2, 2\), got \(3, 3\)"),
        (Graph((), torch.zeros(0, 0)), "graph must be of at least one node, got 0"),
        (graph_with(Node("relu", "r")), "primitive of r must be one of max_pool, .*, got 'relu'"),
        (graph_with(Node("conv", "c", (4, 3, 3), ("w",))), r"shape of c must be .*got \(4, 3, 3\)"),
    ],
)
def test_bad_graphs(graph, message):
    with pytest.raises(ValueError, match=f"^ghn: {message}"):
        make_ghn().predict([graph])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"graphs": []}, "graphs must be at least one, got 0"),
        ({"bits": 3}, "bits must be among 2, 4 and None, got 3"),
        ({"bits": {"c": 16}}, "bits must be among 2, 4 and None, got 16"),
        ({"bits": {"d": 4, "c": 2}}, "bits must be of nodes of the graph, got d"),
        ({"bits": [2, 4]}, "bits must be 1, one a graph, got 2"),
        ({"skeletons": [nn.Conv2d(3, 4, 3)]}, "skeleton must be one with the parameter c.weight"),
        (
            {"skeletons": [nn.ModuleDict({"c": nn.Conv2d(4, 3, 3)})]},
            r"prediction of c.weight must be of shape \(3, 4, 3, 3\), got \(4, 3, 3, 3\)",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^ghn: {message}"):
        make_ghn(bit_widths=(2, 4)).predict(**{"graphs": [graph_with(CONV)], **arguments})


def test_bits_for_a_ghn_without_them():
    with pytest.raises(ValueError, match="bits must be None without bit_widths in the config"):
        make_ghn().predict([graph_with(CONV)], bits=4)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"encoder": "mlp"}, ValueError, "encoder must be one of graphormer, gated, got 'mlp'"),
        ({"head": "conv"}, ValueError, "head must be one of tiled, low_rank, got 'conv'"),
        ({"width": 18}, ValueError, "width must be a multiple of 4, got 18"),
        ({"width": 32, "heads": 5}, ValueError, "heads must be a divisor of width 32, got 5"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"classes": 2.0}, TypeError, "classes must be a whole number, got 2.0"),
        ({"max_shape": (8, 8, 3, 5)}, ValueError, "max_shape must be 4 sizes .* square kernel"),
        ({"max_shape": 8}, TypeError, "max_shape must be a tuple of whole numbers, got 8"),
        ({"bit_widths": (4, 2)}, ValueError, r"bit_widths must be positive and rising, got \(4, 2"),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=f"^ghn: {message}"):
        GhnConfig(**settings)


def test_settings_of_the_presets_and_of_json():
    assert ghn3("l", classes=100).to_dict() | {"classes": 10, "layers": 3} == {
        **GhnConfig().to_dict(),
        "width": 256,
        "heads": 16,
    }
    assert GhnConfig.from_dict(ghn2(bit_widths=(2,)).to_dict()) == ghn2(bit_widths=(2,))
    with pytest.raises(ValueError, match="size must be one of t, s, l, xl, got 'm'"):
        ghn3("m")
    with pytest.raises(ValueError, match=r"settings must be among .* got depth, hid$"):
        GhnConfig.from_dict({"hid": 3, "depth": 1})
