"""Lists: the weights of a ResNet-50 (the bars) and of a ResNet-18 (every op), per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import resnet18_weights, resnet50_weights
from compare import assert_same
from harness.clocks import read_ledger
from harness.parity import assert_draws, assert_rival, assert_statistics
from harness.record import Work
from harness.rivals import composite, copies
from harness.sweep import Options, column
from harness.timing import Bar, race
from torch import Tensor

import qkernels
from qkernels import foreach

pytestmark = pytest.mark.benchmark(timer=read_ledger)

KW: dict[str, Any] = dict(bits=4, axis=0, symmetric=True)


def work_of_list(
    xs: list[Tensor], op: str, ideal: int, formula: str, suite: str, row: str = "native"
) -> Work:
    numel = sum(x.numel() for x in xs)
    dtype = str(xs[0].dtype).removeprefix("torch.")
    device, size = xs[0].device.type, f"{len(xs)} weights"
    return Work(
        f"foreach.{op}", row, "channel (axis 0)", dtype, (len(xs), numel), "list", device,
        ideal, formula, ideal, suite, size, numel,
    )  # fmt: skip


@pytest.mark.bar
def bench_foreach_fake_quant_bar(benchmark: Any) -> None:
    weights = [torch.randn(shape) for shape in resnet50_weights()]
    scales = [r.scale for r in foreach.quant_range(weights, **KW)]
    numel = sum(w.numel() for w in weights)
    one = torch.randn(numel // 512, 512)  # as many elements, with a channel of 512
    scale = qkernels.quant_range(one, **KW).scale

    def loop() -> Any:
        return [qkernels.fake_quant(w, s, **KW) for w, s in zip(weights, scales, strict=True)]

    ours = foreach.fake_quant(weights, scales, **KW)
    for got, want in zip(ours, loop(), strict=True):
        assert_same(got, want)
    assert_same(ours[7], qkernels.fake_quant(weights[7], scales[7], **KW, backend="reference"))
    del ours
    out, ideal = torch.empty_like(one), 2 * numel * 4
    race(
        benchmark,
        lambda: foreach.fake_quant(weights, scales, **KW),
        {
            "copy": lambda: out.copy_(one),
            "one tensor of the same size, ours": lambda: qkernels.fake_quant(one, scale, **KW),
            "54 calls of ours": loop,
        },
        bars=(Bar("one tensor of the same size, ours", 1 / 1.15),),
        work=work_of_list(weights, "fake_quant", ideal, "read x, write y: 2 N s", "bar"),
        rounds=5,
    )


@pytest.mark.bar
def bench_foreach_differential_noise_bar(benchmark: Any) -> None:
    weights = [torch.randn(shape) for shape in resnet50_weights()]
    stats = foreach.error_stats(weights, **KW)
    seeds = list(range(len(weights)))
    numel = sum(w.numel() for w in weights)
    one = torch.randn(numel // 512, 512)

    def loop() -> Any:
        return [
            qkernels.differential_noise(w, s, seed=i, step=2)
            for w, s, i in zip(weights, stats, seeds, strict=True)
        ]

    ours = foreach.differential_noise(weights, stats, seed=seeds, step=2)
    for got, want in zip(ours, loop(), strict=True):
        assert_same(got, want)
    del ours
    whole = dict(seed=1, step=2, axis=None)
    formula = "read x, write y: 2 N s"
    race(
        benchmark,
        lambda: foreach.differential_noise(weights, stats, seed=seeds, step=2),
        {
            "one tensor of the same size, ours": lambda: qkernels.differential_noise(
                one, (0.0, 0.1), **whole
            ),
            "54 calls of ours": loop,
        },
        work=work_of_list(weights, "differential_noise", 8 * numel, formula, "bar"),
        rounds=2,
    )


@pytest.mark.bar
def bench_foreach_in_place_bar(benchmark: Any) -> None:
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

    formula = "read x, write x: 2 N s"
    race(
        benchmark,
        lambda: foreach.uniform_noise(weights, scale, seed=seeds, step=2, inplace=True),
        {
            "one tensor of the same size, ours": lambda: qkernels.uniform_noise(
                one, scale, seed=1, step=2, inplace=True
            ),
            "54 calls of ours": loop,
        },
        work=work_of_list(weights, "uniform_noise in place", 8 * one.numel(), formula, "bar"),
        rounds=5,
    )


class Lists:
    """A ResNet-18's weights, and the calls of every op on them: `many(xs, backend)` and, for the
    loop, `single(x, i, backend)`."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.xs = [torch.randn(s).to(device, dtype) for s in resnet18_weights()]
        self.plain = self.xs  # of the rivals, which need no gradient for the same work
        self.scales = [r.scale for r in foreach.quant_range(self.xs, **KW)]
        stats = foreach.error_stats(self.xs, **KW)
        self.stats = [(s.mean, s.std) for s in stats]
        self.seeds = list(range(len(self.xs)))

    def many(self, op: str, backend: str | None) -> Callable[[], Any]:
        xs, noise = self.xs, dict(seed=self.seeds, step=2, axis=0, backend=backend)
        return {
            "fake_quant": lambda: foreach.fake_quant(xs, self.scales, **KW, backend=backend),
            "fake_quant_dynamic": lambda: foreach.fake_quant(xs, **KW, backend=backend),
            "quant_range": lambda: foreach.quant_range(xs, **KW, backend=backend),
            "error_stats": lambda: foreach.error_stats(xs, self.scales, **KW, backend=backend),
            "quantize": lambda: foreach.quantize(xs, self.scales, **KW, backend=backend),
            "differential_noise": lambda: foreach.differential_noise(xs, self.stats, **noise),
            "drop_in_noise": lambda: foreach.drop_in_noise(xs, self.stats, p=0.5, **noise),
            "uniform_noise": lambda: foreach.uniform_noise(xs, self.scales, **noise),
        }[op]

    def single(self, op: str, i: int, backend: str | None) -> Any:
        x, scale, noise = self.xs[i], self.scales[i], dict(seed=i, step=2, axis=0, backend=backend)
        return {
            "fake_quant": lambda: qkernels.fake_quant(x, scale, **KW, backend=backend),
            "fake_quant_dynamic": lambda: qkernels.fake_quant(x, **KW, backend=backend),
            "quant_range": lambda: qkernels.quant_range(x, **KW, backend=backend),
            "error_stats": lambda: qkernels.error_stats(x, scale, **KW, backend=backend),
            "quantize": lambda: qkernels.quantize(x, scale, **KW, backend=backend),
            "differential_noise": lambda: qkernels.differential_noise(x, self.stats[i], **noise),
            "drop_in_noise": lambda: qkernels.drop_in_noise(x, self.stats[i], p=0.5, **noise),
            "uniform_noise": lambda: qkernels.uniform_noise(x, scale, **noise),
        }[op]()

    def core(self) -> list[Tensor]:
        """A loop over torch core's op."""
        zps = self._zero_points()
        return [
            torch.fake_quantize_per_channel_affine(x, s, z, 0, -8, 7)
            for x, s, z in zip(self.plain, self.scales, zps, strict=True)
        ]

    def composites(self) -> list[Tensor]:
        """A loop over plain torch."""
        return [
            composite(x, column(s, x, 0), column(z, x, 0), -8, 7)
            for x, s, z in zip(self.plain, self.scales, self._zero_points(), strict=True)
        ]

    def _zero_points(self) -> list[Tensor]:
        if not hasattr(self, "zps"):
            self.zps = [torch.zeros_like(s, dtype=torch.int32) for s in self.scales]
        return self.zps


# op -> (bytes read, bytes written) per element of s bytes, as text and function of s
OPS: dict[str, tuple[str, Callable[[int], int]]] = {
    "fake_quant": ("read x, write y and masks: 2 N s + N/8", lambda s: 2 * s),
    "fake_quant_dynamic": ("read x once, write y: 2 N s", lambda s: 2 * s),
    "quant_range": ("read x once: N s", lambda s: s),
    "error_stats": ("read x once: N s", lambda s: s),
    "quantize": ("read x, write codes of one byte: N s + N", lambda s: s + 1),
    "differential_noise": ("read x, write y: 2 N s", lambda s: 2 * s),
    "drop_in_noise": ("read x, write y: 2 N s", lambda s: 2 * s),
    "uniform_noise": ("read x, write y: 2 N s", lambda s: 2 * s),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.lists
def bench_foreach(benchmark: Any, op: str, dtype: torch.dtype, row: str, options: Options) -> None:
    lists = Lists(dtype, options.device)
    if op == "fake_quant":  # so that the masks are written too
        lists.xs = [x.detach().requires_grad_() for x in lists.xs]
    many = lists.many(op, row)
    check_list(many(), lists, op, row)
    rivals: dict[str, Callable[[], Any]] = {
        f"{len(lists.xs)} calls of ours": lambda: [
            lists.single(op, i, row) for i in range(len(lists.xs))
        ]
    }
    bars: tuple[Bar, ...] = ()
    if op == "fake_quant":
        rivals |= {"loop over torch core": lists.core, "loop of composites": lists.composites}
        for name in ("loop over torch core", "loop of composites"):
            for y, theirs, s in zip(many(), rivals[name](), lists.scales, strict=True):
                assert_rival(y.detach(), theirs, column(s, y, 0), name)
        bars = (Bar("loop over torch core", 5),) if options.device == "cuda" else ()
    formula, per_element = OPS[op]
    numel = sum(x.numel() for x in lists.xs)
    ideal = numel * per_element(lists.xs[0].element_size())
    ideal += numel // 8 if op == "fake_quant" else 0
    race(
        benchmark,
        many,
        {**copies(lists.xs[0], ideal), **rivals},
        bars=bars,
        work=work_of_list(lists.xs, op, ideal, formula, "sweep", row),
    )


def check_list(got: Any, lists: Lists, op: str, row: str) -> None:
    """Every third result is the reference's of that tensor alone (noise: of the small ones)."""
    for i in range(0, len(got), 3):
        if "noise" in op and lists.xs[i].numel() > 1 << 18:
            continue
        want = lists.single(op, i, "reference")
        if op == "error_stats":
            assert_statistics(got[i], want)
        elif isinstance(want, Tensor):
            exact = row != "triton" or op not in ("differential_noise", "drop_in_noise")
            assert_draws(got[i].detach(), want.detach(), exact, op)
        else:
            for a, b in zip(got[i], want, strict=True):
                assert_same(a, b)
