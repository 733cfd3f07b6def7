"""Noise ops: fp32, 512 x 4608, per channel, 2 threads; what each allocates and saves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import assert_same
from rivals import compiled
from timing import Bar, race
from torch import Tensor

import qkernels

SHAPE = (512, 4608)
BYTES = SHAPE[0] * SHAPE[1] * 4
RAMP, P = 0.7, 0.5


def eager_differential(
    w: Tensor, mean: Tensor, std: Tensor, prev_mean: Tensor, prev_std: Tensor
) -> Tensor:
    """As one writes it by hand: two draws, scaled, shifted, subtracted, added."""
    now = torch.randn_like(w) * std + mean
    before = torch.randn_like(w) * prev_std + prev_mean
    return w + RAMP * (now - before)


def eager_drop_in(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """As one writes it by hand."""
    gate = torch.rand_like(x) < P
    return x + RAMP * gate * (torch.randn_like(x) * std + mean)


def eager_uniform(x: Tensor, scale: Tensor) -> Tensor:
    """As one writes it by hand."""
    return x + (torch.rand_like(x) - 0.5) * scale


class Inputs:
    """A tensor, statistics of its 4-bit error, and those of a step before."""

    def __init__(self) -> None:
        self.x = torch.randn(SHAPE)
        stats = qkernels.error_stats(self.x, bits=4, axis=0)
        self.stats = (stats.mean, stats.std)
        self.previous = (stats.mean * 1.1, stats.std * 0.9)
        self.scale = qkernels.quant_range(self.x, bits=4, axis=0).scale

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(p[:, None] for p in (*self.stats, *self.previous))


def noise_race(
    benchmark: Any, x: Tensor, ours: Callable[..., Tensor], eager: Callable[[], Tensor], bar: float
) -> None:
    assert_same(ours(x), ours(x, backend="reference"))
    by_compiler = compiled(eager)
    # another generator: only the size of the noise can be compared
    torch.testing.assert_close((eager() - x).std(), (ours(x) - x).std(), rtol=0.01, atol=0)
    out, own = torch.empty_like(x), x.clone()
    race(
        benchmark,
        lambda: ours(x),
        {
            "copy": lambda: out.copy_(x),
            "eager": eager,
            "torch.compile": by_compiler,
            "ours in place": lambda: ours(own, inplace=True),
        },
        bars=(Bar("eager", bar), Bar("torch.compile", 1)),
        ideal_bytes=2 * BYTES,
        copy_bytes=2 * BYTES,
        rounds=5,
    )


def bench_differential_noise(benchmark: Any) -> None:
    i = Inputs()
    ours = partial(
        qkernels.differential_noise,
        stats=i.stats,
        prev_stats=i.previous,
        seed=1,
        step=2,
        ramp=RAMP,
    )
    columns = i.columns()
    noise_race(benchmark, i.x, ours, lambda: eager_differential(i.x, *columns), 10)


def bench_drop_in_noise(benchmark: Any) -> None:
    i = Inputs()
    ours = partial(qkernels.drop_in_noise, stats=i.stats, p=P, seed=1, step=2, ramp=RAMP, axis=0)
    mean, std, _, _ = i.columns()
    noise_race(benchmark, i.x, ours, lambda: eager_drop_in(i.x, mean, std), 5)


def bench_uniform_noise(benchmark: Any) -> None:
    i = Inputs()
    ours = partial(qkernels.uniform_noise, scale=i.scale, seed=1, step=2, axis=0)
    column = i.scale[:, None]
    noise_race(benchmark, i.x, ours, lambda: eager_uniform(i.x, column), 5)


@pytest.mark.parametrize("order", ("nchw", "channels_last"))
def bench_activation(benchmark: Any, order: str) -> None:
    """drop_in_noise of an activation (32, 64, 56, 56), one std for the tensor."""
    x = torch.randn(32, 64, 56, 56)
    x = x.to(memory_format=torch.channels_last) if order == "channels_last" else x
    ours = partial(qkernels.drop_in_noise, stats=(0.0, 0.1), p=P, seed=1, step=2)
    assert_same(ours(x), ours(x, backend="reference"))
    out, std = torch.empty_like(x), torch.tensor(0.1)
    race(
        benchmark,
        lambda: ours(x),
        {
            "copy": lambda: out.copy_(x),
            "eager": lambda: eager_drop_in(x, torch.tensor(0.0), std),
        },
        ideal_bytes=2 * x.numel() * 4,
        copy_bytes=2 * x.numel() * 4,
        rounds=2,
    )


def bench_memory(benchmark: Any) -> None:
    """Bytes that a call allocates beside its result, and that it saves for the backward."""
    i = Inputs()
    x = i.x.requires_grad_()
    calls = {
        "differential_noise": lambda: qkernels.differential_noise(x, i.stats, seed=1, step=2),
        "drop_in_noise": lambda: qkernels.drop_in_noise(x, i.stats, p=P, seed=1, step=2, axis=0),
        "uniform_noise": lambda: qkernels.uniform_noise(x, i.scale, seed=1, step=2, axis=0),
    }
    figures = {}
    for name, call in calls.items():
        saved: list[int] = []

        def pack(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        with torch.profiler.profile(profile_memory=True) as profile:
            results = [call()]
        taken = sum(e.self_cpu_memory_usage for e in profile.events()) - x.numel() * 4
        results.clear()
        figures[f"{name}: bytes saved for backward"] = str(sum(saved))
        figures[f"{name}: bytes allocated beside the result"] = str(taken)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["figures"] = figures
