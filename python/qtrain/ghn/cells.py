"""The networks of the space as modules: pre-activation cells on a stem, and a head.

torch.fx traces all of them, and each BatchNorm follows the convolution that it can be folded into.
Every parameter has a part in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .genotype import Cell

# of the inverted bottleneck's inner channels
EXPANSION = 4
# images from this size on are quartered by the stem, as ImageNet's are
LARGE = 128


class Shape(NamedTuple):
    """Of an operation: channels in and out, stride 1 or 2, with BatchNorm or without."""

    inputs: int
    outputs: int
    stride: int = 1
    norm: bool = True


def conv(
    shape: Shape, kernel: int, *, dilation: int = 1, depthwise: bool = False
) -> list[nn.Module]:
    """A convolution, padded so that only the stride changes the image, and its BatchNorm.

    Without BatchNorm it has a bias (our choice: folded BatchNorm leaves one too). A depthwise one
    has neither: a 1x1 convolution follows.
    """
    layer = nn.Conv2d(
        shape.inputs,
        shape.outputs,
        kernel,
        shape.stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=shape.inputs if depthwise else 1,
        bias=not shape.norm and not depthwise,
    )
    return [layer, nn.BatchNorm2d(shape.outputs)] if shape.norm and not depthwise else [layer]


def relu_conv(shape: Shape, kernel: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *conv(shape, kernel))


def depthwise_conv(shape: Shape, kernel: int, *, dilation: int = 1) -> list[nn.Module]:
    """ReLU, depthwise, 1x1."""
    deep = shape._replace(outputs=shape.inputs)
    first = conv(deep, kernel, dilation=dilation, depthwise=True)
    return [nn.ReLU(), *first, *conv(shape._replace(stride=1), 1)]


def separable_conv(shape: Shape, kernel: int) -> nn.Module:
    """Twice, the first with the stride, as in DARTS."""
    first = depthwise_conv(shape._replace(outputs=shape.inputs), kernel)
    return nn.Sequential(*first, *depthwise_conv(shape._replace(stride=1), kernel))


def inverted_conv(shape: Shape, kernel: int) -> nn.Module:
    """MobileNetV2's bottleneck: 1x1 up, depthwise, 1x1 down; the cell's sum is its shortcut."""
    inner = EXPANSION * shape.inputs
    up = shape._replace(outputs=inner, stride=1)
    return nn.Sequential(
        nn.ReLU(), *conv(up, 1), *depthwise_conv(shape._replace(inputs=inner), kernel)
    )


class Halve(nn.Module):
    """Half the image in each direction by two 1x1 convolutions, one of them on pixels that the
    other passes over (DARTS' factorized reduction, a BatchNorm to each so that both fold)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        half = shape.outputs // 2
        shape = shape._replace(stride=2)
        self.even = nn.Sequential(*conv(shape._replace(outputs=half), 1))
        self.odd = nn.Sequential(*conv(shape._replace(outputs=shape.outputs - half), 1))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        x = F.relu(x)
        # moved by a pixel, not cut: an odd size then gives both halves the same one
        return torch.cat([self.even(x), self.odd(F.pad(x, (-1, 1, -1, 1)))], 1)


class Subsample(nn.Module):
    """Every second pixel, for cells that take their inputs as they are."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x[:, :, ::2, ::2]


def skip(shape: Shape) -> nn.Module:
    same = shape.stride == 1 and shape.inputs == shape.outputs
    return nn.Identity() if same else Halve(shape)


def dilated_conv(shape: Shape, kernel: int) -> nn.Module:
    return nn.Sequential(*depthwise_conv(shape, kernel, dilation=2))


# operation -> module
MODULES: dict[str, Callable[[Shape], nn.Module]] = {
    "skip": skip,
    "max_pool_3x3": lambda shape: nn.MaxPool2d(3, shape.stride, 1),
    "avg_pool_3x3": lambda shape: nn.AvgPool2d(3, shape.stride, 1, count_include_pad=False),
    "sep_conv_3x3": lambda shape: separable_conv(shape, 3),
    "sep_conv_5x5": lambda shape: separable_conv(shape, 5),
    "dil_conv_3x3": lambda shape: dilated_conv(shape, 3),
    "dil_conv_5x5": lambda shape: dilated_conv(shape, 5),
    "conv_1x1": lambda shape: relu_conv(shape, 1),
    "conv_3x3": lambda shape: relu_conv(shape, 3),
    "inverted_3x3": lambda shape: inverted_conv(shape, 3),
}


class CellModule(nn.Module):
    """A cell: two inputs, [N, C0, H, W] and [N, C1, H, W], or [N, C0, 2 H, 2 W] if ``halved``.

    Args:
        inputs: C0, C1.
        width: channels of each state; the output has as many times that as it concatenates.
        preprocess: 1x1 convolutions take both inputs to ``width`` channels; without, they have it.
        reduction: the output is half as high and wide as the input.
    """

    def __init__(
        self,
        cell: Cell,
        inputs: tuple[int, int],
        width: int,
        *,
        preprocess: bool,
        halved: bool,
        reduction: bool,
        norm: bool,
    ) -> None:
        super().__init__()
        self.cell = cell
        before = [Shape(channels, width, norm=norm) for channels in inputs]
        first: nn.Module = Subsample() if halved else nn.Identity()
        last: nn.Module = nn.Identity()
        if preprocess:
            first = Halve(before[0]) if halved else relu_conv(before[0], 1)
            last = relu_conv(before[1], 1)
        # an input that is not read gets no parameters that nothing would depend on
        self.first = first if 0 in cell.read() else None
        self.last = last
        self.terms = nn.ModuleList(
            MODULES[op](Shape(width, width, 2 if reduction and state < 2 else 1, norm))
            for terms in cell.sums
            for op, state in terms
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [before if self.first is None else self.first(before), self.last(last)]
        modules = iter(self.terms)
        for terms in self.cell.sums:
            values = [next(modules)(states[state]) for _, state in terms]
            states.append(values[0] if len(values) == 1 else values[0] + values[1])
        chosen = [states[state] for state in self.cell.concat]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)
