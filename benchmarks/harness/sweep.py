"""The sweep: which sizes, dtypes, granularities and rows an op is timed at, and its inputs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import torch
from cases import BENCH_CASES, Case
from torch import Tensor

import qkernels
from qkernels import _registry, numeric

from .record import Work, work_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = {case.name: case for case in BENCH_CASES}


class Options(NamedTuple):
    """The command line."""

    device: str = "cpu"
    level: str = "default"  # or "short", "full"
    rows: tuple[str, ...] = ()  # empty: all that can run, but the reference
    compiler: str = "some"  # torch.compile: "none", "some", "all"


OPTIONS = pytest.StashKey[Options]()  # where pytest's config holds them


class Point(NamedTuple):
    """A size of the sweep, as the levels list them."""

    size: str
    dtype: torch.dtype = F32
    per_channel: bool = True


# the default sweep: size per channel, then what dtype, granularity and memory format change
DEFAULT = (
    Point("1Ki"),
    Point("64Ki"),
    Point("2Mi"),
    Point("64Mi"),
    Point("2Mi", BF16),
    Point("2Mi", F32, False),
    Point("activation", F32, False),
    Point("activation_nhwc", F32, True),
)
# small for the overhead, large for the bandwidth of the device, and an activation
SHORT = {
    "cpu": (Point("1Ki"), Point("2Mi"), Point("activation", F32, False)),
    "cuda": (
        Point("1Ki"),
        Point("64Mi"),
        Point("64Mi", BF16),
        Point("activation", F32, False),
    ),
}


def points(options: Options, large: bool) -> list[Point]:
    """The points of a level. large: 64 Mi elements in the default sweep of a CPU too."""
    if options.level == "full":
        pairs = [(d, c) for d in dtypes_of(options) for c in (True, False)]
        return [Point(size, dtype, channel) for size in SIZES for dtype, channel in pairs]
    if options.level == "short":
        return list(SHORT[options.device])
    if options.device == "cuda":
        return [*DEFAULT, Point("64Mi", BF16), Point("2Mi", F16)]
    return [p for p in DEFAULT if large or p.size != "64Mi"]


def list_dtypes(options: Options) -> list[torch.dtype]:
    """Dtypes in which lists of weights are timed."""
    return {"short": [F32], "default": [F32, BF16], "full": dtypes_of(options)}[options.level]


def dtypes_of(options: Options) -> list[torch.dtype]:
    return [F32, BF16, F16] if options.device == "cuda" else [F32, BF16]


def rows(op: str, options: Options) -> list[str]:
    """Rows of an op to time here: what can run, compiled and not interpreted."""
    found = []
    for row in _registry.rows(op, options.device):
        asked = row.backend in options.rows if options.rows else row.backend != "reference"
        interpreted = row.backend == "triton" and options.device == "cpu"
        if asked and not interpreted and _registry.unavailable(row) is None:
            found.append(row.backend)
    return found


def backend_argument(op: str, row: str, device: str) -> str | None:
    """None where the automatic choice is the row anyway, as a user would call it."""
    return None if _registry.candidates(op, device)[0].row.backend == row else row


@functools.lru_cache(maxsize=8)
def made(size: str, dtype: torch.dtype, device: str) -> Tensor:
    """The tensor of a size, which nobody writes to: 64 Mi normal numbers take half a second."""
    return SIZES[size].tensor(dtype, device=device)


class Spot:
    """An op's row at a point, with the inputs, made when first used."""

    def __init__(self, op: str, row: str, point: Point, options: Options) -> None:
        self.op, self.row, self.point, self.options = op, row, point, options
        self.case: Case = SIZES[point.size]
        self.device, self.dtype = options.device, point.dtype
        self.axis = self.case.axis if point.per_channel else None
        self.backend = backend_argument(op, row, self.device)

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.point.size}-{dtype}-{'tensor' if self.axis is None else 'channel'}-{self.row}"
        )

    @cached_property
    def x(self) -> Tensor:
        return made(self.point.size, self.dtype, self.device).detach()  # its own requires_grad

    @cached_property
    def grad(self) -> Tensor:
        return torch.randn_like(self.x)

    def place(self, **kw: Any) -> dict[str, Any]:
        """axis and row, for the public functions."""
        return {"axis": self.axis, "backend": self.backend, **kw}

    def params(self, bits: int = 8, **kw: Any) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of the range of x."""
        scale, zp = qkernels.quant_range(self.x, bits=bits, axis=self.axis, **kw)
        return scale, zp

    def column(self, p: Tensor) -> Tensor:
        """A parameter per channel in the shape that broadcasts over x."""
        return column(p, self.x, self.axis)

    @property
    def dims(self) -> list[int]:
        """The dimensions that share a parameter."""
        return [d for d in range(self.x.dim()) if d != self.axis]

    def compiles(self) -> bool:
        """Whether torch.compile takes part: a static shape costs it 3 to 20 s each. Always for all
        of 2 Mi elements and more with --compile all; by default, of --full, in the cases of fp32
        per channel; of --short, on a GPU, at 64 Mi. (The bars have it at 2.25 Mi everywhere.)"""
        if self.options.compiler != "some":
            return self.options.compiler == "all" and self.x.numel() >= 1 << 21
        if self.dtype is not F32 or self.axis != 0 or self.x.numel() < 1 << 21:
            return False
        if self.options.level == "full":
            return True
        return self.options.device == "cuda" and self.point.size == "64Mi"

    def work(self, ideal_bytes: int, formula: str, op: str | None = None) -> Work:
        kw: dict[str, Any] = dict(axis=self.axis, row=self.row, suite="sweep", size=self.point.size)
        return work_of(op or self.op, self.x, ideal_bytes, formula, **kw)


def column(p: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """p [C] as [1, .., C, .., 1] for axis; unchanged for one parameter."""
    if axis is None:
        return p
    shape = [1] * x.dim()
    shape[axis] = -1
    return p.reshape(shape)


def spots(op: str, options: Options, *, large: bool = False) -> list[Spot]:
    """Every row at every point."""
    return [Spot(op, row, p, options) for p in points(options, large) for row in rows(op, options)]


def left_out(options: Options) -> Iterator[str]:
    """Rows that are not timed here, each with the reason."""
    for row in _registry.rows("fake_quant", options.device):
        why = _registry.unavailable(row)
        if row.backend == "triton" and options.device == "cpu":
            why = "interpreted on the CPU, not timed" if has_triton() else "triton is not installed"
        if why is not None:
            yield f"row {row.backend}: {why}"


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def mask_bytes(x: Tensor) -> int:
    return numeric.mask_bytes(x.numel())
