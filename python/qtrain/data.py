"""Datasets by name, and batches that are a pure function of (seed, epoch, number).

Batch i of epoch e does not depend on what was read before it, so a run that was killed in the
middle of an epoch reads on exactly where it stopped. Small sets live in memory as tensors;
torchvision's are read through a DataLoader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .seeds import generator, stream_seed
from .shapes import SHAPES, shapes

Batch = tuple[Tensor, Tensor]  # x [N, C, H, W] float32, y [N] int64


class TensorSplit:
    """Examples held in memory (on the device, after ``to``)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> TensorSplit:
        return TensorSplit(self.x.to(device), self.y.to(device))

    def read(self, chunks: list[Tensor], *, seed: int, epoch: int, workers: int) -> Iterator[Batch]:
        for chunk in chunks:
            rows = chunk.to(self.x.device)
            yield self.x[rows], self.y[rows]


class _Keyed(torch.utils.data.Dataset):
    """A torchvision dataset whose augmentation draws from the stream (seed, epoch, index)."""

    def __init__(self, source: Any, seed: int, epoch: int) -> None:
        self.source, self.seed, self.epoch = source, seed, epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.seed, self.epoch, f"augment/{index}"))
            return self.source[index]


class FileSplit:
    """A torchvision dataset, read by ``workers`` processes."""

    def __init__(self, source: Any, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, torch.device(device)

    def __len__(self) -> int:
        return len(self.source)

    def to(self, device: torch.device) -> FileSplit:
        return FileSplit(self.source, device)

    def read(self, chunks: list[Tensor], *, seed: int, epoch: int, workers: int) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            _Keyed(self.source, seed, epoch),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=generator(seed, epoch, "loader"),
        )
        for x, y in loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


Split = TensorSplit | FileSplit


@dataclass(frozen=True)
class Dataset:
    """A train and a test split, and what a model must know of them."""

    name: str
    train: Split
    test: Split
    channels: int
    size: int
    classes: int

    def to(self, device: torch.device) -> Dataset:
        train, test = self.train.to(device), self.test.to(device)
        return Dataset(self.name, train, test, self.channels, self.size, self.classes)


def batch_count(split: Split, batch_size: int) -> int:
    """Full batches in an epoch; the few examples left over change from epoch to epoch."""
    if len(split) < batch_size:
        raise ValueError(
            f"data: batch_size must be at most the {len(split)} training examples, got {batch_size}"
        )
    return len(split) // batch_size


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    stop: int | None = None,
    stream: str = "order",
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches ``start`` to ``stop`` (the end) of an epoch, in the order of (seed, epoch, stream).

    With ``world`` > 1 each rank gets its share of the same global batch.
    """
    order = torch.randperm(len(split), generator=generator(seed, epoch, stream))
    count = batch_count(split, batch_size)
    numbers = range(start, count if stop is None else min(stop, count))
    chunks = [order[i * batch_size : (i + 1) * batch_size][rank::world] for i in numbers]
    return split.read(chunks, seed=seed, epoch=epoch, workers=workers)


def eval_batches(
    split: Split, batch_size: int = 256, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every example once, in order; each rank its share (which can be empty)."""
    chunks = list(torch.arange(len(split))[rank::world].split(batch_size))
    return split.read(chunks, seed=0, epoch=0, workers=workers)


def _digits() -> Dataset:
    """1797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn): 1297 / 500."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    x = source.images.astype(np.float32)[:, None]
    y = source.target.astype(np.int64)
    parts = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    mean, std = x_train.mean(), x_train.std()
    train = TensorSplit((x_train - mean) / std, y_train)
    return Dataset("digits", train, TensorSplit((x_test - mean) / std, y_test), 1, 8, 10)


def _shapes(
    *,
    classes: int = len(SHAPES),
    difficulty: float = 0.5,
    train_size: int = 5000,
    test_size: int = 1000,
    seed: int = 0,
) -> Dataset:
    if train_size < 1 or test_size < 1:
        raise ValueError(
            f"data: train_size and test_size must be positive, got {train_size} and {test_size}"
        )
    knobs: dict[str, Any] = {"classes": classes, "difficulty": difficulty, "seed": seed}
    # test pictures first: they stay the same when train_size changes
    x_test, y_test = (torch.from_numpy(part) for part in shapes(0, test_size, **knobs))
    x_train, y_train = (torch.from_numpy(part) for part in shapes(test_size, train_size, **knobs))
    mean, std = x_train.mean(), x_train.std()
    train = TensorSplit((x_train - mean) / std, y_train)
    return Dataset("shapes", train, TensorSplit((x_test - mean) / std, y_test), 3, 32, classes)


def _cifar(name: str, *, root: str = "data", download: bool = False) -> Dataset:
    import torchvision
    from torchvision import transforms as T

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    folder = Path(root) / kind[name].base_folder
    if not download and not folder.is_dir():
        raise FileNotFoundError(
            f"data: {name} must be at {folder} (unpack {kind[name].filename} into {root}/, "
            "or ask for it with download=true), got no such directory"
        )
    # mean and standard deviation of the training pictures, per colour channel
    norms = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    plain = [T.ToTensor(), T.Normalize(*norms[name])]
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *plain])
    train = kind[name](root, train=True, transform=augment, download=download)
    test = kind[name](root, train=False, transform=T.Compose(plain), download=download)
    classes = len(train.classes)
    return Dataset(name, FileSplit(train), FileSplit(test), 3, 32, classes)


def _imagefolder(*, root: str = "data/imagefolder", size: int = 224) -> Dataset:
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    base = Path(root)
    test_name = "test" if (base / "test").is_dir() else "val"
    for part in ("train", test_name):
        if not (base / part).is_dir():
            raise FileNotFoundError(
                f"data: imagefolder must be {base}/train/<class>/*.jpg and "
                f"{base}/val/<class>/*.jpg (or test), got no directory {base / part}"
            )
    # the ImageNet statistics, as torchvision's and timm's models expect
    plain = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *plain])
    centre = T.Compose([T.Resize(round(size * 8 / 7)), T.CenterCrop(size), *plain])
    train = ImageFolder(str(base / "train"), augment)
    test = ImageFolder(str(base / test_name), centre)
    if train.classes != test.classes:
        raise ValueError(
            f"data: the classes of {base}/{test_name} must be those of {base}/train, "
            f"got {len(test.classes)} and {len(train.classes)} that differ"
        )
    return Dataset("imagefolder", FileSplit(train), FileSplit(test), 3, size, len(train.classes))


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "shapes": _shapes,
    "cifar10": lambda **options: _cifar("cifar10", **options),
    "cifar100": lambda **options: _cifar("cifar100", **options),
    "imagefolder": _imagefolder,
}


def load_dataset(name: str, options: Mapping[str, Any] | None = None) -> Dataset:
    """The dataset of that name; nothing is ever downloaded unless ``download=True`` is asked for.

    Args:
        options: for ``shapes`` classes, difficulty, train_size, test_size, seed; for
            ``cifar10`` and ``cifar100`` root, download; for ``imagefolder`` root, size.

    Raises:
        ValueError: unknown name or option.
        FileNotFoundError: the files are not there; the text says what to place where.
    """
    if name not in DATASETS:
        raise ValueError(f"data: dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    try:
        return DATASETS[name](**(options or {}))
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ValueError(f"data: options must be known to {name}, got {error}") from error
