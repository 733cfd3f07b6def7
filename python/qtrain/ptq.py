"""Post-training quantization (PTQ): a float model, ranges from a few batches, no training.

Weights are symmetric per output channel, layer inputs affine per tensor, each with a range by
minmax, percentile or mse that is taken once and kept. Biases stay float, bit for bit (folding
BatchNorm changes them, or gives a layer one). The first and the last layer get at least 8 bits
unless told otherwise. Weights are rounded to nearest, or as AdaRound learns to (`qtrain.adaround`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from qkernels.nn import QConfig, QuantSpec, calibrate, fold_batchnorm, prepare

from .adaround import AdaRound, Rounded, learn_rounding
from .data import Batch, Dataset, Split
from .loop import evaluate
from .progress import Track
from .recipe import TrainConfig
from .report import Row
from .seeds import generator

METHODS = ("minmax", "percentile", "mse")
ROUNDINGS = ("nearest", "adaround")

Rounding: TypeAlias = str | AdaRound
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def ptq_qconfig(
    method: str,
    weight_bits: int | None,
    activation_bits: int | None,
    *,
    weight_method: str | None = None,
    activation_method: str | None = None,
    percentile: float | None = None,
    first_last_bits: int | None = 8,
    per_tensor: bool = False,
) -> QConfig:
    """Weights symmetric per channel, activations affine per tensor, with ranges that are kept.

    Args:
        method: of both ranges: minmax, percentile or mse; see `qkernels.quant_range`.
        weight_bits, activation_bits: 1 .. 16; None: not quantized.
        weight_method, activation_method: instead of ``method``, for one of the two.
        percentile: for the ranges by percentile: in (50, 100]; None: qkernels' default.
        first_last_bits: the first and last layer get at least so many; None: as the others.
        per_tensor: one scale for each weight, and not one for each of its output channels.

    Raises:
        ValueError: unknown method; bits or percentile out of range; a percentile without use.
    """
    base = QConfig.minmax(weight_bits, activation_bits, first_last_bits=first_last_bits)
    chosen = {"weight": weight_method, "activation": activation_method}
    sides = {side: method if own is None else own for side, own in chosen.items()}
    for name, value in (("method", method), *((f"{k}_method", v) for k, v in sides.items())):
        if value not in METHODS:
            raise ValueError(f"ptq: {name} must be one of {', '.join(METHODS)}, got {value!r}")
    if percentile is not None and "percentile" not in sides.values():
        raise ValueError(
            f"ptq: percentile must be None unless a method is percentile, got {percentile}"
        )

    def ranged(spec: QuantSpec | None, side: str) -> QuantSpec | None:
        share = percentile if sides[side] == "percentile" else None
        return spec and replace(spec, method=sides[side], percentile=share)

    weight = ranged(base.weight, "weight")
    if per_tensor and weight is not None:
        weight = replace(weight, axis=None)
    activation = ranged(base.activation, "activation")
    return keep_weight_ranges(replace(base, weight=weight, activation=activation))


def keep_weight_ranges(qconfig: QConfig) -> QConfig:
    """The config, with ranges of weights that are kept where they would be taken anew in every
    forward: the same values until the weight changes."""

    def kept(spec: QuantSpec | None) -> QuantSpec | None:
        if spec is None or not spec.dynamic:
            return spec
        # LSQ's rule gives a scale and no range
        return replace(spec, learned=True) if spec.method == "lsq" else replace(spec, ema=0.0)

    overrides = {k: v and keep_weight_ranges(v) for k, v in qconfig.overrides.items()}
    return replace(qconfig, weight=kept(qconfig.weight), overrides=overrides)


def as_rounding(rounding: Rounding) -> AdaRound | None:
    """AdaRound's settings, or None for rounding to nearest.

    Raises:
        ValueError: neither "nearest" nor "adaround" nor an AdaRound.
    """
    if isinstance(rounding, AdaRound):
        return rounding
    if rounding not in ROUNDINGS:
        raise ValueError(f"ptq: rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    return AdaRound() if rounding == "adaround" else None


def calibration_images(
    data: Dataset, config: TrainConfig, count: int, batch_size: int | None = None
) -> list[Batch]:
    """``count`` random training images, named by the config's seed; the same on every rank.

    Args:
        batch_size: images in a batch at most (a single one left over joins the batch before);
            None: the config's. The first images of a larger ``count`` are those of a smaller one.

    Raises:
        ValueError: not that many training images; ``count`` or ``batch_size`` below 1.
    """
    have = len(data.train)
    size = config.batch_size if batch_size is None else batch_size
    for name, value in (("images", count), ("batch_size", size)):
        if value < 1:
            raise ValueError(f"calibration: {name} must be at least 1, got {value}")
    if count > have:
        raise ValueError(
            f"calibration: images must be at most the {have} training examples, got {count}"
        )
    order = torch.randperm(have, generator=generator(config.seed, 0, "calibration"))
    chunks = list(order[:count].split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        # BatchNorm in training mode has no statistics of one image
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return list(data.train.read(chunks, seed=config.seed, epoch=0, workers=0))


def quantize_after_training(
    model: nn.Module,
    qconfig: QConfig,
    batches: Sequence[Any],
    *,
    fold: bool = True,
    rounding: Rounding = "nearest",
    seed: int = 0,
    track: Track | None = None,
) -> nn.Module:
    """A calibrated copy of a float model, in eval mode.

    Args:
        model: not changed.
        qconfig: with AdaRound, ranges of weights are kept even where it says they are dynamic.
        batches: x, or tuples that start with x: what the ranges of activations are taken from, and
            what AdaRound learns from.
        fold: fold BatchNorm into the layers first, as a deployed model has it.
        rounding: of weights: "nearest", "adaround", or AdaRound's settings.
        seed: of AdaRound's minibatches.
        track: a progress bar for AdaRound, see `qtrain.adaround.learn_rounding`.

    Raises:
        ValueError: the model cannot be folded or quantized; unknown rounding; no batches.
    """
    return quantize(model, qconfig, batches, fold=fold, rounding=rounding, seed=seed, track=track)[
        0
    ]


def quantize(
    model: nn.Module,
    qconfig: QConfig,
    batches: Sequence[Any],
    *,
    fold: bool,
    rounding: Rounding,
    seed: int,
    track: Track | None,
) -> tuple[nn.Module, list[Rounded]]:
    """`quantize_after_training`, and what AdaRound did to each layer."""
    settings = as_rounding(rounding)
    base = fold_batchnorm(model) if fold else model
    if settings is None:
        quantized = prepare(base, qconfig).eval()
        calibrate(quantized, batches)
        return quantized, []
    quantized = prepare(base, keep_weight_ranges(qconfig)).eval()
    calibrate(quantized, batches)
    return quantized, learn_rounding(base, quantized, batches, settings, seed=seed, track=track)


def row_name(qconfig: QConfig, *, fold: bool = True, rounding: Rounding = "nearest") -> str:
    """What a table calls it: "PTQ minmax", "AdaRound mse, per tensor", "PTQ mse/minmax, unfolded".
    Unless it says so, scales of weights are per channel."""
    specs = (qconfig.weight, qconfig.activation)
    methods = list(dict.fromkeys(spec.method for spec in specs if spec is not None))
    how = "PTQ" if as_rounding(rounding) is None else "AdaRound"
    coarse = qconfig.weight is not None and not qconfig.weight.per_channel
    notes = [", per tensor"] * coarse + [", unfolded"] * (not fold)
    return f"{how} {'/'.join(methods)}{''.join(notes)}"


class Within(Track):
    """Progress of a part, shown as the note of the whole's bar."""

    def __init__(self, whole: Track) -> None:
        super().__init__(0, "", quiet=True)
        self.whole = whole

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.whole.advance(0, f"{self.label}, {self.done} steps")


def sweep(
    model: nn.Module,
    evaluation: Split | Evaluate,
    batches: Sequence[Any],
    *,
    bits: Sequence[tuple[int, int]] = ((8, 8), (4, 4), (3, 3), (2, 2)),
    methods: Sequence[str] = METHODS,
    folds: Sequence[bool] = (True, False),
    adaround: AdaRound | None = None,
    first_last_bits: int | None = 8,
    percentile: float = 99.9,
    per_tensor: bool = False,
    seed: int = 0,
    track: Track | None = None,
) -> list[Row]:
    """Evaluate a float model after PTQ in every combination of bits, range method and folding.

    Args:
        model: not changed.
        evaluation: the split to evaluate on; or called with a model, to give a mapping with
            "test_loss" and "test_accuracy".
        batches: see `quantize_after_training`.
        bits: of (weights, activations).
        adaround: its settings, to do it too, once for each of ``bits``: ranges by mse, folded (if
            ``folds`` has it); None: not.
        per_tensor: see `ptq_qconfig`.
        percentile: for that method. On our nets for the digits 99.9 did better than 99 and 99.99.
        seed: of AdaRound.
        track: a progress bar to advance by 1 for each model evaluated; None: one of our own.

    Returns:
        The rows, by bits, named as `row_name` does.

    Raises:
        ValueError: unknown method; bits or percentile out of range; the model cannot be folded.
    """
    if not folds:
        raise ValueError("ptq: folds must be True, False or both, got none")
    ways: list[tuple[str, bool, Rounding]] = [(m, f, "nearest") for f in folds for m in methods]
    if adaround is not None:
        ways.append(("mse", True in folds, adaround))
    shared: dict[str, Any] = {
        "percentile": percentile,
        "first_last_bits": first_last_bits,
        "per_tensor": per_tensor,
    }
    configs = [_qconfigs(method, bits, **shared) for method, _, _ in ways]
    bases = {fold: fold_batchnorm(model) if fold else model for fold in folds}
    score = evaluation if callable(evaluation) else partial(evaluate, split=evaluation)
    table: list[list[Row]] = [[] for _ in bits]
    ours = Track(len(bits) * len(ways), "PTQ")
    with ours if track is None else nullcontext(track) as bar:
        for (_, fold, rounding), qconfigs in zip(ways, configs, strict=True):
            name = row_name(qconfigs[0], fold=fold, rounding=rounding)
            bar.relabel(name)
            models = _in_each(bases[fold], qconfigs, batches, rounding, seed, Within(bar))
            for pair, rows, quantized in zip(bits, table, models, strict=True):
                scores = score(quantized)
                rows.append(Row(name, pair, scores["test_accuracy"], scores["test_loss"]))
                bar.advance()
    return [row for rows in table for row in rows]


def _qconfigs(
    method: str, bits: Sequence[tuple[int, int]], *, percentile: float, **shared: Any
) -> list[QConfig]:
    share = percentile if method == "percentile" else None
    return [ptq_qconfig(method, *pair, percentile=share, **shared) for pair in bits]


def _in_each(
    base: nn.Module,
    qconfigs: Sequence[QConfig],
    batches: Sequence[Any],
    rounding: Rounding,
    seed: int,
    track: Track,
) -> Iterator[nn.Module]:
    """A float model in each of the configs, which differ in their bits alone."""
    ranges: dict[str, Any] | None = None
    for qconfig in qconfigs:
        model = prepare(base, qconfig).eval()
        if ranges is None:
            calibrate(model, batches)
        else:
            model.load_state_dict(ranges)
        # the other methods' ranges are the same for all bits
        if "mse" not in [spec.method for spec in (qconfig.weight, qconfig.activation) if spec]:
            ranges = copy.deepcopy(model.state_dict())
        if isinstance(rounding, AdaRound):
            learn_rounding(base, model, batches, rounding, seed=seed, track=track)
        yield model
