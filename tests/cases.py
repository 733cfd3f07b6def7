"""Inputs that the parity tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]


# (*shape) -> standard normal numbers, in the dtype and on the device that the case is asked for
Randn = Callable[..., Tensor]


class Case(NamedTuple):
    """A tensor and the granularity at which it is quantized."""

    name: str
    make: Callable[[Randn], Tensor]
    axis: int | None = None
    group_size: int | None = None

    def tensor(
        self, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The same numbers in every dtype; where `make` takes a view, it is one on the device."""

        # a change of dtype or device keeps no gaps: it is done before the view is taken
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, dtype)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(randn)


def special_values() -> Tensor:
    """Ties, range ends, zeros, denormals, huge values, infinities and NaN for scale 0.5 or so."""
    ties = (torch.arange(-41, 42, dtype=torch.float32) / 4.0).tolist()
    rest = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.2e-38, 3e38, -3e38, 1e30, -1e30, 65504.0]
    return torch.tensor(
        [*ties, *rest, float("inf"), -float("inf"), float("nan"), 127.49999, 8388609.0]
    )


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


# names say what could go wrong: block ends, short and long inner, order of memory, views
CASES = (
    Case("zero_dim", lambda r: r()),
    Case("one_element", lambda r: r(1)),
    Case("flat_odd", lambda r: r(1037)),
    Case("flat_views_every_third", lambda r: r(600)[::3]),
    Case("rows", lambda r: r(5, 77), axis=0),
    Case("rows_aligned", lambda r: r(6, 64), axis=0),
    Case("columns", lambda r: r(33, 20), axis=1),
    Case("conv_weight", lambda r: r(10, 3, 3, 3), axis=0),
    Case("conv_weight_axis1", lambda r: r(4, 6, 3, 3), axis=1),
    Case("middle_axis", lambda r: r(3, 5, 7), axis=1),
    Case("middle_axis_long", lambda r: r(2, 3, 600), axis=1),
    Case("channels_last", lambda r: channels_last(r(2, 16, 5, 3)), axis=1),
    Case("channels_last_axis0", lambda r: channels_last(r(4, 6, 3, 5)), axis=0),
    Case("channels_last_tensor", lambda r: channels_last(r(2, 7, 5, 3))),
    Case("transposed", lambda r: r(30, 14).t(), axis=0),
    Case("sliced", lambda r: r(10, 20)[::2, 1::3], axis=1),
    Case("expanded", lambda r: r(1, 9).expand(4, 9), axis=1),
    Case("unaligned", lambda r: r(1 + 4 * 40)[1:].view(4, 40), axis=0),
    Case("groups", lambda r: r(4, 96), group_size=32),
    Case("groups_odd", lambda r: r(6, 15), group_size=5),
    Case("groups_channels_last", lambda r: channels_last(r(2, 16, 4, 3)), group_size=12),
    Case("zero_channels", lambda r: r(0, 4), axis=0),
    Case("empty_channels", lambda r: r(4, 0), axis=0),
    Case("empty_flat", lambda r: r(0)),
)

# larger ones, for what happens between blocks, threads and units; not for interpreted rows
LARGE_CASES = (
    Case("large_flat", lambda r: r(300_001)),
    Case("large_rows", lambda r: r(24, 9001), axis=0),
    Case("large_columns", lambda r: r(5000, 48), axis=1),
    Case("large_wide_columns", lambda r: r(1100, 70, 2, 2), axis=1),
    Case("large_channels_last", lambda r: channels_last(r(8, 24, 40, 31)), axis=1),
    Case("large_groups", lambda r: r(64, 4096), group_size=128),
)

# (bits, symmetric, narrow_range)
RANGES = (
    (2, True, False),
    (8, False, False),
    (4, True, True),
    (1, False, False),
    (16, False, False),
)
RANGE_IDS = ["s2", "u8", "s4narrow", "u1", "u16"]


def params_for(x: Tensor, case: Case, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """A plain scale and an int32 zero point that clip some elements on both sides."""
    shape: tuple[int, ...] = ()
    if case.axis is not None:
        shape = (x.shape[case.axis],)
    elif case.group_size is not None:
        shape = (x.numel() // case.group_size,)
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(len(shape) + qmax)
    spread = torch.rand(shape, generator=generator).to(compute)
    scale = (1.0 + spread) * 3.0 / (qmax - qmin)
    middle = (qmin + qmax + 1) // 2
    zp = middle + torch.randint(-1, 2, shape, generator=generator, dtype=torch.int32)
    return scale, zp.clamp(qmin, qmax)


def resnet50_weights() -> list[tuple[int, ...]]:
    """Shapes of the 54 convolution and linear weights of a ResNet-50."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, channels)]


def resnet18_weights() -> list[tuple[int, ...]]:
    """Shapes of the 21 convolution and linear weights of a ResNet-18."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width in (64, 128, 256, 512):
        shapes += [(width, channels, 3, 3), *3 * [(width, width, 3, 3)]]
        if width != channels:
            shapes.append((width, channels, 1, 1))
        channels = width
    return [*shapes, (1000, channels)]


# what the benchmarks sweep: 1 Ki to 64 Mi elements, and an activation in both memory formats;
# axis is where the channels are when a scale is per channel
BENCH_CASES = (
    Case("1Ki", lambda r: r(8, 128), axis=0),
    Case("64Ki", lambda r: r(64, 1024), axis=0),
    Case("2Mi", lambda r: r(512, 4096), axis=0),
    Case("64Mi", lambda r: r(8192, 8192), axis=0),
    Case("activation", lambda r: r(32, 64, 56, 56), axis=1),
    Case("activation_nhwc", lambda r: channels_last(r(32, 64, 56, 56)), axis=1),
)
