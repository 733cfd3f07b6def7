"""GHN-QAT's inner loop at the digits preset: the weights of a meta-batch of 8 networks in one call,
and what share of a training step the prediction takes, by encoder.

The networks are predicted once; their weights and a step's parts are what a run meets.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from harness.clocks import clock_for, read_ledger
from harness.parity import assert_rival
from harness.record import Work
from harness.rivals import ste_composite
from harness.timing import Bar, race
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import qkernels
from qkernels import foreach

qtrain = pytest.importorskip("qtrain", reason="the trainers are not installed: .[train]")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's: .[train]")

pytestmark = [pytest.mark.benchmark(timer=read_ledger), pytest.mark.bar]

KW: dict[str, Any] = dict(bits=4, axis=0, symmetric=True)
ENCODERS = {
    "graphormer, tiled": {},
    "gated, tiled": {"encoder": "gated"},
    "graphormer, low rank": {"head": "low_rank", "rank": 16},
}


class Steps:
    """Training steps of a GHN over networks that are all prepared already."""

    def __init__(self, **options: Any) -> None:
        from qtrain.data import load_dataset, train_batches
        from qtrain.ghn.quantizers import Quantizer
        from qtrain.ghn.run import settings_for
        from qtrain.ghn.train import GhnRecipe
        from qtrain.loop import train_step
        from qtrain.recipe import make_optimizer

        how = {"quantizer": Quantizer("sim"), "bits": (4,), "nets": 16}
        config, training = settings_for("digits", ghn=options, training=how)
        data = load_dataset("digits")
        self.recipe = GhnRecipe(training)
        self.recipe.bind(config, data)
        self.model = self.recipe.build(config, data)
        groups = self.recipe.param_groups(self.model, config)
        self.optimizer = make_optimizer(groups, config)
        self.batches = list(train_batches(data.train, config.batch_size, seed=0, epoch=0))
        self.number = 0
        self.train_step = train_step
        for step in range(8):  # all networks come up
            self.predict(step)

    def predict(self, step: int | None = None) -> list[dict[str, Tensor]]:
        """The forward of the GHN in a step."""
        nets = [net for _, net, _ in self.recipe.draw(self.number if step is None else step)]
        return self.model([n.graph for n in nets], skeletons=[n.skeleton for n in nets])

    def step(self) -> None:
        self.number += 1
        batch = self.batches[self.number % len(self.batches)]
        clip = lambda: clip_grad_norm_(self.model.parameters(), 5.0)  # noqa: E731
        self.train_step(self.model, batch, self.number, self.recipe, self.optimizer, clip=clip)


def meta_batch_weights() -> list[Tensor]:
    """Of the layers of 8 networks, as leaves."""
    steps = Steps()
    chosen = steps.recipe.draw(0)
    with torch.no_grad():
        predicted = steps.predict(0)
    return [
        weights[f"{layer}.weight"].contiguous().requires_grad_()
        for (_, _, widths), weights in zip(chosen, predicted, strict=True)
        for layer in widths
    ]


def eager(w: Tensor) -> Tensor:
    """SimQuant of a weight as one writes it in plain torch: symmetric per channel, min-max."""
    rows = w.detach().flatten(1).abs().amax(1)
    scale = (rows / 7.5).reshape(-1, *(1 for _ in w.shape[1:]))
    return ste_composite(w, scale, torch.zeros((), dtype=scale.dtype), -8, 7)


class FromLoss(torch.autograd.Function):
    """A loss of many tensors: 0, with a given gradient for each."""

    @staticmethod
    def forward(ctx: Any, upstream: list[Tensor], *ys: Tensor) -> Tensor:
        ctx.upstream = upstream
        return ys[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.upstream


class Same(torch.autograd.Function):
    """New memory for each tensor and nothing in it, and the gradient as it came: what a Function of
    a list costs in torch itself."""

    @staticmethod
    def forward(ctx: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


@pytest.mark.parametrize("part", ["forward", "forward + backward"])
def bench_ghn_fake_quant(benchmark: Any, part: str) -> None:
    weights = meta_batch_weights()
    ours = foreach.fake_quant(weights, **KW)
    ranges = foreach.quant_range([w.detach() for w in weights], **KW)
    for w, y, found in zip(weights, ours, ranges, strict=True):
        scale = found.scale.reshape(-1, *(1 for _ in w.shape[1:]))
        assert_rival(y.detach(), eager(w).detach(), scale, "eager")
    upstream = [torch.randn_like(w) for w in weights]
    gradients = torch.autograd.grad(ours, weights, upstream)
    theirs = torch.autograd.grad([eager(w) for w in weights], weights, upstream)
    assert all(torch.equal(g, other) for g, other in zip(gradients, theirs, strict=True))

    def timed(quantize: Any) -> Any:
        if part == "forward":  # with what the backward needs
            return quantize
        return lambda: torch.autograd.grad(FromLoss.apply(upstream, *quantize()), weights)

    numel = sum(w.numel() for w in weights)
    moved, how = (8, "2 N s") if part == "forward" else (16, "2 N s, and of the gradient: 4 N s")
    work = Work(
        f"foreach.fake_quant, {part}", "native", "channel (axis 0)", "float32",
        (len(weights), numel), "list", "cpu", moved * numel, f"read x, write y: {how}",
        8 * numel, "bar", f"{len(weights)} weights of 8 networks", numel,
    )  # fmt: skip
    race(
        benchmark,
        timed(lambda: foreach.fake_quant(weights, **KW)),
        {
            "loop of eager fake quant": timed(lambda: [eager(w) for w in weights]),
            "loop of ours": timed(lambda: [qkernels.fake_quant(w, **KW) for w in weights]),
        },
        bars=(Bar("loop of eager fake quant", 5.0),),
        work=work,
        rounds=3,
    )
    if not benchmark.disabled:
        floor = statistics.median(clock_for("cpu").times(timed(lambda: Same.apply(*weights)), 20))
        what = "us, an autograd Function of the list that computes nothing"
        benchmark.extra_info["figures"] = {what: round(1e6 * floor)}


@pytest.mark.parametrize("encoder", ENCODERS)
def bench_ghn_step(benchmark: Any, encoder: str) -> None:
    """The prediction against the whole step: a bar of 15 % is one of 6.67 times as fast."""
    steps = Steps(**ENCODERS[encoder])
    first = {name: p.detach().clone() for name, p in steps.model.named_parameters()}
    steps.step()
    moved = [n for n, p in steps.model.named_parameters() if not torch.equal(p, first[n])]
    assert steps.recipe.skipped == 0 and len(moved) > 0.9 * len(first), "the step does not train"
    bars = (Bar("whole step", 1 / 0.15),) if encoder == "graphormer, tiled" else ()
    predicted = sum(w.numel() for weights in steps.predict() for w in weights.values())
    moved_bytes = 4 * (predicted + sum(p.numel() for p in steps.model.parameters()))
    work = Work(
        "ghn_predict", "qtrain", encoder, "float32", (8, predicted), "list", "cpu", moved_bytes,
        "read the GHN, write the weights: 4 (P + N)", moved_bytes, "bar", "8 networks", predicted,
    )  # fmt: skip
    race(benchmark, steps.predict, {"whole step": steps.step}, bars=bars, work=work, memory=False)
    seconds = benchmark.extra_info.get("rivals_us", {}).get("whole step", 0.0) / 1e6
    asked = f" (asked at most 0.5: {'met' if seconds <= 0.5 else 'MISSED'})" if bars else ""
    benchmark.extra_info["figures"] = {f"s, training step{asked}": round(seconds, 3)}
