"""How flat the loss is around a model: Hessian trace, largest eigenvalue, loss under weight noise.

`measure_flatness` is for any float model, loss and list of batches; the Hessian's part is in
hessian.py. The rest of this file compares checkpoints of ours: `flatness_of`.

Trace and eigenvalue depend on how the weights are scaled: with BatchNorm behind it a layer times c
is the same network, and its part of H is divided by c^2 (Dinh et al., arXiv 1703.04933). The loss
under noise does not, for the noise is relative to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import Noise, foreach

from .data import Batch, Dataset, load_dataset
from .hessian import (
    CrossEntropy,
    Loss,
    Objective,
    TopEigenvalue,
    Trace,
    cross_entropy,
    hessian_trace,
    hessian_vector_product,
    mean_and_std,
    require,
    require_finite,
    standing_still,
    top_eigenvalue,
)
from .progress import Track
from .recipe import TrainConfig, new_model
from .seeds import generator
from .source import FloatSource

__all__ = [
    "CrossEntropy",
    "Flatness",
    "NoisyLoss",
    "Probing",
    "TopEigenvalue",
    "Trace",
    "cross_entropy",
    "flatness_of",
    "hessian_trace",
    "hessian_vector_product",
    "loss_under_noise",
    "measure_flatness",
    "sample_batches",
    "top_eigenvalue",
    "weight_noise",
]

SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# the matrices of a layer that get noise; output channels are in dim 0
MATRICES = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear): ("weight",),
    (nn.MultiheadAttention,): (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ),
}


@dataclass(frozen=True)
class Probing:
    """How much is measured.

    Attributes:
        probes: of `hessian_trace`.
        iterations, tolerance: of `top_eigenvalue`.
        sizes, draws: of `loss_under_noise`; size 0 is one draw.
        seed: names all randomness: the same call gives the same numbers.

    Raises:
        ValueError: a number out of range.
    """

    probes: int = 32
    iterations: int = 40
    tolerance: float = 1e-3
    sizes: Sequence[float] = SIZES
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probes", "iterations", "draws"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.tolerance > 0, "tolerance", "positive", self.tolerance)
        _require_sizes(self.sizes)
        Noise(self.seed)  # refuses what is no seed of it

    def work(self, batches: int) -> int:
        """What `measure_flatness` advances its track by."""
        forwards = 1 + sum(self.draws if size else 1 for size in self.sizes)
        return batches * (self.probes + self.iterations + 1 + forwards)


@dataclass(frozen=True)
class NoisyLoss:
    """Loss (and accuracy, in 0 .. 1) under noise of one relative size.

    Attributes:
        losses, accuracies: one per draw; a single one for size 0. A loss that is not finite is
            None, and so is the mean of losses with such a one.
        loss_std, accuracy_std: over the draws; None for a single one.
        accuracy: None (and accuracies empty) for a loss that is not a `CrossEntropy`.
    """

    size: float
    loss: float | None
    loss_std: float | None
    losses: tuple[float | None, ...]
    accuracy: float | None
    accuracy_std: float | None
    accuracies: tuple[float, ...]

    @classmethod
    def of(cls, size: float, scores: Sequence[tuple[float, float | None]]) -> NoisyLoss:
        """From (loss, accuracy) of each draw."""
        losses = tuple(value if math.isfinite(value) else None for value, _ in scores)
        finite = [value for value in losses if value is not None]
        right = tuple(share for _, share in scores if share is not None)
        loss, loss_std = mean_and_std(finite) if len(finite) == len(losses) else (None, None)
        accuracy, accuracy_std = mean_and_std(right) if right else (None, None)
        return cls(size, loss, loss_std, losses, accuracy, accuracy_std, right)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NoisyLoss:
        lists = {name: tuple(value[name]) for name in ("losses", "accuracies")}
        return cls(**{**value, **lists})


@dataclass(frozen=True)
class Flatness:
    """All figures of a model. ``loss`` and ``accuracy`` are those of the model as it is."""

    loss: float
    accuracy: float | None
    examples: int
    parameters: int
    trace: Trace
    top: TopEigenvalue
    noise: tuple[NoisyLoss, ...]

    @property
    def trace_per_parameter(self) -> float:
        return self.trace.mean / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of what JSON knows."""
        return {**asdict(self), "trace_per_parameter": self.trace_per_parameter}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Flatness:
        """The inverse of ``to_dict``, also through JSON; other keys are left out."""
        trace = value["trace"]
        return cls(
            **{name: value[name] for name in ("loss", "accuracy", "examples", "parameters")},
            trace=Trace(**{**trace, "values": tuple(trace["values"])}),
            top=TopEigenvalue(**value["top"]),
            noise=tuple(NoisyLoss.from_dict(noisy) for noisy in value["noise"]),
        )


def measure_flatness(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    probing: Probing | None = None,
    track: Track | None = None,
) -> Flatness:
    """All figures of a model, which is left as it was: weights, modes and gradients.

    Args:
        model, batches, loss: as in `hessian.Objective`.
        probing: None: the defaults.
        track: a progress bar of ``probing.work(len(batches))`` units.

    Raises:
        ValueError: no batch or an empty one; a model with fake quantizers, without a parameter that
            requires grad, or without a layer that gets noise.
        NotImplementedError: an operation of the model has no second derivative.
        FloatingPointError: the loss without noise or a curvature is not finite.
    """
    probing = probing or Probing()
    objective = Objective(model, batches, loss, track)
    # all that can be refused is refused before the long part
    objective.require_hessian()
    _layer_weights(model)
    with standing_still(model):
        value, accuracy = objective.scores()
    require_finite("loss", value)
    batches = objective.batches
    how: dict[str, Any] = {"loss": loss, "seed": probing.seed, "track": track}
    lanczos: dict[str, Any] = {"iterations": probing.iterations, "tolerance": probing.tolerance}
    # first what needs no derivative
    noise = loss_under_noise(model, batches, sizes=probing.sizes, draws=probing.draws, **how)
    return Flatness(
        loss=value,
        accuracy=accuracy,
        examples=objective.examples,
        parameters=objective.size,
        trace=hessian_trace(model, batches, probes=probing.probes, **how),
        top=top_eigenvalue(model, batches, **lanczos, **how),
        noise=noise,
    )


def loss_under_noise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    sizes: Sequence[float] = SIZES,
    draws: int = 5,
    seed: int = 0,
    track: Track | None = None,
) -> tuple[NoisyLoss, ...]:
    """The loss under `weight_noise` of growing size, over several draws.

    Draw d is that of ``Noise(seed, step=d)``: the same for all sizes, and for all models whose
    layers have equal names and shapes. What is compared then differs by the weights alone.

    Args:
        sizes: relative to the weights; at least 0.
        model, batches, loss, track: as in `hessian.Objective`; the model is left as it was.

    Raises:
        ValueError: sizes, draws, seed; a model without a layer that gets noise.
    """
    require(draws >= 1, "draws", "at least 1", draws)
    _require_sizes(sizes)
    objective = Objective(model, batches, loss, track)
    found = []
    with standing_still(model):
        for size in sizes:
            scores = []
            for draw in range(draws if size else 1):
                with weight_noise(model, size, Noise(seed, step=draw)):
                    scores.append(objective.scores())
            found.append(NoisyLoss.of(size, scores))
    return tuple(found)


@contextmanager
def weight_noise(model: nn.Module, size: float, noise: Noise) -> Iterator[None]:
    """Gaussian noise on the weights of layers while inside; the old bits afterwards.

    Layers are Conv, Linear and MultiheadAttention (its projections of queries, keys and values; the
    output's is a Linear). Other parameters, embeddings among them, get none.

    w + size * rms * eps, eps ~ N(0, 1), where rms is that of the weight's output channel (dim 0).
    NAME.weight draws at ``noise.at("NAME.weight", kind="flatness")``; a tied weight goes by its
    first name. Frozen weights get noise too; computed (parametrized) ones and those of
    ConvTranspose do not.

    Raises:
        ValueError: no such layer.
    """
    weights = _layer_weights(model)
    clean = [weight.detach().clone() for weight in weights.values()]
    places = [noise.at(name, kind="flatness") for name in weights]
    noisy = foreach.drop_in_noise(
        clean,
        [(0.0, _channel_rms(weight)) for weight in clean],
        p=1.0,
        ramp=float(size),
        axis=0,
        seed=[place["seed"] for place in places],
        step=[place["step"] for place in places],
    )
    try:
        _write(weights.values(), noisy)
        yield
    finally:
        _write(weights.values(), clean)


def _layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    mine: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for kinds, names in MATRICES.items():
            if isinstance(module, kinds):
                mine.update(id(own[name]) for name in names if name in own)
    found = {name: p for name, p in model.named_parameters() if id(p) in mine}
    require(bool(found), "model", "one with a Conv, Linear or attention layer", "none")
    return found


def _channel_rms(weight: Tensor) -> Tensor:
    """[channels], in fp32 at least."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide.flatten(1).square().mean(1).sqrt()


@torch.no_grad()
def _write(weights: Iterable[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _require_sizes(sizes: Sequence[float]) -> None:
    good = bool(sizes) and all(math.isfinite(size) and size >= 0 for size in sizes)
    require(good, "sizes", "one or more finite numbers of at least 0", list(sizes))


def sample_batches(
    data: Dataset, split: str, examples: int, *, seed: int, batch_size: int = 64
) -> list[Batch]:
    """Examples of a split ("train" or "test"), drawn without replacement, in batches.

    Augmented training pictures are augmented, each always in the same way.

    Raises:
        ValueError: another split; more examples than it has, or none.
    """
    splits = {"train": data.train, "test": data.test}
    require(split in splits, "split", "train or test", repr(split))
    have = len(splits[split])
    rule = f"in 1..{have} (the {split} split of {data.name})"
    require(1 <= examples <= have, "examples", rule, examples)
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    order = torch.randperm(have, generator=generator(seed, 0, f"flatness {split}"))
    chunks = list(order[:examples].split(batch_size))
    return list(splits[split].read(chunks, seed=seed, epoch=0, workers=0))


def flatness_of(
    sources: Mapping[str, FloatSource],
    *,
    split: str = "train",
    examples: int = 512,
    batch_size: int = 64,
    probing: Probing | None = None,
    label_smoothing: float = 0.0,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> dict[str, Flatness]:
    """`measure_flatness` of checkpoints by name, on the same examples and with the same draws.

    Args:
        label_smoothing: of the cross entropy, for all of them.

    Raises:
        ValueError: checkpoints of different datasets; weights that are not their model's; else as
            `sample_batches` and `measure_flatness`.
    """
    probing = probing or Probing()
    require(bool(sources), "checkpoints", "at least one", "none")
    (first, start), *others = sources.items()
    wanted = (start.dataset, dict(start.data_options))
    for name, source in others:
        have = (source.dataset, dict(source.data_options))
        rule = f"all of the dataset of {first}, {_describe(*wanted)}"
        require(have == wanted, "checkpoints", rule, f"{name} of {_describe(*have)}")
    data = load_dataset(start.dataset, start.data_options).to(torch.device(device))
    batches = sample_batches(data, split, examples, seed=probing.seed, batch_size=batch_size)
    models = {
        name: source.fill(new_model(TrainConfig(**source.settings()), data)).to(device)
        for name, source in sources.items()
    }
    found = {}
    with Track(len(models) * probing.work(len(batches)), "flatness", quiet=quiet) as track:
        for name, model in models.items():
            track.relabel(f"flatness of {name}")
            found[name] = measure_flatness(
                model,
                batches,
                loss=CrossEntropy(label_smoothing),
                probing=probing,
                track=track,
            )
    return found


def _describe(dataset: str, options: Mapping[str, Any]) -> str:
    return f"{dataset} with {dict(options)}" if options else dataset
