"""A running range that follows what is observed: its memory, its errors, and traced calls."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import qkernels
from qkernels.nn import FakeQuantize, QuantSpec
from qkernels.ops.quant_range import follow_range

RUNNING = QuantSpec(bits=4, axis=1, ema=0.5)


def observer(channels: int = 4) -> FakeQuantize:
    return FakeQuantize(RUNNING, channels=channels).train()


def two_steps(q: FakeQuantize, xs: list[Tensor]) -> Tensor:
    for x in xs:
        y = q(x)
    return y


@pytest.mark.parametrize("seen", (2, 8))
def test_another_number_of_channels(seen: int) -> None:
    """Nothing is written beside the range, which stays as it is."""
    memory = torch.full((64,), 7.0)
    q = observer()
    q(torch.ones(2, 4, 3))
    q.range = memory[16:24].view(2, 4)
    with pytest.raises(ValueError, match=r"running range must be of shape \(2, \d\) without gaps"):
        q(torch.randn(2, seen, 3))
    assert bool((memory == 7.0).all())


def test_range_with_gaps() -> None:
    """A loaded state may be a view; it moves as any other."""
    xs = [torch.randn(3, 4, 5) for _ in range(3)]
    plain, gaps = observer(), observer()
    memory = torch.full((4, 2, 3), 7.0)
    view = memory.permute(1, 0, 2)[:, :, 0]
    view.zero_()
    gaps.load_state_dict({**gaps.state_dict(), "range": view}, assign=True)
    assert not gaps.range.is_contiguous()
    assert_same(two_steps(gaps, xs), two_steps(plain, xs))
    assert_same(gaps.range.contiguous(), plain.range)
    assert bool((memory[:, :, 1:] == 7.0).all())


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_dtype_and_device(backend: str) -> None:
    with qkernels.use_backend(backend):
        with pytest.raises(ValueError, match="running range must be on cpu"):
            follow_range(torch.zeros(2, device="meta"), torch.ones(2), 0.9, bits=4)
        wide = torch.zeros(2, dtype=torch.float64)
        scale, _ = follow_range(wide, torch.tensor([-1.0, 2.0]), 0.9, bits=4)
        assert scale.dtype is torch.float64 and wide.tolist() == [-1.0, 2.0]


def test_version_counter() -> None:
    running = torch.ones(2)
    before = running._version
    follow_range(running, torch.tensor([-1.0, 2.0]), 0.9, bits=4)
    assert running._version > before


def test_fake_and_meta_tensors() -> None:
    """Shapes without memory: a training step of a model that is only planned."""
    with FakeTensorMode():
        assert observer()(torch.randn(2, 4, 3)).shape == (2, 4, 3)
    q = observer().to("meta")
    assert q(torch.randn(2, 4, 3, device="meta")).is_meta


def test_make_fx() -> None:
    """The traced graph moves the range and quantizes with it."""
    q, x = observer(), torch.randn(2, 4, 3)
    two_steps(q, [x, x])
    graph = make_fx(q)(x)
    want = observer()
    want.load_state_dict(q.state_dict())
    # the graph holds the module's own range: both move from the same place
    y = torch.randn(2, 4, 3)
    assert_same(graph(y), want(y))
    assert_same(q.range, want.range)
