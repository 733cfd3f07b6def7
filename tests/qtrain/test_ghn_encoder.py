"""The encoders against their formulas, node by node and pair by pair."""

import math

import pytest
import torch
from ghn_graphs import branches_graph, make_graph, residual_graph
from qtrain.ghn.encoder import EDGES, FIRST_EDGE, GatedGnn, Graphormer
from qtrain.ghn.graph import Node
from torch.nn import functional as F

WIDTH = 8
GRAPHS = (branches_graph(), residual_graph(), branches_graph())
ADJACENCIES = [graph.adjacency for graph in GRAPHS]
SIZES = [len(graph.nodes) for graph in GRAPHS]
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order


def make_encoder(kind):
    torch.manual_seed(0)
    encoder = GatedGnn(WIDTH) if kind == "gated" else Graphormer(WIDTH, 2, 2)
    return encoder.double()


def features(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(SIZES), WIDTH, generator=generator, dtype=torch.float64)


def naive_gated(encoder, x, adjacency):
    """GHN-2's update as it is written: every message is computed anew for every edge."""
    h = list(x.unbind(0))
    count = len(h)
    for order, edges in ((range(count), adjacency), (reversed(range(count)), adjacency.T)):
        for v in order:
            message = torch.zeros_like(h[v])
            for u in range(count):
                if edges[u, v] == 1:
                    message = message + encoder.direct(h[u])
                if edges[u, v] >= 1:
                    message = message + encoder.virtual(h[u]) / edges[u, v]
            h[v] = encoder.gru(message[None], h[v][None])[0]
    return torch.stack(h)


def naive_graphormer(encoder, x, adjacency):
    """One graph, no padding, the edge MLP on every pair, heads one by one."""
    direct = (adjacency == 1).long()
    x = x + encoder.degree_in(direct.sum(0)) + encoder.degree_out(direct.sum(1))
    x = x + encoder.input_distance(adjacency[0])
    pair = torch.cat(
        (encoder.edge(adjacency + FIRST_EDGE), encoder.edge(adjacency.T + FIRST_EDGE)), 2
    )
    bias = encoder.edge_bias(pair)  # [n, n, heads]
    for layer in encoder.layers:
        q, k, v = layer.qkv(layer.norm1(x)).chunk(3, 1)
        size = WIDTH // layer.heads
        heard = []
        for head in range(layer.heads):
            mine = slice(head * size, (head + 1) * size)
            scores = q[:, mine] @ k[:, mine].T / math.sqrt(size) + bias[:, :, head]
            heard.append(scores.softmax(1) @ v[:, mine])
        x = x + layer.out(torch.cat(heard, 1))
        x = x + layer.mlp[2](F.gelu(layer.mlp[0](layer.norm2(x))))
    return x


NAIVE = {"gated": naive_gated, "graphormer": naive_graphormer}


@pytest.mark.parametrize("kind", NAIVE)
def test_values_and_gradients_of_the_naive_loop(kind):
    """Several graphs at once, of several sizes, against each by itself: cached messages, the table
    of edges and the padding change nothing."""
    encoder, x = make_encoder(kind), features().requires_grad_()
    loop = [NAIVE[kind](encoder, *pair) for pair in zip(x.split(SIZES), ADJACENCIES, strict=True)]
    expected, got = torch.cat(loop), encoder(x, ADJACENCIES)
    torch.testing.assert_close(got, expected, **EXACT)

    cotangent = features(seed=2)
    inputs = [x, *encoder.parameters()]
    grads = torch.autograd.grad(got, inputs, cotangent)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert ours.count_nonzero() > 0


@pytest.mark.parametrize("kind", NAIVE)
def test_graphs_do_not_see_each_other(kind):
    x = features().requires_grad_()
    last = make_encoder(kind)(x, ADJACENCIES)[-SIZES[-1] :]
    first, second, third = torch.autograd.grad(last.square().mean(), x)[0].split(SIZES)
    assert first.count_nonzero() == second.count_nonzero() == 0 < third.count_nonzero()


@pytest.mark.parametrize("kind", NAIVE)
def test_virtual_edges_count(kind):
    encoder, x, adjacency = make_encoder(kind), features()[: SIZES[0]], ADJACENCIES[0]
    direct = torch.where(adjacency == 1, 1, 0)
    assert not torch.allclose(encoder(x, [adjacency]), encoder(x, [direct]), rtol=1e-3)


def test_distances_beyond_the_table_take_its_last_row():
    encoder, x, adjacency = make_encoder("graphormer"), features()[: SIZES[0]], ADJACENCIES[0]
    far, farther = adjacency.clone(), adjacency.clone()
    far[1, -1], farther[1, -1] = EDGES - FIRST_EDGE - 1, 5000
    assert torch.equal(encoder(x, [far]), encoder(x, [farther]))
    assert not torch.equal(encoder(x, [far]), encoder(x, [adjacency]))


@pytest.mark.parametrize("kind", NAIVE)
def test_a_node_alone(kind):
    """No edges at all, beside a graph with edges."""
    alone = make_graph([Node("input", "x")], [()]).adjacency
    encoder, x = make_encoder(kind), features()[: SIZES[0] + 1]
    expected = torch.cat((encoder(x[:-1], ADJACENCIES[:1]), NAIVE[kind](encoder, x[-1:], alone)))
    torch.testing.assert_close(encoder(x, [ADJACENCIES[0], alone]), expected, **EXACT)
