"""The two encoders of a graph hypernetwork: each lets the nodes of a graph learn of one another.

Both take the node features of several graphs, one after another, and give features of the same
shape. Graphs do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# rows of the public GHN-3's embeddings; what is longer takes the last row
DEGREES, INPUT_DISTANCES, EDGES = 101, 1001, 257
# its edge embedding keeps two rows free in front
FIRST_EDGE = 2


@dataclass(frozen=True)
class Sweep:
    """The order in which messages go through several graphs at once.

    A node hears its ancestors only, so all nodes as far from the start (by the longest path) are
    updated together, whatever graph they are of.

    Attributes:
        order: [N], the nodes level by level.
        sizes: nodes of each level.
        weights: one per level but the last, [nodes behind it, 2 * its nodes]: the factors of each
            node's two messages, 1 or 0 and 1 / s or 0, in turn.
    """

    order: Tensor
    sizes: list[int]
    weights: list[Tensor]

    @classmethod
    def over(cls, tail: Tensor, head: Tensor, length: Tensor, x: Tensor) -> Sweep:
        """Along the edges tail -> head, [E] each, between the nodes of x, [N, d]."""
        levels = _levels(tail.numpy(), head.numpy(), len(x))
        order = torch.from_numpy(np.concatenate(levels))
        rank = torch.argsort(order)
        both = torch.zeros((len(x), len(x), 2), dtype=x.dtype)  # [to, from, message]
        both[rank[head], rank[tail], 0] = (length == 1).to(x.dtype)
        both[rank[head], rank[tail], 1] = 1 / length.to(x.dtype)
        both = both.flatten(1).to(x.device)
        sizes = [len(level) for level in levels]
        ends = np.cumsum(sizes).tolist()
        weights = [
            both[end:, 2 * (end - size) : 2 * end]
            for end, size in zip(ends[:-1], sizes[:-1], strict=True)
        ]
        return cls(order.to(x.device), sizes, weights)


def _levels(tail: np.ndarray, head: np.ndarray, count: int) -> list[np.ndarray]:
    """The nodes by the length of the longest path to them."""
    levels = []
    edge = np.zeros((count, count), bool)
    edge[tail, head] = True
    waits_for = edge.sum(0)
    while (waits_for == 0).any():
        levels.append(np.flatnonzero(waits_for == 0))
        waits_for -= edge[levels[-1]].sum(0)
        waits_for[levels[-1]] = -1
    return levels


class GatedGnn(nn.Module):
    """The encoder of GHN-2 (Knyazev et al. 2021, eq. 3 and 4): a sweep forward, one backward.

    Each sweep goes once through the nodes in topological order (backward: in the reverse, with all
    edges turned round). With A the adjacency and h of the nodes before already updated,

        m_v = sum_{u: A[u,v] = 1} MLP(h_u) + sum_{u: A[u,v] >= 1} MLP_v(h_u) / A[u,v]
        h_v <- GRU(m_v, h_v)

    A node's two messages are computed once and added to its successors, which gives the sums above
    up to the order of their terms.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direct, self.virtual = _message(width), _message(width)
        self.gru = nn.GRUCell(width, width)

    def forward(self, x: Tensor, adjacencies: Sequence[Tensor]) -> Tensor:  # [N, d], each [n, n]
        starts = np.cumsum([0, *(len(a) for a in adjacencies)])[:-1].tolist()
        pairs = [a.cpu().nonzero() for a in adjacencies]
        tail, head = torch.cat([p + start for p, start in zip(pairs, starts, strict=True)]).unbind(
            1
        )
        length = torch.cat([a.cpu()[tuple(p.T)] for a, p in zip(adjacencies, pairs, strict=True)])
        x = self._sweep(x, Sweep.over(tail, head, length, x))
        return self._sweep(x, Sweep.over(head, tail, length, x))

    def _sweep(self, x: Tensor, sweep: Sweep) -> Tensor:
        heard = torch.zeros_like(x)
        updated: list[Tensor] = []
        for level, h in enumerate(x[sweep.order].split(sweep.sizes)):
            now, later = heard.split((len(h), len(heard) - len(h)))
            updated.append(self.gru(now, h))
            if len(later):
                told = torch.stack((self.direct(updated[-1]), self.virtual(updated[-1])), 1)
                heard = torch.addmm(later, sweep.weights[level], told.flatten(0, 1))
        return torch.cat(updated)[torch.argsort(sweep.order)]


def _message(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.ReLU()
    )


class Graphormer(nn.Module):
    """The encoder of GHN-3 (Knyazev et al. 2023): transformer layers over all nodes of a graph.

    At the entrance each node is told its number of direct edges in and out and its distance from
    the first node, A[0, v]. Attention from i to j, in every layer alike, gets a bias for each head:

        b_ij = MLP(concat(E[A_ij], E[A_ji])),  MLP: 2d -> d -> heads, ReLU between

    Of the two distances one is 0 always, so that there are few pairs: the MLP runs on a table of
    them, which gives the same values and gradients as running it on all N x N.

    Several graphs are padded to the largest. A padded place is never attended to.

    Args:
        width: d.
        heads: divide d.
        layers: at least 1.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.degree_in = nn.Embedding(DEGREES, width)
        self.degree_out = nn.Embedding(DEGREES, width)
        self.input_distance = nn.Embedding(INPUT_DISTANCES, width)
        self.edge = nn.Embedding(EDGES, width)
        self.edge_bias = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, heads)
        )
        self.layers = nn.ModuleList(GraphormerLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, adjacencies: Sequence[Tensor]) -> Tensor:  # [N, d], each [n, n]
        sizes = [len(a) for a in adjacencies]
        edges = torch.zeros((len(sizes), max(sizes), max(sizes)), dtype=torch.int64)
        for padded, a in zip(edges, adjacencies, strict=True):
            padded[: len(a), : len(a)] = a
        longest = int(edges.amax())  # before the GPU has it, which would have to be waited for
        real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]  # [B, n]
        edges, real = edges.to(x.device), real.to(x.device)

        direct = edges == 1
        places = x.new_zeros((*real.shape, x.shape[1]))
        h = places.masked_scatter(real[:, :, None], x)
        h = h + self.degree_in(direct.sum(1).clamp(max=DEGREES - 1))
        h = h + self.degree_out(direct.sum(2).clamp(max=DEGREES - 1))
        h = h + self.input_distance(edges[:, 0].clamp(max=INPUT_DISTANCES - 1))

        longest = min(longest, EDGES - FIRST_EDGE - 1)
        bias = self.attention_bias(edges.clamp(max=longest), longest)
        bias = bias.masked_fill(~real[:, None, None, :], float("-inf"))
        for layer in self.layers:
            h = layer(h, bias)
        return h[real]

    def attention_bias(self, edges: Tensor, longest: int) -> Tensor:  # [B, n, n] -> [B, H, n, n]
        distance = torch.arange(-longest, longest + 1, device=edges.device)
        there, back = distance.clamp(min=0), (-distance).clamp(min=0)
        pair = torch.cat((self.edge(there + FIRST_EDGE), self.edge(back + FIRST_EDGE)), 1)
        table = self.edge_bias(pair)  # [2 * longest + 1, heads]
        signed = edges - edges.transpose(1, 2)
        return F.embedding(signed + longest, table).permute(0, 3, 1, 2)


class GraphormerLayer(nn.Module):
    """LayerNorm before attention (no bias in its query, key and value) and before the MLP, which is
    4 times as wide, with a GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, n, d], [B, heads, n, n]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
        # not scaled_dot_product_attention: its fused kernels' gradients may differ from run to run
        heard = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(heard)
        return x + self.mlp(self.norm2(x))
