"""AdaRound: after training, learn for each weight whether to round it up or down.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
Layer by layer, in the order in which the model runs them, minimize over V

    mean over images and positions of |layer(x^, w~(V)) - layer(x, w)|^2
        + regularization * sum over weights of 1 - |2 h(V) - 1|^beta

w~ and h are `qkernels.nn.SoftRounding`'s; x^ is what arrives at the layer in the model that is
quantized so far, its activations too, and x what arrives in the float model (the paper's asymmetric
reconstruction). |.|^2 is a sum over output channels. Our choices:

- a mean over the positions of a map, where the paper's norm sums: with the sum half of all h of our
  nets for the digits were not at 0 or 1 in the end, and the error was a tenth larger;
- the layer's output before the activation function (the paper takes it after);
- a layer that comes out no better than rounded to nearest is rounded to nearest;
- `AdaRound`'s defaults, for small models.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qkernels.nn import QuantLayer, SoftRounding

from .progress import Track
from .seeds import generator

log = logging.getLogger("qtrain")

Forward = Callable[[nn.Module, Any], Any]

# examples of the cache that run through a layer together when all of them do
CHUNK = 256


@dataclass(frozen=True)
class AdaRound:
    """How the rounding is learned.

    Attributes:
        iterations: steps of Adam for each layer. The paper's is 10 000.
        lr: of Adam; constant. With 1000 steps 1e-2 left our net for the digits 0.64 (W2A2) and 0.53
            (W3) of the error of rounding to nearest, geometric mean over layers; 10 000 steps of
            1e-3 left 0.63 and 0.51, 1000 of them 0.79 and 0.68.
        regularization: the factor lambda of the regularizer, the paper's.
        warm_start: share of the iterations before the regularizer sets in.
        batch_size: inputs of the layer in a step.
        beta: first and last value of the regularizer's exponent, annealed by half a cosine wave.

    Raises:
        TypeError, ValueError: a value out of its range.
    """

    iterations: int = 1000
    lr: float = 1e-2
    regularization: float = 0.01
    warm_start: float = 0.2
    batch_size: int = 32
    beta: tuple[float, float] = (20.0, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", tuple(self.beta))
        for name in ("iterations", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"adaround: {name} must be a whole number, got {value!r}")
            _require(value >= 1, name, "at least 1", value)
        _require(0 < self.lr < math.inf, "lr", "positive", self.lr)
        good = 0 <= self.regularization < math.inf
        _require(good, "regularization", "at least 0", self.regularization)
        _require(0 <= self.warm_start < 1, "warm_start", "in [0, 1)", self.warm_start)
        # below 1 the regularizer has an infinite slope at h = 1/2
        good = len(self.beta) == 2 and all(1 <= b < math.inf for b in self.beta)
        _require(good, "beta", "two numbers of at least 1", self.beta)

    def beta_at(self, step: int) -> float | None:
        """The exponent at a step; None before the regularizer sets in."""
        warm = self.warm_start * self.iterations
        if step < warm:
            return None
        first, last = self.beta
        return last + (first - last) * 0.5 * (
            1 + math.cos(math.pi * (step - warm) / (self.iterations - warm))
        )


class Rounded(NamedTuple):
    """What became of one layer.

    Attributes:
        nearest_error, error: of the layer's output, rounded to nearest and rounded as learned: the
            squared error, summed over output channels; the mean over all inputs and positions.
        moved: share of the weights that are not rounded to nearest.
    """

    layer: str
    nearest_error: float
    error: float
    moved: float


def learn_rounding(
    float_model: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    settings: AdaRound | None = None,
    *,
    seed: int = 0,
    forward: Forward | None = None,
    track: Track | None = None,
) -> list[Rounded]:
    """Round the weights of a prepared and calibrated model, in place.

    Each rounded layer's weight then lies on its grid, and its quantizer keeps the range it has, so
    that in eval mode it reproduces the weight to the bit; `float_state_dict` and `remove` give the
    rounded weights. (Calibrating again, or training on, takes new ranges from them.) Biases stay.

    A layer is left rounded to nearest, with the reason logged, if the batches never call it, if its
    weight belongs to another layer too, or if its calls differ in the shape of their inputs or in
    other arguments. Inputs of a layer that is called more than once are learned from together.

    Args:
        float_model: the model that ``model`` was prepared from; not changed.
        model: from `qkernels.nn.prepare` and `calibrate`, its weights' ranges kept (QuantSpec with
            ema=0.0, or learned).
        batches: calibration data, examples along dim 0; read once, kept in memory with the inputs
            and outputs of one layer.
        settings: None: `AdaRound()`.
        seed: names the draws of minibatches.
        forward: called as forward(model, batch); None: model(batch[0]) for a tuple or list,
            model(batch) for a tensor.
        track: a progress bar to advance by `work(model, settings)`; None: one of our own.

    Returns:
        The layers that were rounded, in the order of execution.

    Raises:
        ValueError: nothing to round; ``float_model`` does not belong to ``model``; a weight's range
            that is not kept; weights of PACT's or DoReFa's kind; no batches.
    """
    settings = settings if settings is not None else AdaRound()
    layers = weight_layers(model)
    _check_models(float_model, layers)
    data = list(batches)
    if not data:
        raise ValueError("adaround: batches must hold at least one batch, got none")
    runner = _Runner(float_model, model, data, forward or _forward)
    ours = Track(work(model, settings), "AdaRound")
    done = []
    with ours if track is None else nullcontext(track) as bar, evaluating(float_model, model):
        calls = runner.calls(layers)
        for name in [*calls, *(n for n in layers if n not in calls)]:
            bar.relabel(f"AdaRound {name}")
            task = runner.task(name, calls.get(name, 0))
            if isinstance(task, str):
                log.warning("adaround: layer %r stays rounded to nearest: %s", name, task)
                bar.advance(settings.iterations)
            else:
                done.append(_round(name, layers[name], task, settings, seed, bar))
    return done


def work(model: nn.Module, settings: AdaRound) -> int:
    """Steps that `learn_rounding` makes at most: what a progress bar counts."""
    return len(weight_layers(model)) * settings.iterations


def weight_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a prepared model whose weight is quantized, by name.

    Raises:
        ValueError: there are none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer) and module.weight_fake_quant is not None
    }
    if not layers:
        raise ValueError(
            "adaround: model must be a prepared one with quantized weights, got "
            f"{type(model).__name__} without any; see qkernels.nn.prepare"
        )
    return layers


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"adaround: {name} must be {rule}, got {value}")


def _check_models(float_model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Each layer has its float twin with the same weight, and keeps its range."""
    twins = dict(float_model.named_modules())
    for name, layer in layers.items():
        twin = twins.get(name)
        if not isinstance(twin, layer.float_class) or isinstance(twin, QuantLayer):
            raise ValueError(
                f"adaround: float_model must have a float layer {name!r} like model, "
                f"got {type(twin).__name__}"
            )
        if not torch.equal(twin.weight, layer.weight):
            raise ValueError(
                "adaround: float_model must hold the weights that model was prepared from, got "
                f"others at {name!r} (is one of them folded?)"
            )
        spec = layer.weight_fake_quant.spec
        spec.require_plain("adaround", f"weight quantizer of {name!r}")
        if spec.dynamic:
            raise ValueError(
                "adaround: model must keep the ranges of its weights (QuantSpec ema=0.0 or "
                f"learned), got a dynamic one at {name!r}"
            )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own setting is put back."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _ReachedError(Exception):
    """A layer's last call was seen: the rest of the forward is of no use."""


class _Call(NamedTuple):
    x: Tensor  # [N, ...], the layer's input
    rest: tuple[Any, ...]  # its other arguments; of a ConvTranspose output_size
    named: dict[str, Any]


class _Task(NamedTuple):
    """What a layer's output should be, and for which input."""

    x: Tensor  # [N, ...]
    target: Tensor  # [N, ...]
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def error(self, layer: Any, weight: Tensor, rows: Any) -> Tensor:
        """Squared error of some rows with this weight: [rows]."""
        out = functional_call(layer, {"weight": weight}, (self.x[rows], *self.rest), self.named)
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        return (out - self.target[rows]).square().flatten(1).mean(1) * channels

    @torch.no_grad()
    def mean_error(self, layer: Any, weight: Tensor) -> float:
        """The mean error of all rows."""
        starts = range(0, len(self.x), CHUNK)
        parts = [self.error(layer, weight, slice(at, at + CHUNK)) for at in starts]
        return float(torch.cat(parts).double().mean())


class _Runner:
    """Runs both models on the calibration data and watches their layers."""

    def __init__(
        self, float_model: nn.Module, model: nn.Module, data: list[Any], forward: Forward
    ) -> None:
        self.float_model, self.model, self.data, self.forward = float_model, model, data, forward
        self.owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )

    @torch.no_grad()
    def calls(self, layers: Mapping[str, Any]) -> dict[str, int]:
        """How often each layer is called in a forward; in the order of the first calls."""
        counts: dict[str, int] = {}

        def counter(name: str) -> Callable[..., None]:
            def count(*_: Any) -> None:
                counts[name] = counts.get(name, 0) + 1

            return count

        hooks = [m.register_forward_pre_hook(counter(name)) for name, m in layers.items()]
        try:
            self.forward(self.model, self.data[0])
        finally:
            for hook in hooks:
                hook.remove()
        return counts

    @torch.no_grad()
    def task(self, name: str, count: int) -> _Task | str:
        """What to learn a layer's rounding from, or why not to."""
        if count == 0:
            return "the batches never call it"
        layer, twin = self.model.get_submodule(name), self.float_model.get_submodule(name)
        if self.owners[id(layer.weight)] != 1:
            return "it shares its weight with another layer"
        ours = self._inputs(self.model, layer, count)
        theirs = self._inputs(self.float_model, twin, count)
        _, rest, named = ours[0]
        if any(c.x.shape[1:] != ours[0].x.shape[1:] for c in ours):
            return "its calls differ in the shape of their inputs"
        if any((c.rest, c.named) != (rest, named) for c in (*ours, *theirs)):
            return "its calls differ in their arguments"
        target = torch.cat([twin(c.x, *rest, **named) for c in theirs])
        return _Task(torch.cat([c.x for c in ours]), target, rest, named)

    def _inputs(self, model: nn.Module, layer: nn.Module, count: int) -> list[_Call]:
        """What arrives at a layer, over all batches; a forward stops at its count-th call."""
        seen: list[_Call] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(kwargs)
            x, *rest = args if args else (named.pop("input"),)
            # a copy: what follows this call may write to x
            seen.append(_Call(_as_batch(layer, x).clone(), tuple(rest), named))
            if len(seen) % count == 0:
                raise _ReachedError

        hook = layer.register_forward_pre_hook(note, with_kwargs=True)
        try:
            for batch in self.data:
                with suppress(_ReachedError):
                    self.forward(model, batch)
        finally:
            hook.remove()
        return seen


def _as_batch(layer: Any, x: Tensor) -> Tensor:
    """x with a dim of examples, which a layer's input may lack."""
    least = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
    return x if x.dim() >= least else x[None]


def _round(
    name: str, layer: Any, task: _Task, settings: AdaRound, seed: int, bar: Track
) -> Rounded:
    """Learn the rounding of one layer's weight, and leave the weight on its grid."""
    quantizer = layer.weight_fake_quant
    scale, zero_point = quantizer.qparams()
    soft = SoftRounding(layer.weight, scale, zero_point, quantizer.spec)
    with torch.no_grad():
        nearest = quantizer(layer.weight)
    # from here to the end the weight is what we say it is
    quantizer.fake_quant_enabled = False
    try:
        _learn(soft, layer, task, settings, f"adaround/{name}", seed, bar)
        rounded = soft.hard()
        before, after = task.mean_error(layer, nearest), task.mean_error(layer, rounded)
        if after >= before:
            rounded, after = nearest, before
    finally:
        quantizer.fake_quant_enabled = True
    with torch.no_grad():
        layer.weight.copy_(rounded)
        moved = float((rounded != nearest).double().mean())
    return Rounded(name, before, after, moved)


@torch.enable_grad()
def _learn(
    soft: SoftRounding,
    layer: Any,
    task: _Task,
    settings: AdaRound,
    stream: str,
    seed: int,
    bar: Track,
) -> None:
    optimizer = torch.optim.Adam([soft.v], lr=settings.lr)
    for step in range(settings.iterations):
        order = torch.randperm(len(task.x), generator=generator(seed, step, stream))
        rows = order[: settings.batch_size].to(task.x.device)
        loss = task.error(layer, soft(), rows).mean()
        beta = settings.beta_at(step)
        if beta is not None:
            loss = loss + settings.regularization * soft.regularizer(beta)
        # the biases and learned scales of the layer are not to collect gradients
        (soft.v.grad,) = torch.autograd.grad(loss, [soft.v])
        optimizer.step()
        bar.advance()
