"""Quantization after training, simulated in the middle of it: what errors it would make now."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import qkernels
from qkernels import ErrorStats, foreach
from qkernels.nn import QConfig, QuantLayer, QuantSpec, noise_handles
from qkernels.numeric import LARGEST_SEED

from .data import Batch
from .ptq import quantize_after_training


def quant_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized layers of a prepared model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def without_noise(model: nn.Module) -> nn.Module:
    """The model, its noise taken off in place."""
    for handle in noise_handles(model):
        handle.remove()
    return model


def input_errors(
    model: nn.Module, qconfig: QConfig, batches: Sequence[Batch]
) -> dict[str, tuple[ErrorStats, int]]:
    """Simulated PTQ: statistics of Q(x) - x of each layer's input x, over all batches together.

    The model is copied, its BatchNorm statistics are taken anew from the batches (under noise the
    running ones are not those of the weights), and it is quantized and calibrated on them. Then x
    is what arrives at the layer in the quantized model.

    Returns:
        layer's name -> (statistics, elements per channel); layers that were never called, or whose
        input is not quantized, are absent.
    """
    model = without_noise(copy.deepcopy(model))
    update_bn(batches, model)
    model = quantize_after_training(model, qconfig, batches, fold=False)
    parts: defaultdict[str, list[tuple[ErrorStats, int]]] = defaultdict(list)

    def watch(name: str, quantizer: Any) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # asked here, for a quantizer that was never called has none
            scale, zero_point = quantizer.qparams()
            stats = qkernels.error_stats(args[0], scale, zero_point, **quantizer.spec.options())
            parts[name].append((stats, args[0].numel() // stats.mean.numel()))

        quantizer.register_forward_pre_hook(before)

    for name, layer in quant_layers(model).items():
        if layer.input_fake_quant is not None:
            watch(name, layer.input_fake_quant)
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    return {name: joined(found) for name, found in parts.items()}


def joined(parts: Sequence[tuple[ErrorStats, int]]) -> tuple[ErrorStats, int]:
    """Statistics of several sets of elements together, and how many elements they are."""
    total = sum(count for _, count in parts)

    def average(values: list[Tensor]) -> Tensor:
        pairs = zip(values, parts, strict=True)
        return torch.stack([v.double() * (count / total) for v, (_, count) in pairs]).sum(0)

    mean = average([s.mean for s, _ in parts])
    second = average([s.var.double() + s.mean.double() ** 2 for s, _ in parts])
    square = average([s.mean_square for s, _ in parts])
    clip_rate = average([s.clip_rate for s, _ in parts])
    var = (second - mean * mean).clamp_min(0)
    dtype = parts[0][0].mean.dtype
    return ErrorStats(*(v.to(dtype) for v in (mean, var, square, clip_rate))), total


@torch.no_grad()
def weight_errors(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Q(W) - W, of W's shape, with the range of W at hand. ValueError if the spec is of PACT's or
    DoReFa's kind, whose Q is another."""
    spec.require_plain("weight_errors", "spec")
    return qkernels.fake_quant(weight, **spec.options()) - weight


def discrete_noise(
    weights: Sequence[Tensor],
    errors: Sequence[Tensor],
    errors_before: Sequence[Tensor],
    axes: Sequence[int],
    seeds: Sequence[int],
    step: int,
    ramp: float,
) -> list[Tensor]:
    """Differential noise whose delta is not Gaussian: w + ramp (delta_t - delta_{t-1}), where each
    element of delta is one of the real errors of its channel, drawn with replacement.

    Args:
        weights, errors: of the same shapes, see `weight_errors`.
        errors_before: what delta_{t-1} was drawn from.
        axes: of the channels.
        seeds: a stream for each weight.
    """
    deltas = []
    for at, source in ((step, errors), ((step - 1) & LARGEST_SEED, errors_before)):
        rows = [e.movedim(axis, 0).flatten(1) for e, axis in zip(source, axes, strict=True)]
        # fp32, whatever the weights are: bf16 would round u to a few hundred places
        blank = [torch.zeros_like(row, dtype=torch.float32) for row in rows]
        draws = foreach.uniform_noise(blank, 1.0, seed=list(seeds), step=at)
        # u in (-1/2, 1/2) becomes a place in 0 .. n - 1
        places = [((u + 0.5) * u.shape[1]).long().clamp_(max=u.shape[1] - 1) for u in draws]
        deltas.append([row.gather(1, p) for row, p in zip(rows, places, strict=True)])
    noisy = []
    for w, axis, now, before in zip(weights, axes, *deltas, strict=True):
        noise = (now - before).reshape(w.movedim(axis, 0).shape).movedim(0, axis)
        noisy.append(w + ramp * noise)
    return noisy
