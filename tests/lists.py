"""Lists of tensors of every kind, for the tests of the list forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, DTYPES, LARGE_CASES, RANGES, Case, params_for
from compare import assert_same
from rows import reference
from torch import Tensor

from qkernels import numeric

METHODS = ("minmax", "percentile", "lsq", "mse")


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result or of a list of results."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def assert_all_same(got: Any, want: Any, what: str = "result") -> None:
    for i, (a, b) in enumerate(zip(flat(got), flat(want), strict=True)):
        assert_same(a, b, f"{what}, tensor {i} of the results")


class Sample:
    """One tensor of a list, and how it is quantized."""

    def __init__(self, i: int, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.i, self.case = i, case
        self.x = case.tensor(dtype, seed=i, device=device)
        self.grad = case.tensor(dtype, seed=i + 99, device=device)
        self.bits, self.symmetric, self.narrow = RANGES[i % len(RANGES)]
        self.range = numeric.code_range("test", *RANGES[i % len(RANGES)])
        scale, zp = (p.to(device) for p in params_for(self.x, case, *self.range))
        # integer, absent and real zero points in turn
        self.scale, self.zp = scale / 2, (zp, None, zp.to(scale.dtype) + 0.3)[i % 3]
        self.place = (case.axis, case.group_size)
        self.clip = numeric.CLIPS[i % 2]
        self.method = METHODS[i % 3] if case in LARGE_CASES else METHODS[i % 4]
        self.percentile = 97.3 if self.method == "percentile" else 99.0
        self.pack = self.bits if self.bits in (1, 2, 4) and self.x.dim() and i % 2 else 0


def samples(count: int, large: bool = False, device: str = "cpu") -> list[Sample]:
    """Every shape, layout and granularity, with the dtypes in turn."""
    cases = (*CASES, *LARGE_CASES) if large else CASES
    step = max(len(cases) // count, 1)
    return [
        Sample(i, case, DTYPES[(i // 3) % 4], device)
        for i, case in enumerate(cases)
        if i % step == 0
    ]


def order_of(s: Sample) -> list[int]:
    if s.case.group_size is not None:
        return []
    return numeric.memory_order(torch.empty_like(s.x)) or []


def codes_of(s: Sample) -> Tensor:
    return reference("quantize", s.x, s.scale, s.zp, *s.range, *s.place, s.pack)


def mask_of(s: Sample) -> Tensor:
    generator = torch.Generator().manual_seed(s.i)
    size = (numeric.mask_bytes(s.x.numel()),)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(s.x.device)


# op -> the arguments of a row for a sample
ARGUMENTS: dict[str, Callable[[Sample], tuple[Any, ...]]] = {
    "fake_quant": lambda s: (s.x, s.scale, s.zp, *s.range, *s.place, s.clip, s.i % 3 > 0),
    "fake_quant_bwd": lambda s: (s.grad, mask_of(s), order_of(s)),
    "lsq_bwd": lambda s: (s.grad, s.x, s.scale, s.zp, *s.range, *s.place, s.clip, 0.5),
    "quant_range": lambda s: (s.x, *s.range, *s.place, s.symmetric, s.method, s.percentile),
    "qparams": lambda s: (
        torch.stack((-s.scale, 3 * s.scale), dim=0),
        *s.range,
        s.symmetric,
    ),
    "fake_quant_dynamic": lambda s: (
        s.x,
        *s.range,
        *s.place,
        s.symmetric,
        s.method,
        s.percentile,
        s.clip,
        s.i % 3 > 0,
    ),
    "quantize": lambda s: (s.x, s.scale, s.zp, *s.range, *s.place, s.pack),
    "dequantize": lambda s: (
        codes_of(s),
        s.scale,
        s.zp,
        s.range[0],
        *s.place,
        s.pack,
        s.x.shape[-1] if s.pack else 0,
        s.x.dtype,
    ),
}
