"""The building blocks of the initialiser study, and a net of a few of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .models import BasicBlock, conv_bn, shortcut


class ConvBlock(nn.Module):
    """A 3x3 convolution, and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, batchnorm: bool) -> None:
        super().__init__()
        self.conv = conv_bn(inputs, outputs, stride=stride, batchnorm=batchnorm)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return F.relu(self.conv(x))


class SeparableBlock(nn.Module):
    """MobileNet's depthwise 3x3 and pointwise 1x1 convolution (Howard 2017, arXiv 1704.04861), ReLU
    after each."""

    def __init__(self, inputs: int, outputs: int, stride: int, batchnorm: bool) -> None:
        super().__init__()
        self.depthwise = conv_bn(inputs, inputs, stride=stride, groups=inputs, batchnorm=batchnorm)
        self.pointwise = conv_bn(inputs, outputs, kernel=1, batchnorm=batchnorm)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))


class BottleneckBlock(nn.Module):
    """1x1 down to a ``ratio``-th of the outputs, 3x3, 1x1 up, beside a shortcut (He 2015, arXiv
    1512.03385; there the ratio is 4)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, batchnorm: bool, ratio: int = 4
    ) -> None:
        super().__init__()
        inner = outputs // ratio
        self.down = conv_bn(inputs, inner, kernel=1, batchnorm=batchnorm)
        self.middle = conv_bn(inner, inner, stride=stride, batchnorm=batchnorm)
        self.up = conv_bn(inner, outputs, kernel=1, batchnorm=batchnorm)
        self.shortcut = shortcut(inputs, outputs, stride, batchnorm)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        y = F.relu(self.middle(F.relu(self.down(x))))
        return F.relu(self.up(y) + self.shortcut(x))


BLOCKS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {
    "conv": ConvBlock,
    "separable": SeparableBlock,
    "residual": BasicBlock,
    "bottleneck": BottleneckBlock,
}


class BlockNet(nn.Module):
    """A 3x3 convolution with ReLU, blocks of one kind, average pooling and a linear layer.

    Which nets the paper has could not be had: kinds and sizes are our choice.

    Args:
        block: "conv", "separable" (depthwise and pointwise), "residual" (two 3x3 convolutions
            beside a shortcut) or "bottleneck" (1x1, 3x3, 1x1 beside a shortcut).
        batchnorm: after every convolution; without, these have biases.
        widths: channels of each block; the first convolution has those of the first block.
        strides: of each block.

    Raises:
        ValueError: an unknown block; widths and strides that are not equally many.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        block: str = "conv",
        batchnorm: bool = True,
        widths: Sequence[int] = (16, 32, 32),
        strides: Sequence[int] = (1, 2, 1),
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"models: block must be one of {', '.join(BLOCKS)}, got {block!r}")
        if not widths or len(widths) != len(strides):
            raise ValueError(
                "models: widths and strides must be some and equally many, "
                f"got {len(widths)} and {len(strides)}"
            )
        inputs = widths[0]
        self.stem = conv_bn(channels, inputs, batchnorm=batchnorm)
        blocks: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            blocks.append(BLOCKS[block](inputs, width, stride, batchnorm))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
