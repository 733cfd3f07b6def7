"""The nets of the step benchmark, for 3x32x32 pictures; plain torch and the blocks of qtrain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from qtrain.models import BasicBlock, InvertedBlock
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def _stem(outputs: int) -> nn.Sequential:
    """3x3 at stride 1, as one does for pictures of CIFAR's size."""
    return nn.Sequential(nn.Conv2d(3, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class ResNet18(nn.Module):
    """ResNet-18 (He 2015) with the CIFAR stem: 2-2-2-2 basic blocks of 64 to 512 channels, 21
    quantizable layers, 11.2 million parameters, 0.56 G multiply-adds a picture."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = _stem(width)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(inputs, width << stage, stride))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)

    @property
    def block_names(self) -> list[str]:
        """What BWRF replaces: the 8 residual blocks."""
        return [f"blocks.{number}" for number in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, CLASSES]
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler 2018) with strides for CIFAR: 17 inverted blocks, 54 quantizable layers,
    2.2 million parameters, 0.09 G multiply-adds a picture."""

    # expansion, channels, blocks, stride of the first
    PLAN = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = _stem(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for expand, outputs, count, first in self.PLAN:
            for block in range(count):
                stride = first if block == 0 else 1
                blocks.append(InvertedBlock(inputs, outputs, stride, expand))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        self.head = nn.Linear(1280, CLASSES)

    @property
    def block_names(self) -> list[str]:
        """What BWRF replaces: the 7 groups of blocks of one width, named by their last."""
        counts = (count for _, _, count, _ in self.PLAN)
        return [f"blocks.{last - 1}" for last in accumulate(counts)]

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, CLASSES]
        y = self.blocks(F.relu6(self.stem(x)))
        return self.head(F.relu6(self.last(y)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "mobilenet": MobileNetV2}
