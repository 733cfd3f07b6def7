"""Lists: the 54 convolution and linear weights of a ResNet-50, fp32, per channel, 2 threads."""

from __future__ import annotations

from typing import Any

import torch
from cases import resnet50_weights
from compare import assert_same
from timing import Bar, race

import qkernels
from qkernels import foreach


def bench_foreach_fake_quant(benchmark: Any) -> None:
    weights = [torch.randn(shape) for shape in resnet50_weights()]
    ranges = foreach.quant_range(weights, bits=4, axis=0, symmetric=True)
    scales = [r.scale for r in ranges]
    numel = sum(w.numel() for w in weights)
    one = torch.randn(numel // 512, 512)  # as many elements, with a channel of 512
    scale = qkernels.quant_range(one, bits=4, axis=0, symmetric=True).scale
    kw: dict[str, Any] = dict(bits=4, axis=0, symmetric=True)

    def loop() -> Any:
        return [qkernels.fake_quant(w, s, **kw) for w, s in zip(weights, scales, strict=True)]

    ours = foreach.fake_quant(weights, scales, **kw)
    for got, want in zip(ours, loop(), strict=True):
        assert_same(got, want)
    assert_same(ours[7], qkernels.fake_quant(weights[7], scales[7], **kw, backend="reference"))
    del ours
    out = torch.empty_like(one)
    race(
        benchmark,
        lambda: foreach.fake_quant(weights, scales, **kw),
        {
            "copy": lambda: out.copy_(one),
            "one tensor of the same size": lambda: qkernels.fake_quant(one, scale, **kw),
            "54 calls": loop,
        },
        bars=(Bar("one tensor of the same size", 1 / 1.15),),
        ideal_bytes=2 * numel * 4,
        copy_bytes=2 * numel * 4,
        rounds=5,
    )


def bench_foreach_differential_noise(benchmark: Any) -> None:
    weights = [torch.randn(shape) for shape in resnet50_weights()]
    stats = foreach.error_stats(weights, bits=4, axis=0, symmetric=True)
    seeds = list(range(len(weights)))
    numel = sum(w.numel() for w in weights)
    one = torch.randn(numel // 512, 512)

    def loop() -> Any:
        return [
            qkernels.differential_noise(w, s, seed=i, step=2)
            for w, s, i in zip(weights, stats, seeds, strict=True)
        ]

    for got, want in zip(
        foreach.differential_noise(weights, stats, seed=seeds, step=2), loop(), strict=True
    ):
        assert_same(got, want)
    race(
        benchmark,
        lambda: foreach.differential_noise(weights, stats, seed=seeds, step=2),
        {
            "one tensor of the same size": lambda: qkernels.differential_noise(
                one, (0.0, 0.1), seed=1, step=2, axis=None
            ),
            "54 calls": loop,
        },
        rounds=2,
    )


def bench_foreach_in_place(benchmark: Any) -> None:
    """Without results there is no memory to allocate, which for one large tensor is fresh from the
    system in every call, and for small ones is what they freed before."""
    weights = [torch.randn(shape) for shape in resnet50_weights()]
    seeds = list(range(len(weights)))
    one = torch.randn(sum(w.numel() for w in weights) // 512, 512)
    scale = torch.tensor(0.1)
    some = [w.clone() for w in weights[:9]]
    foreach.uniform_noise(some, scale, seed=seeds[:9], step=2, inplace=True)
    for got, w, i in zip(some, weights, seeds, strict=False):
        assert_same(got, qkernels.uniform_noise(w, scale, seed=i, step=2, backend="reference"))

    def loop() -> None:
        for w, i in zip(weights, seeds, strict=True):
            qkernels.uniform_noise(w, scale, seed=i, step=2, inplace=True)

    race(
        benchmark,
        lambda: foreach.uniform_noise(weights, scale, seed=seeds, step=2, inplace=True),
        {
            "one tensor of the same size": lambda: qkernels.uniform_noise(
                one, scale, seed=1, step=2, inplace=True
            ),
            "54 calls": loop,
        },
        rounds=5,
    )
