"""Outputs inside larger buffers: a kernel that writes outside its output is caught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

EDGE = 64  # elements on each side; one more for outputs aligned to no more than their dtype


class Fences:
    """Replaces the allocations that rows make and checks the edges afterwards."""

    def __init__(self, aligned: bool) -> None:
        self.edge = EDGE if aligned else EDGE + 1
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def allocate(self, shape: Any, stride: Any, dtype: torch.dtype, device: Any) -> Tensor:
        numel = torch.Size(shape).numel()
        size = numel + 2 * self.edge
        nbytes = size * dtype.itemsize
        raw = torch.full((nbytes,), 0x7B, dtype=torch.uint8, device=device)
        buffer = raw.view(dtype)
        inner = buffer[self.edge : self.edge + numel]
        if dtype.is_floating_point:
            inner.fill_(float("nan"))  # what a kernel forgets to write shows
        self.buffers.append((raw, inner))
        return buffer.as_strided(shape, stride, self.edge)

    def check(self) -> None:
        for raw, inner in self.buffers:
            edge = self.edge * inner.element_size()
            outside = torch.cat((raw[:edge], raw[raw.numel() - edge :]))
            assert bool((outside == 0x7B).all()), "a kernel wrote outside its output"


def contiguous_stride(shape: Any) -> tuple[int, ...]:
    stride, step = [], 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


@contextmanager
def fenced(aligned: bool = False) -> Iterator[Fences]:
    """Inside, torch.empty, torch.empty_like and Tensor.new_empty allocate between fences."""
    fences = Fences(aligned)
    empty_like, plain_empty = torch.empty_like, torch.empty

    def like(x: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        real = empty_like(x, dtype=dtype or x.dtype, **kwargs)
        return fences.allocate(real.shape, real.stride(), real.dtype, real.device)

    def empty(
        *shape: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any
    ) -> Tensor:
        if rest.get("pin_memory"):  # no output: the host's side of a table, which may outlive us
            return plain_empty(*shape, dtype=dtype, device=device, **rest)
        sizes = shape[0] if shape and not isinstance(shape[0], int) else shape
        return fences.allocate(
            tuple(sizes), contiguous_stride(tuple(sizes)), dtype or torch.float32, device
        )

    def new_empty(x: Tensor, *shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(*shape, dtype=dtype or x.dtype, device=x.device)

    with (
        mock.patch.object(torch, "empty_like", like),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield fences
    fences.check()
