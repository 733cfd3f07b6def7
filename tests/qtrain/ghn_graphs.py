"""Small graphs by hand, and the networks they are of."""

import torch
from qtrain.ghn.graph import Graph, Node
from torch import nn


def make_graph(nodes, sources):
    """sources[v]: the nodes that v reads from; virtual edges by the shortest path."""
    count = len(nodes)
    distance = torch.full((count, count), 1000)
    for v in range(count):
        distance[v, v] = 0
        for u in sources[v]:
            distance[:, v] = torch.minimum(distance[:, v], distance[:, u] + 1)
    return Graph(tuple(nodes), torch.where(distance <= 50, distance, 0))


class Branches(nn.Module):
    """A stem, a depthwise-separable branch beside a 1 x 3 one, a concat and a linear layer."""

    def __init__(self, channels=1, width=6, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.flat = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = torch.cat((self.pointwise(self.depthwise(x)), self.flat(x)), 1)
        return self.head(x.mean((2, 3)))


def branches_graph(channels=1, width=6, classes=5):
    nodes = [
        Node("input", "x"),
        Node("conv", "stem", (width, channels, 3, 3), ("stem.weight",)),
        Node("bn", "bn", (width,), ("bn.weight", "bn.bias")),
        Node("sep_conv", "depthwise", (width, 1, 3, 3), ("depthwise.weight",), groups=width),
        Node("conv", "pointwise", (2 * width, width, 1, 1), ("pointwise.weight",)),
        Node("bias", "pointwise", (2 * width,), ("pointwise.bias",)),
        Node("conv", "flat", (width, width, 1, 3), ("flat.weight",)),
        Node("bias", "flat", (width,), ("flat.bias",)),
        Node("concat", "cat"),
        Node("glob_avg", "mean"),
        Node("conv", "head", (classes, 3 * width, 1, 1), ("head.weight",)),
        Node("bias", "head", (classes,), ("head.bias",)),
    ]
    return make_graph(
        nodes, [(), (0,), (1,), (2,), (3,), (4,), (2,), (6,), (5, 7), (8,), (9,), (10,)]
    )


class Residual(nn.Module):
    """Two convolutions and a sum: fewer nodes than ``Branches``, and more classes."""

    def __init__(self, width=4, classes=7):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.conv(x)).mean((2, 3)))


def residual_graph(width=4, classes=7):
    nodes = [
        Node("input", "x"),
        Node("conv", "stem", (width, 1, 5, 5), ("stem.weight",)),
        Node("conv", "conv", (width, width, 3, 3), ("conv.weight",)),
        Node("sum", "add"),
        Node("glob_avg", "mean"),
        Node("conv", "head", (classes, width, 1, 1), ("head.weight",)),
        Node("bias", "head", (classes,), ("head.bias",)),
    ]
    return make_graph(nodes, [(), (0,), (1,), (1, 2), (3,), (4,), (5,)])
