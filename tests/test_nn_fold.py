"""fold_batchnorm: the same function in eval mode, and the pairs it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels.nn import QConfig, calibrate, fold_batchnorm, prepare

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share, and other tests may run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """fp64, eval, and BatchNorms that do something."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, NORMS) for m in model.modules())


def assert_folds(model: nn.Module, x: Tensor, left: int = 0) -> nn.Module:
    """The folded model computes the same, and `left` BatchNorms remain."""
    model = with_statistics(model)
    expected, count = model(x), norms(model)
    folded = fold_batchnorm(model)
    assert norms(folded) == left
    assert norms(model) == count
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)
    return folded


CASES: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 8)),
    (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=1e-2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), (2, 4, 7, 7)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), (1, 2, 3, 3, 3)),
    (nn.Linear(5, 4), nn.BatchNorm1d(4), (6, 5)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), CASES)
def test_each_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    folded = assert_folds(nn.Sequential(layer, norm, nn.ReLU()), x)
    assert type(folded[0]) is type(layer)
    assert type(folded[1]) is nn.Identity


class Block(nn.Module):
    """A residual block with a depthwise convolution, its layers named out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.down_norm = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(3, 6, 1, bias=False)
        self.wise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.wise_norm = nn.BatchNorm2d(6)
        self.out = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        short = self.down_norm(self.down(x))
        y = torch.relu(self.wise_norm(self.wise(short)))
        return torch.relu(self.out(y) + short)


def test_residual_and_depthwise() -> None:
    block = Block()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = assert_folds(block, x)
    before, after = block.state_dict(), folded.state_dict()
    assert [k for k in after if k not in before] == ["down.bias", "wise.bias"]
    assert all("norm" in k or k.startswith("out.1") for k in before if k not in after)


def test_a_folded_model_is_prepared_as_any_other() -> None:
    model = with_statistics(Block()).float()
    x = torch.randn(2, 3, 6, 6)
    folded = fold_batchnorm(model)
    quantized = prepare(folded, QConfig.minmax(8, 8))
    calibrate(quantized, [x])
    torch.testing.assert_close(quantized.eval()(x), model(x), rtol=0.05, atol=0.2)


def test_inplace_and_flags() -> None:
    model = with_statistics(Block()).train()
    model.down.weight.requires_grad_(False)
    assert fold_batchnorm(model, inplace=True) is model
    assert norms(model) == 0
    assert all(m.training for m in model.modules())
    assert not model.down.weight.requires_grad and not model.down.bias.requires_grad
    assert model.wise.weight.requires_grad
    again = fold_batchnorm(model)
    assert list(again.state_dict()) == list(model.state_dict())


class Left(nn.Module):
    """Pairs that look foldable and are not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "no statistics")
        self.other = nn.Conv2d(4, 4, 1)
        if kind == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        if self.kind == "output used twice":
            return z + y
        if self.kind == "layer called twice":
            return z + self.conv(z)
        if self.kind == "norm called twice":
            return self.norm(self.other(z))
        if self.kind == "weight read":
            return z * self.conv.weight.mean()
        return self.other(z)


@pytest.mark.parametrize(
    "kind",
    [
        "output used twice",
        "layer called twice",
        "norm called twice",
        "weight read",
        "tied",
        "no statistics",
    ],
)
def test_pairs_that_stay(kind: str) -> None:
    assert_folds(Left(kind), torch.randn(2, 4, 3, 3, dtype=torch.float64), left=1)


def test_norm_over_another_dimension_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))
    assert_folds(model, torch.randn(2, 5, 4, dtype=torch.float64), left=1)


def test_a_norm_under_two_names_goes_everywhere() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
            self.same = self.body[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    folded = assert_folds(Holder(), torch.randn(1, 2, 3, 3, dtype=torch.float64))
    assert type(folded.same) is nn.Identity


def test_a_branch_that_only_training_takes_is_left_alone() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
            self.aux = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y + self.aux(y) if self.training else y

    assert_folds(Auxiliary(), torch.randn(1, 2, 3, 3, dtype=torch.float64), left=1)


def test_a_model_that_cannot_be_traced() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    model = Dynamic().train()
    before = copy.deepcopy(model.state_dict())
    text = r"fold_batchnorm: model must be one that torch.fx can trace, got Dynamic \(TraceError"
    with pytest.raises(ValueError, match=text):
        fold_batchnorm(model, inplace=True)
    assert model.training and norms(model) == 1
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


def test_a_prepared_model_is_refused() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), QConfig.lsq(4, 4))
    with pytest.raises(ValueError, match="fold_batchnorm: model must be a float model, got one"):
        fold_batchnorm(model)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_models(name: str) -> None:
    models: Any = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = with_statistics(getattr(models, name)())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # random gains through so many layers would overflow any tolerance
            nn.init.ones_(module.weight)
            module.running_var.fill_(1.0)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    folded = fold_batchnorm(model, inplace=True)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-9)
