"""Spaces of networks to learn from, drawn from (seed, split, index) and kept as JSON lines.

The ConvNets are cell networks as in DeepNets-1M (Knyazev et al. 2021, arXiv 2110.13100), with the
operations of mobile networks (ConvNets-250K of GHN-Q is not public; the space here is our choice):
`qtrain.ghn.genotype` says how cells are drawn, `SPACES` how large networks are. Splits:

    train, id   the same distribution
    wide        more channels
    deep        more cells
    dense       more sum nodes in a cell
    bn-free     no BatchNorm, biases instead

No genotype is in two splits, whatever the seeds and however many networks are drawn: the first
digits of its hash say which split it belongs to (``SHARES``), and an index whose genotype belongs
to another one is drawn again, from the stream (seed, index, space / split / 1), then 2 and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..progress import Track
from ..rundir import write_atomic
from .genotype import Draw, draw_genotype, require
from .networks import STEMS, ConvSpec, VitSpec

# eighths of all genotypes
SHARES = {
    "train": (0, 1, 2),
    "id": (3,),
    "wide": (4,),
    "deep": (5,),
    "dense": (6,),
    "bn-free": (7,),
}
SPLITS = tuple(SHARES)
SPECS: dict[str, type[ConvSpec] | type[VitSpec]] = {"conv": ConvSpec, "vit": VitSpec}
# channels come in multiples of this, which the public vocabulary of channels has up to 56
CHANNEL_STEP = 8


@dataclass(frozen=True)
class Ranges:
    """What the networks of a split are drawn from, evenly and ends included.

    Attributes:
        cells: of a network; of a ViT its blocks.
        sums: sum nodes of a cell; networks of more than ``long`` cells have at most ``few``.
        widths: channels.
        most: parameters. A network with more is narrowed by multiples of 8 channels, down to 8.
    """

    cells: tuple[int, int]
    sums: tuple[int, int]
    widths: tuple[int, ...]
    most: int
    long: int = 10
    few: int = 2
    norm: bool = True


@dataclass(frozen=True)
class Space:
    """A space of networks.

    Attributes:
        kind: "conv" or "vit".
        channels, classes, size: of the images that parameters are counted for; a network can be
            built for others.
        hidden: width of the head's hidden layer, where there is one.
    """

    name: str
    kind: str
    splits: Mapping[str, Ranges]
    channels: int
    classes: int
    size: int
    kernels: tuple[int, ...] = (3, 5, 7)
    hidden: int = 256


def _splits(train: Ranges, **changes: dict[str, Any]) -> dict[str, Ranges]:
    ranges = {"train": train, "id": train}
    for split, change in changes.items():
        ranges[split.replace("_", "-")] = replace(train, **change)
    return ranges


def _times(factor: int, widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(factor * width for width in widths)


_PAPER = tuple(range(32, 129, 16))
_DIGITS = (8, 16)
_VIT = (32, 48, 64)

# paper: the ranges of DeepNets-1M, for 32 x 32 images. digits: networks that train in a moment.
# vit: for either; dense and bn-free mean nothing there.
SPACES = {
    "paper": Space(
        "paper",
        "conv",
        _splits(
            Ranges((4, 18), (1, 4), _PAPER, 10**7),
            wide={"widths": _times(4, _PAPER), "most": 10**8},
            deep={"cells": (10, 36), "long": 18, "most": 10**8},
            dense={"sums": (2, 10), "few": 6, "most": 10**8},
            bn_free={"norm": False},
        ),
        channels=3,
        classes=10,
        size=32,
    ),
    "digits": Space(
        "digits",
        "conv",
        _splits(
            Ranges((4, 4), (1, 2), _DIGITS, 10**6),
            wide={"widths": _times(4, _DIGITS), "most": 10**7},
            deep={"cells": (6, 10)},
            dense={"sums": (3, 6)},
            bn_free={"norm": False},
        ),
        channels=1,
        classes=10,
        size=8,
        hidden=32,
    ),
    "vit": Space(
        "vit",
        "vit",
        _splits(
            Ranges((2, 4), (1, 1), _VIT, 10**7),
            wide={"widths": _times(2, _VIT)},
            deep={"cells": (6, 8)},
        ),
        channels=3,
        classes=10,
        size=32,
    ),
}


@dataclass(frozen=True)
class Net:
    """A network of a space, and where it came from.

    Attributes:
        draw: how often its index was drawn before, and given up for the genotype's split.
        parameters: how many it has for the images of the space.
    """

    space: str
    split: str
    seed: int
    index: int
    draw: int
    parameters: int
    spec: ConvSpec | VitSpec

    def build(self, channels: int, classes: int, size: int) -> nn.Module:
        """A module with fresh weights from torch's global generator (none under
        ``torch.device("meta")``).

        Args:
            size: height and width of the images.
        """
        return self.spec.build(channels, classes, size)

    def to_json(self) -> dict[str, Any]:
        kind = next(kind for kind, spec in SPECS.items() if isinstance(self.spec, spec))
        origin = {**vars(self), "kind": kind, "genotype": self.spec.digest}
        return {**origin, "spec": self.spec.to_json()}

    @staticmethod
    def from_json(value: Any) -> Net:
        """Raises: ValueError if it is not what `to_json` gives."""
        require(isinstance(value, Mapping), "net", "a JSON object", value)
        numbers = ("seed", "index", "draw", "parameters")
        keys = {"space", "split", *numbers, "kind", "genotype", "spec"}
        require(set(value) == keys, "net", f"of the keys {', '.join(sorted(keys))}", set(value))
        kind = value["kind"]
        require(kind in SPECS, "kind", f"one of {', '.join(SPECS)}", kind)
        try:
            spec = SPECS[kind].from_json(value["spec"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"ghn-space: spec must be that of a {kind} network, got {error!r}"
            ) from error
        rule = f"{spec.digest}, the hash of its genotype"
        require(value["genotype"] == spec.digest, "genotype", rule, value["genotype"])
        require(value["split"] in SPLITS, "split", f"one of {', '.join(SPLITS)}", value["split"])
        for key in numbers:
            require(type(value[key]) is int, key, "a whole number", value[key])
        origin = {key: value[key] for key in ("space", "split", *numbers)}
        return Net(**origin, spec=spec)


def draw_net(space: Space | str, split: str, seed: int, index: int) -> Net:
    """The network of an index: the same in every process, however many others are drawn.

    Args:
        space: one of ``SPACES``, or a space of one's own.
        split: one of ``SPLITS`` that the space has.
        index: from 0.

    Raises:
        ValueError: no such space or split, or a negative index.
    """
    space = space_named(space)
    spec, draw = draw_spec(space, split, seed, index)
    spec, parameters = _within(spec, space, space.splits[split].most)
    return Net(space.name, split, seed, index, draw, parameters, spec)


def without_norm(net: Net) -> Net:
    """The network without BatchNorm, its convolutions with biases instead; the genotype stays.

    Raises:
        ValueError: a ViT, which has none.
    """
    spec = net.spec
    if not isinstance(spec, ConvSpec):
        raise ValueError(f"ghn-space: network must be one with BatchNorm, got one of {net.space}")
    return replace(net, spec=replace(spec, norm=False))


def draw_spec(
    space: Space | str, split: str, seed: int, index: int
) -> tuple[ConvSpec | VitSpec, int]:
    """What `draw_net` draws, before it is narrowed to the parameters that it may have; and how
    often it was drawn before. Raises: as `draw_net`."""
    space = space_named(space)
    known = space.splits
    require(split in known, "split", f"one of {', '.join(known)} in {space.name}", split)
    require(index >= 0, "index", "at least 0", index)
    make: Callable[[Draw, Space, Ranges], ConvSpec | VitSpec]
    make = _draw_conv if space.kind == "conv" else _draw_vit
    number = 0
    while True:
        draw = Draw(seed, index, f"{space.name}/{split}/{number}")
        spec = make(draw, space, space.splits[split])
        if split_of(spec) == split:
            return spec, number
        number += 1


def space_named(space: Space | str) -> Space:
    if isinstance(space, Space):
        return space
    require(space in SPACES, "space", f"one of {', '.join(SPACES)}", space)
    return SPACES[space]


def split_of(spec: ConvSpec | VitSpec) -> str:
    """The split that owns the genotype."""
    eighth = int(spec.digest, 16) % 8
    return next(split for split, owned in SHARES.items() if eighth in owned)


def _draw_conv(draw: Draw, space: Space, ranges: Ranges) -> ConvSpec:
    cells = draw.between(*ranges.cells)
    least, most = ranges.sums
    sums = draw.between(least, min(most, ranges.few) if cells > ranges.long else most)
    genotype = draw_genotype(draw, sums)
    growth = draw.pick((1, 2))
    return ConvSpec(
        genotype=genotype,
        cells=cells,
        width=draw.pick(ranges.widths),
        growth=growth,
        stem=draw.pick(STEMS),
        kernel=draw.pick(space.kernels),
        # plain chains, as VGG and ResNet are, among those that can be
        preprocess=not (sums == 1 and growth == 1 and draw.chance(0.5)),
        hidden=draw.pick((0, space.hidden)),
        glob_avg=draw.chance(0.9),
        norm=ranges.norm,
    )


def _draw_vit(draw: Draw, space: Space, ranges: Ranges) -> VitSpec:
    depth = draw.between(*ranges.cells)
    blocks = tuple((draw.pick((1, 2, 4)), draw.pick((1, 2, 4))) for _ in range(depth))
    return VitSpec(draw.pick(ranges.widths), blocks)


def parameter_count(spec: ConvSpec | VitSpec, channels: int, classes: int, size: int) -> int:
    with torch.device("meta"):
        net = spec.build(channels, classes, size)
    return sum(parameter.numel() for parameter in net.parameters())


def _within(spec: Any, space: Space, most: int) -> tuple[Any, int]:
    """The specification, narrowed until it has at most so many parameters, and how many it has."""
    shape = space.channels, space.classes, space.size
    count = parameter_count(spec, *shape)
    while count > most and spec.width > CHANNEL_STEP:
        # the count is near to a square of the width; one step down at least
        near = int(spec.width * (most / count) ** 0.5) // CHANNEL_STEP * CHANNEL_STEP
        spec = replace(spec, width=max(CHANNEL_STEP, min(near, spec.width - CHANNEL_STEP)))
        count = parameter_count(spec, *shape)
    return spec, count


def draw_nets(
    space: Space | str, split: str, seed: int, count: int, *, quiet: bool = False
) -> list[Net]:
    """The networks of indices 0 .. count - 1. Raises: as `draw_net`."""
    require(count >= 1, "count", "at least 1", count)
    nets = []
    with Track(count, f"{split} networks", quiet=quiet) as track:
        for index in range(count):
            nets.append(draw_net(space, split, seed, index))
            track.advance()
    return nets


def write_nets(path: str | Path, nets: Iterable[Net]) -> None:
    """One JSON line for each network; the file is there in full or not at all."""
    lines = [json.dumps(net.to_json(), sort_keys=True) + "\n" for net in nets]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), "".join(lines).encode())


def read_nets(path: str | Path) -> list[Net]:
    """The networks of a file of `write_nets`.

    Raises:
        ValueError: a line that is not one (file and line number are named), or no line at all.
    """
    nets = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                nets.append(Net.from_json(json.loads(line)))
            except ValueError as error:
                raise ValueError(
                    f"ghn-space: {path} must hold a network on each line, got at line {number}: "
                    f"{error}"
                ) from error
    require(bool(nets), "file", "one with networks", str(path))
    return nets
