"""What quantization errors look like: the real ones of each layer, against the laws that noise in
training takes for them.

DNQ (Xia et al., arXiv 2511.01462) models the errors of weights (WQE) as Gaussian per output channel
and those of activations (AQE) as Gaussian per tensor; pseudo quantization noise takes both for
uniform over one quantization step. Here the model is quantized after training, and

    WQE = Q(W) - W    of the weight, BatchNorm folded in if asked for
    AQE = Q(x) - x    of the layer's input x as it arrives in the quantized model, so behind the
                      quantized layers before it

are held against both laws by the Kolmogorov-Smirnov distance sup |F_sample - F|. It is a distance
and no test: with this many errors any law is refused. Uniform errors have 0.0572 from the fitted
Gaussian. The noise floor is what a sample of n from the law itself has: about 0.63 / sqrt(n) where
mean and std are fitted, 0.87 / sqrt(n) from the uniform law.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qkernels
from qkernels.nn import QConfig, QuantSpec

from .progress import Track
from .ptq import ptq_qconfig, quantize_after_training
from .seeds import stream_seed
from .simulate import quant_layers

SAMPLES = 1 << 16
BINS = 60


@dataclass(frozen=True)
class Errors:
    """The errors e = Q(x) - x of one tensor, from a random sample of its elements.

    Attributes:
        bits: of the codes.
        count, sampled: elements in all, and in the sample.
        mean, std, least, greatest, mean_abs: of e, in the units of x; std divides by n.
        zeros: share of elements with e = 0 exactly.
        clip_rate: share of elements that Q clips, see `qkernels.error_stats`.
        kurtosis: excess kurtosis (0 for a Gaussian, -1.2 for uniform errors).
        gauss: Kolmogorov-Smirnov distance from the Gaussian of this mean and std.
        gauss_channels: the same for weights, each error standardized by the mean and std of its
            channel, from N(0, 1): the model of DNQ. Channels of no variance are left out. Channels
            of n < 25 elements are slightly non-Gaussian by this alone, for their own mean and std
            are fitted (no error of n is farther than sqrt(n - 1) from the mean).
        uniform: distance of e / scale from the uniform law on [-1/2, 1/2].
        gauss_rest, uniform_rest: the same two, of the errors that are not exactly 0 alone: half of
            what a ReLU gives is, and has no error.
        sqnr: signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum e^2), in dB.
        histogram: counts of the standardized errors (weights: per channel) in ``BINS`` equal bins;
            empty if there are none or all are equal.
        span: [first, last] edge of the bins; empty with it.

    None stands where there is no such figure: no errors, errors that are all equal, activations
    (gauss_channels).
    """

    bits: int
    count: int
    sampled: int
    mean: float
    std: float
    least: float
    greatest: float
    mean_abs: float
    zeros: float
    clip_rate: float
    kurtosis: float | None
    gauss: float | None
    gauss_channels: float | None
    uniform: float | None
    gauss_rest: float | None
    uniform_rest: float | None
    sqnr: float | None
    histogram: list[int]
    span: list[float]


@dataclass(frozen=True)
class LayerErrors:
    """A layer at one bit width; ``bits`` is what was asked for, the first and last layer can have
    more. ``activation`` is None if the layer was never called."""

    layer: str
    bits: int
    weight: Errors
    activation: Errors | None

    @property
    def ratio(self) -> float | None:
        """mean |AQE| / mean |WQE|; None without one of the two. They have different units: it
        changes when layers are rescaled or BatchNorm is folded, and the SQNRs do not."""
        if self.activation is None or self.weight.mean_abs == 0:
            return None
        return self.activation.mean_abs / self.weight.mean_abs

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LayerErrors:
        """The inverse of `dataclasses.asdict`."""
        sides = {side: value[side] and Errors(**value[side]) for side in ("weight", "activation")}
        return cls(**{**value, **sides})


def error_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (8, 4, 2),
    first_last_bits: int | None = 8,
    method: str = "minmax",
    percentile: float | None = None,
    fold: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    track: Track | None = None,
) -> list[LayerErrors]:
    """The real quantization errors of each layer of a float model, at each bit width.

    Weights are quantized per output channel (symmetric), activations per tensor (affine), as
    `qtrain.ptq.ptq_qconfig` says.

    Args:
        model: a float model; it is copied.
        batches: calibration batches, x or a tuple, list or mapping that starts with x. They give
            the ranges of the activations, and then the errors.
        bits: widths of weights and activations.
        first_last_bits: bits of at least the first and last layer; None: as the others.
        method, percentile: how ranges are found, "minmax", "percentile" or "mse".
        fold: fold BatchNorm into the layers first (torch.fx must be able to trace the model).
        samples: at most so many elements of each weight and each layer's inputs are looked at; the
            same elements at each bit width.
        seed: names the sample.
        track: a progress bar to advance by `work(batches, bits)`; None: one of our own.

    Returns:
        Width by width in the order of ``bits``, the layers in the order of their registration.

    Raises:
        ValueError: bits, method, samples; no batches; a model that is quantized, cannot be folded
            or has no layer to quantize.
    """
    if type(samples) is not int or samples < 2:
        raise ValueError(f"error-model: samples must be an int of at least 2, got {samples!r}")
    configs = error_qconfigs(bits, method, percentile, first_last_bits)
    batches = list(batches)
    found: list[LayerErrors] = []
    ours = Track(work(batches, bits), "error model")
    with ours if track is None else nullcontext(track) as bar:
        for width, qconfig in configs.items():
            bar.relabel(f"{width} bits")
            quantized = quantize_after_training(model, qconfig, batches, fold=fold)
            bar.advance()
            found += _at_one_width(quantized, batches, width, samples, seed, bar)
            bar.advance()
    return found


def work(batches: Sequence[Any], bits: Sequence[int]) -> int:
    """Units of progress that `error_model` makes."""
    return len(bits) * (len(batches) + 2)


def error_qconfigs(
    bits: Sequence[int], method: str, percentile: float | None, first_last_bits: int | None
) -> dict[int, QConfig]:
    """A config for each width. Raises: ValueError on a bad argument, before any work is done."""
    if not bits or len(set(bits)) != len(bits):
        raise ValueError(f"error-model: bits must be some widths, each once, got {list(bits)}")
    options: dict[str, Any] = {"percentile": percentile, "first_last_bits": first_last_bits}
    return {width: ptq_qconfig(method, width, width, **options) for width in bits}


@torch.no_grad()
def _at_one_width(
    model: nn.Module, batches: Sequence[Any], bits: int, samples: int, seed: int, bar: Track
) -> list[LayerErrors]:
    layers = quant_layers(model)
    inputs = {}
    for name, layer in layers.items():
        # the stream does not know the width: the same elements at all of them
        inputs[name] = Reservoir(samples, _rng(seed, name, "activation"))
        layer.input_fake_quant.register_forward_pre_hook(_watch(inputs[name]))
    device = next(model.parameters()).device
    for batch in batches:
        model(_first(batch).to(device))
        bar.advance()
    found = []
    for name, layer in layers.items():
        weight = summarize_weight(layer, samples, _rng(seed, name, "weight"))
        seen = inputs[name]
        activation = summarize_inputs(layer, seen) if seen.count else None
        found.append(LayerErrors(name, bits, weight, activation))
    return found


def _rng(seed: int, layer: str, side: str) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, 0, f"error_model/{side}/{layer}"))


def _watch(reservoir: Reservoir) -> Any:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reservoir.add(args[0])

    return before


def _first(batch: Any) -> Tensor:
    """x of a batch, as `qkernels.nn.calibrate` takes it."""
    if isinstance(batch, Mapping):
        return next(iter(batch.values()))
    return batch if isinstance(batch, Tensor) else batch[0]


class Reservoir:
    """A uniform random sample, without replacement, of all elements of the tensors it is shown.

    Args:
        size: of the sample, at most; no more than this is kept.
        rng: decides what is kept.

    Attributes:
        count: elements seen.
        values: [min(size, count)] of the tensors' dtype, on the CPU.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.count = 0
        self.values = torch.empty(0)

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1)
        total = self.count + len(flat)
        fresh, old = np.arange(len(flat)), np.arange(len(self.values))
        if total > self.size:
            chosen = self.rng.choice(total, self.size, replace=False, shuffle=False)
            fresh = chosen[chosen >= self.count] - self.count
            # which of the old ones stay does not matter, how many of them does
            old = self.rng.choice(len(old), self.size - len(fresh), replace=False, shuffle=False)
        new = flat[torch.from_numpy(fresh).to(flat.device)].cpu()
        self.values = torch.cat((self.values[torch.from_numpy(old)].to(new.dtype), new))
        self.count = total


def summarize_weight(layer: Any, samples: int, rng: np.random.Generator) -> Errors:
    """The errors of a quantized layer's weight."""
    weight, quantizer = layer.weight.detach(), layer.weight_fake_quant
    spec = quantizer.spec
    scale, zero_point = _weight_params(weight, quantizer)
    stats = qkernels.error_stats(weight, scale, zero_point, clip=spec.clip, **_layout(spec))
    axis = spec.axis
    rows = [t if axis is None else t.movedim(axis, 0) for t in (weight, quantizer(weight))]
    count = weight.numel()
    pick = np.arange(count)
    if count > samples:
        pick = rng.choice(count, samples, replace=False, shuffle=False)
    index = torch.from_numpy(pick).to(weight.device)
    # all channels have as many elements, in rows one after the other
    channel = index // (count // scale.numel())
    x, q = (row.reshape(-1)[index].cpu().double().numpy() for row in rows)
    step, mean, std = (
        t.reshape(-1)[channel].cpu().double().numpy() for t in (scale, stats.mean, stats.std)
    )
    alive = std > 0
    standard = (q - x - mean)[alive] / std[alive]
    clip_rate = stats.clip_rate.double().mean().item()
    return summary(x, q - x, step, clip_rate, spec.bits, count, standard)


def summarize_inputs(layer: Any, seen: Reservoir) -> Errors:
    """The errors of the inputs that a quantized layer was given."""
    quantizer = layer.input_fake_quant
    spec = quantizer.spec
    scale, zero_point = (p.cpu() for p in quantizer.qparams())
    how = {"clip": spec.clip, **_layout(spec)}
    x = seen.values
    stats = qkernels.error_stats(x, scale, zero_point, **how)
    q = qkernels.fake_quant(x, scale, zero_point, **how).double().numpy()
    real, step = x.double().numpy(), scale.double().numpy()
    return summary(real, q - real, step, stats.clip_rate.item(), spec.bits, seen.count)


def _layout(spec: QuantSpec) -> dict[str, Any]:
    names = ("bits", "axis", "group_size", "symmetric", "narrow_range")
    return {name: getattr(spec, name) for name in names}


def _weight_params(weight: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    spec = quantizer.spec
    if not spec.dynamic:
        return quantizer.qparams()
    spec.require_plain("error-model", "weight quantizer")
    how = {"method": spec.method, "percentile": spec.percentile}
    return qkernels.quant_range(weight, **_layout(spec), **how)


def summary(
    x: np.ndarray,
    e: np.ndarray,
    step: np.ndarray,
    clip_rate: float,
    bits: int,
    count: int,
    standard: np.ndarray | None = None,
) -> Errors:
    """The figures of `Errors` for a sample.

    Args:
        x, e: [n] values and their errors, float64.
        step: [n] or 0-dim, the quantization step (scale) of each.
        count: elements of which this is a sample.
        standard: [m] errors standardized per channel; None: they have none.
    """
    from scipy import stats

    constant = bool(e.min() == e.max())
    drawn = standard
    if drawn is None:
        drawn = e[:0] if constant else (e - e.mean()) / e.std()
    counts, edges = _histogram(drawn)
    noise, signal = np.square(e).sum(), np.square(x).sum()
    rest = e != 0
    step = np.broadcast_to(step, e.shape)
    return Errors(
        bits=bits,
        count=count,
        sampled=len(e),
        mean=float(e.mean()),
        std=float(e.std()),
        least=float(e.min()),
        greatest=float(e.max()),
        mean_abs=float(np.abs(e).mean()),
        zeros=float(1 - rest.mean()),
        clip_rate=clip_rate,
        kurtosis=None if constant else float(stats.kurtosis(e)),
        gauss=from_gauss(e),
        gauss_channels=None if standard is None else from_gauss(standard, 0.0, 1.0),
        uniform=from_uniform(e / step) if rest.any() else None,
        gauss_rest=from_gauss(e[rest]),
        uniform_rest=from_uniform((e / step)[rest]),
        sqnr=10 * math.log10(signal / noise) if noise > 0 else None,
        histogram=counts,
        span=edges,
    )


def _histogram(sample: np.ndarray) -> tuple[list[int], list[float]]:
    """(counts, [first, last] edge)."""
    if len(sample) == 0 or sample.min() == sample.max():
        return [], []
    counts, edges = np.histogram(sample, BINS)
    return counts.tolist(), [float(edges[0]), float(edges[-1])]


def from_gauss(
    sample: np.ndarray, mean: float | None = None, std: float | None = None
) -> float | None:
    """Kolmogorov-Smirnov distance of a sample from N(mean, std^2), by default its own mean and std;
    None for values that are all equal, or for no values."""
    if len(sample) == 0 or sample.min() == sample.max():
        return None
    fitted = (sample.mean() if mean is None else mean, sample.std() if std is None else std)
    return _distance(sample, "norm", *fitted)


def from_uniform(sample: np.ndarray) -> float | None:
    """Kolmogorov-Smirnov distance of a sample from U(-1/2, 1/2); None for no values."""
    return _distance(sample, "uniform", -0.5, 1.0) if len(sample) else None


def _distance(sample: np.ndarray, law: str, *args: float) -> float:
    from scipy import stats

    # "asymp" concerns the p-value, which is not read: the exact one is slow
    return float(stats.kstest(sample, law, args, method="asymp").statistic)
