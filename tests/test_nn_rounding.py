"""SoftRounding: where it starts, the grid it ends on, and its gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import numeric
from qkernels.nn import QuantSpec, SoftRounding

SHAPE = (4, 6, 3, 2)
LAYOUTS: list[dict[str, Any]] = [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}, {"group_size": 9}]
CODES: list[dict[str, Any]] = [
    {"bits": 1, "symmetric": True},
    {"bits": 2, "symmetric": True},
    {"bits": 3, "symmetric": True, "narrow_range": True},
    {"bits": 2},
    {"bits": 4},
    {"bits": 8},
    {"bits": 16, "symmetric": True},
]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in options.items()) or "tensor"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounding(
    weight: Tensor, shrink: float = 0.7, **options: Any
) -> tuple[SoftRounding, dict[str, Any]]:
    """A SoftRounding on a range that clips some of the weight, and fake_quant's arguments."""
    spec = QuantSpec(**options)
    scale, zero_point = qkernels.quant_range(weight, **options)
    scale = scale * shrink
    soft = SoftRounding(weight, scale, zero_point, spec)
    return soft, {"scale": scale, "zero_point": zero_point, **options}


def per_element(p: Tensor, shape: torch.Size, options: dict[str, Any]) -> Tensor:
    """One entry per channel or group -> one for each element."""
    if "group_size" in options:
        return p.repeat_interleave(options["group_size"]).reshape(shape)
    if "axis" in options:
        sizes = [1] * len(shape)
        sizes[options["axis"]] = -1
        return p.reshape(sizes).expand(shape)
    return p.expand(shape)


def expected_hard(soft: SoftRounding, weight: Tensor, given: dict[str, Any]) -> Tensor:
    """The formula, element by element."""
    spec = soft.spec
    lo, hi = numeric.code_range("test", spec.bits, spec.symmetric, spec.narrow_range)
    layout = {key: given[key] for key in ("axis", "group_size") if key in given}
    scales = per_element(given["scale"], weight.shape, layout).flatten().tolist()
    points = per_element(given["zero_point"], weight.shape, layout).flatten().tolist()
    values = []
    for w, s, z, v in zip(
        weight.flatten().tolist(), scales, points, soft.v.flatten().tolist(), strict=True
    ):
        h = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0.0), 1.0)
        code = min(max(math.floor(w * (1.0 / s)) + (h >= 0.5) + z, lo), hi)
        values.append((code - z) * s)
    return torch.tensor(values, dtype=weight.dtype).reshape(weight.shape)


@pytest.mark.parametrize("codes", CODES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_hard_weight_is_the_formula_and_fake_quant_gives_its_bits_back(
    layout: dict[str, Any], codes: dict[str, Any]
) -> None:
    weight = noise(*SHAPE).double()
    soft, given = rounding(weight, **layout, **codes)
    with torch.no_grad():
        soft.v.copy_(noise(*SHAPE, seed=1) * 2)
    hard = soft.hard()
    assert torch.equal(hard, expected_hard(soft, weight, given))
    assert torch.equal(qkernels.fake_quant(hard, **given), hard)
    nearest = qkernels.fake_quant(weight, **given)
    assert not torch.equal(hard, nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_grid_is_exact_in_every_dtype(layout: dict[str, Any], dtype: torch.dtype) -> None:
    weight = noise(*SHAPE).to(dtype)
    widths = (1, 3, 8, 16) if dtype is torch.float32 else (1, 3, 8)
    for bits, symmetric in itertools.product(widths, (True, False)):
        soft, given = rounding(weight, bits=bits, symmetric=symmetric, **layout)
        with torch.no_grad():
            soft.v.copy_(noise(*SHAPE, seed=bits) * 2)
        hard = soft.hard()
        assert hard.dtype is dtype and soft().dtype is dtype
        assert torch.equal(qkernels.fake_quant(hard, **given), hard)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_starts_as_the_weight(layout: dict[str, Any], symmetric: bool) -> None:
    weight = noise(*SHAPE).double()
    options = {"bits": 4, "symmetric": symmetric, **layout}
    soft, given = rounding(weight, **options)
    scale = per_element(given["scale"], weight.shape, layout)
    point = per_element(given["zero_point"], weight.shape, layout)
    lo, hi = numeric.code_range("test", 4, symmetric, False)
    bounded = weight.clamp((lo - point) * scale, (hi - point) * scale)
    assert 0 < int((bounded != weight).sum()) < weight.numel() // 2
    torch.testing.assert_close(soft(), bounded, rtol=1e-12, atol=1e-12)
    # and what it would be rounded to then is the nearest
    fraction = (weight / scale) % 1
    clear = (fraction - 0.5).abs() > 1e-6
    assert torch.equal(soft.hard()[clear], qkernels.fake_quant(weight, **given)[clear])


def test_h_is_the_fraction_at_first_and_stays_in_0_to_1() -> None:
    weight = torch.tensor([-1.75, -1.0, -0.25, 0.0, 0.5, 1.25], dtype=torch.float64)
    soft = SoftRounding(weight, torch.tensor(1.0).double(), None, QuantSpec(4, symmetric=True))
    expected = torch.tensor([0.25, 0.0, 0.75, 0.0, 0.5, 0.25]).double()
    torch.testing.assert_close(soft.h(), expected, rtol=0, atol=1e-15)
    with torch.no_grad():
        soft.v.copy_(torch.tensor([-50.0, -2.4, -2.3, 2.3, 2.4, 50.0]))
    h = soft.h()
    assert h[[0, 1]].tolist() == [0, 0] and h[[4, 5]].tolist() == [1, 1]
    assert 0 < h[2] < 0.01 and 0.99 < h[3] < 1
    # whatever V is, the soft weight stays between the neighbours
    assert torch.equal(soft()[[0, 1, 4, 5]], torch.tensor([-2.0, -1.0, 1.0, 2.0]).double())


@pytest.mark.parametrize(
    ("options", "lowest", "highest"),
    [
        ({"bits": 3, "symmetric": True}, -4, 3),
        ({"bits": 3, "symmetric": True, "narrow_range": True}, -3, 3),
        ({"bits": 1, "symmetric": True}, -1, 0),
        ({"bits": 3}, -2, 5),
    ],
)
@pytest.mark.parametrize("v", [-9.0, 0.0, 9.0])
def test_codes_stay_in_range(options: dict[str, Any], lowest: int, highest: int, v: float) -> None:
    weight = torch.tensor([-1e30, -5.0, -4.5, -3.5, 2.5, 3.5, 5.5, 1e30])
    point = None if "symmetric" in options else torch.tensor(2, dtype=torch.int32)
    soft = SoftRounding(weight, torch.tensor(1e-3), point, QuantSpec(**options))
    with torch.no_grad():
        soft.v.fill_(v)
    ends = torch.tensor([lowest] * 4 + [highest] * 4) * torch.tensor(1e-3)
    assert torch.equal(soft.hard(), ends)
    torch.testing.assert_close(soft(), ends, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(soft().square().sum(), [soft.v])
    assert not grad.any()


def test_regularizer() -> None:
    weight = torch.zeros(5, dtype=torch.float64)
    soft = SoftRounding(weight, torch.tensor(1.0).double(), None, QuantSpec(4, symmetric=True))
    wanted = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()
    with torch.no_grad():
        soft.v.copy_(torch.logit((wanted + 0.1) / 1.2))
    assert soft.regularizer(2.0).item() == pytest.approx(0 + 0.75 + 1 + 0.75 + 0)
    assert soft.regularizer(20.0).item() == pytest.approx(3 - 2 * 0.5**20)
    (grad,) = torch.autograd.grad(soft.regularizer(2.0), [soft.v])
    # down below one half, up above it; nothing at one half
    assert grad[1] > 0 and grad[2].abs() < 1e-12 and grad[3] < 0
    with torch.no_grad():
        soft.v.copy_(torch.tensor([-5.0, 5.0, -9.0, 9.0, 5.0]))
    assert soft.regularizer(2.0).item() == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients(layout: dict[str, Any], symmetric: bool) -> None:
    """Of the smooth part: nothing clipped, every h inside (0, 1)."""
    weight = noise(*SHAPE).double()
    soft, _ = rounding(weight, shrink=1.5, bits=4, symmetric=symmetric, **layout)
    v = (noise(*SHAPE, seed=2).double() * 0.5).requires_grad_()

    def call(v: Tensor) -> tuple[Tensor, Tensor]:
        state = {"v": v}
        weight = torch.func.functional_call(soft, state, ())
        penalty = torch.func.functional_call(_Penalty(soft), {"soft.v": v}, ())
        return weight, penalty

    assert torch.autograd.gradcheck(call, (v,))


class _Penalty(torch.nn.Module):
    def __init__(self, soft: SoftRounding) -> None:
        super().__init__()
        self.soft = soft

    def forward(self) -> Tensor:
        return self.soft.regularizer(3.0)


def test_memory_format_does_not_matter() -> None:
    weight = noise(4, 6, 3, 3)
    other = weight.to(memory_format=torch.channels_last)
    for layout in ({"axis": 0}, {"group_size": 9}):
        ours, given = rounding(weight, bits=3, **layout)
        theirs = SoftRounding(other, given["scale"], given["zero_point"], ours.spec)
        assert torch.equal(ours.v, theirs.v) and torch.equal(ours.hard(), theirs.hard())


def test_state_dict() -> None:
    weight = noise(*SHAPE)
    soft, given = rounding(weight, bits=4, axis=1)
    with torch.no_grad():
        soft.v.add_(noise(*SHAPE, seed=3))
    fresh = SoftRounding(torch.zeros(SHAPE), torch.ones(6), given["zero_point"], soft.spec)
    assert not torch.equal(fresh.hard(), soft.hard())
    fresh.load_state_dict(soft.state_dict())
    assert torch.equal(fresh.hard(), soft.hard()) and torch.equal(fresh(), soft())
    # the weight and the scale that were given are not touched, nor held
    assert torch.equal(weight, noise(*SHAPE))
    assert soft.scale.data_ptr() != given["scale"].data_ptr()
    assert [key for key, _ in soft.named_parameters()] == ["v"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.tensor([1.0, math.nan])}, ValueError, "weight must be finite, got NaN"),
        ({"weight": torch.tensor([1, 2])}, TypeError, "weight must be float32, .*got torch.int64"),
        ({"scale": torch.tensor(0.0)}, ValueError, "scale must be positive"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be 0-dim .*got shape \(3,\)"),
        ({"spec": QuantSpec(4, axis=1)}, ValueError, r"axis must be in -1\.\.0, got 1"),
        ({"spec": 4}, TypeError, "spec must be a QuantSpec, got 4"),
        ({"zero_point": torch.ones(2).int()}, ValueError, "zero_point must be 0-dim"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {
        "weight": torch.ones(2),
        "scale": torch.tensor(1.0),
        "zero_point": None,
        "spec": QuantSpec(4),
    }
    with pytest.raises(error, match=f"SoftRounding: {text}"):
        SoftRounding(**{**given, **change})
