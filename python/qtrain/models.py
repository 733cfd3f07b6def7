"""Models by name: a few small ones of our own, and any of torchvision or timm.

Our models are plain modules that torch.fx can trace (BatchNorm folding needs that).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    batchnorm: bool = True,
) -> nn.Sequential:
    """A convolution, padded so that only the stride changes the image, and BatchNorm; without
    BatchNorm it has a bias instead."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=not batchnorm
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if batchnorm else nn.Sequential(conv)


class Cnn(nn.Module):
    """Convolutions with BatchNorm and ReLU, average pooling and a linear layer.

    The default is made for the 8x8 digits: 4 convolutions, 33 thousand parameters.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 32, 64),
        strides: tuple[int, ...] = (1, 2, 1, 2),
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ValueError(
                f"models: widths and strides must be equally many, got {len(widths)} and "
                f"{len(strides)}"
            )
        blocks: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            blocks.append(nn.Sequential(*conv_bn(channels, width, stride=stride), nn.ReLU()))
            channels = width
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return self.head(self.features(x).mean((2, 3)))


def shortcut(inputs: int, outputs: int, stride: int, batchnorm: bool = True) -> nn.Module:
    """The identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return conv_bn(inputs, outputs, kernel=1, stride=stride, batchnorm=batchnorm)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He 2015), 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, batchnorm: bool = True) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride, batchnorm=batchnorm)
        self.second = conv_bn(outputs, outputs, batchnorm=batchnorm)
        self.shortcut = shortcut(inputs, outputs, stride, batchnorm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return F.relu(self.second(y) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet: 3 stages of ``blocks`` blocks, depth 6 * blocks + 2."""

    def __init__(self, channels: int, classes: int, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(channels, width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(inputs, width << stage, stride))
                inputs = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.stem(x))).mean((2, 3)))


class InvertedBlock(nn.Module):
    """MobileNetV2's block: 1x1 up, depthwise 3x3, 1x1 down, and a shortcut where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        inner = inputs * expand
        self.up = conv_bn(inputs, inner, kernel=1)
        self.depthwise = conv_bn(inner, inner, stride=stride, groups=inner)
        self.down = conv_bn(inner, outputs, kernel=1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.up(x))
        y = self.down(F.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class Mobile(nn.Module):
    """A small MobileNetV2 for 32x32 pictures."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(channels, 16)
        plan = ((16, 1), (24, 2), (24, 1), (40, 2), (40, 1))
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs, stride in plan:
            blocks.append(InvertedBlock(inputs, outputs, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu6(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention from two linear layers, so that both are quantizable."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VitBlock(nn.Module):
    """LayerNorm before attention and before the MLP, which is ``ratio`` times as wide inside."""

    def __init__(self, width: int, heads: int, ratio: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A small ViT: 8 x 8 patches, learned positions, mean over tokens, 6 blocks of width 96."""

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int,
        width: int = 96,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        patch = max(1, size // 8)
        if size % patch:
            raise ValueError(f"models: size must be a multiple of {patch} for vit_tiny, got {size}")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _block_net(channels: int, classes: int, size: int, **options: Any) -> nn.Module:
    from .init_blocks import BlockNet  # which is made of what is here

    return BlockNet(channels, classes, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": lambda channels, classes, size, **o: Cnn(channels, classes, **o),
    "resnet8": lambda channels, classes, size, **o: ResNet(channels, classes, 1, **o),
    "resnet20": lambda channels, classes, size, **o: ResNet(channels, classes, 3, **o),
    "mobile": lambda channels, classes, size, **o: Mobile(channels, classes, **o),
    "vit_tiny": Vit,
    "blocknet": _block_net,
}


def _torchvision(name: str, channels: int, classes: int, options: Mapping[str, Any]) -> nn.Module:
    import torchvision

    if channels != 3:
        raise ValueError(
            f"models: channels must be 3 for torchvision's {name}, got {channels}; "
            "one of our models or timm's takes any number"
        )
    return torchvision.models.get_model(name, **{"weights": None, **options}, num_classes=classes)


def _timm(name: str, channels: int, classes: int, options: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, in_chans=channels, num_classes=classes, **options)


def _library(name: str) -> str | None:
    """The library that knows a model of this name; torchvision before timm."""
    import torchvision

    prefix, _, rest = name.rpartition("/")
    if prefix in ("", "torchvision") and rest in torchvision.models.list_models(torchvision.models):
        return "torchvision"
    if prefix in ("", "timm"):
        import timm

        return "timm" if timm.is_model(rest) else None
    return None


def build_model(
    name: str,
    *,
    channels: int,
    classes: int,
    size: int,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model with fresh weights from torch's global generator.

    Args:
        name: one of ``MODELS``, "torchvision/<name>", "timm/<name>", or a plain name that is
            looked up in torchvision, then timm.
        options: passed to the model's constructor (for timm's ViTs ``img_size``, say).

    Raises:
        ValueError: unknown name or option.
    """
    options = dict(options or {})
    builders = {"torchvision": _torchvision, "timm": _timm}
    try:
        if name in MODELS:
            return MODELS[name](channels, classes, size, **options)
        library = _library(name)
        if library is not None:
            return builders[library](name.rpartition("/")[2], channels, classes, options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ValueError(f"models: options must be known to {name}, got {error}") from error
    raise ValueError(
        f"models: model must be one of {', '.join(MODELS)}, or a name of torchvision or timm "
        f"(torchvision/resnet18, timm/vit_tiny_patch16_224), got {name!r}"
    )
