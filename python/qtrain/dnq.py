"""DNQ: float training under the noise of quantization, so that rounding hurts little afterwards.

Differential Noise-driven Quantization, Xia, Pang and Cai, arXiv 2511.01462. Warm-up without noise;
then, each epoch, post-training quantization (PTQ) of the current model is simulated on a few
training images, and moving averages keep the mean and variance of its errors: per channel of each
weight (WQER), per tensor of each layer's input (AQER). Each step runs forward and backward at

    W + ramp (delta_t - delta_{t-1}),   delta_t ~ N(mean, var) of WQER
    x + ramp m e,                       e ~ N(mean, var) of AQER, m ~ Bernoulli(p) per element

and the optimizer moves W. The ramp, p, the decay of the averages and the order of the parts are our
choices where the paper's text could not be had; docs/dnq.md lists them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

import qkernels
from qkernels import foreach
from qkernels.nn import ErrorEMA, NoiseHandle, NoiseSpec, QConfig, QuantSpec, attach_noise, prepare

from .data import Dataset, batch_count
from .loop import reestimate_batchnorm
from .ptq import calibration_images, ptq_qconfig
from .recipe import Recipe, TrainConfig, require
from .simulate import discrete_noise, input_errors, quant_layers, weight_errors, without_noise

WEIGHT_NOISES = ("differential", "iid", "naive", "discrete", "none")
ACTIVATION_NOISES = ("drop_in", "none")
RAMPS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class DnqConfig:
    """What DNQ adds to a run's settings.

    Attributes:
        weight_bits, activation_bits, first_last_bits, method, percentile: the quantization that is
            simulated, as in `qtrain.ptq.ptq_qconfig`.
        weight_noise: "differential", delta_t - delta_{t-1}; "iid", N(0, 2 var), its variance
            without its memory; "naive", N(mean, var); "discrete", as differential but with errors
            drawn from the real ones of the channel; "none".
        activation_noise: "drop_in" or "none".
        p: probability that an element of an activation gets noise.
        permanent: the weight noise stays in the weights, added after the optimizer's step.
        warmup_epochs: epochs without noise.
        ramp_epochs: over which the noise grows to its full size, after the warm-up.
        ramp: "linear", "cosine" (half a wave) or "constant" (full size at once).
        decay: of the moving averages, one update an epoch.
        calibration_images: random training images that the errors are measured on.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int | None = 8
    method: str = "minmax"
    percentile: float | None = None
    weight_noise: str = "differential"
    activation_noise: str = "drop_in"
    p: float = 0.5
    permanent: bool = False
    warmup_epochs: int = 0
    ramp_epochs: int = 0
    ramp: str = "linear"
    decay: float = 0.9
    calibration_images: int = 100

    def __post_init__(self) -> None:
        for name, known in (
            ("weight_noise", WEIGHT_NOISES),
            ("activation_noise", ACTIVATION_NOISES),
            ("ramp", RAMPS),
        ):
            value = getattr(self, name)
            _require(value in known, name, f"one of {', '.join(known)}", repr(value))
        # two: BatchNorm has no statistics of one image
        for name, least in (("warmup_epochs", 0), ("ramp_epochs", 0), ("calibration_images", 2)):
            value = getattr(self, name)
            rule = f"a whole number of at least {least}"
            _require(type(value) is int and value >= least, name, rule, repr(value))
        for name in ("weight_bits", "activation_bits"):
            value = getattr(self, name)
            _require(type(value) is int, name, "a whole number", repr(value))
        for name, rule in (("p", "in [0, 1]"), ("decay", "in [0, 1)")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            inside = number and 0 <= value <= 1 and (name == "p" or value < 1)
            _require(inside, name, rule, repr(value))
        gaussian = self.weight_noise in ("differential", "iid", "naive")
        rule = "true or false" if gaussian else "false without Gaussian noise of weights"
        _require(self.permanent in (gaussian, False), "permanent", rule, repr(self.permanent))
        self.qconfig()

    @property
    def noisy(self) -> bool:
        """Whether there is any noise at all."""
        return (self.weight_noise, self.activation_noise) != ("none", "none")

    def qconfig(self) -> QConfig:
        """The quantization that is simulated. Raises: ValueError if there is none such."""
        return ptq_qconfig(
            self.method,
            self.weight_bits,
            self.activation_bits,
            percentile=self.percentile,
            first_last_bits=self.first_last_bits,
        )

    def ramp_at(self, step: int, per_epoch: int) -> float:
        """Size of the noise in a step: 0 in the warm-up, 1 from the ramp's end on."""
        done = step + 1 - self.warmup_epochs * per_epoch
        if done <= 0 or not self.noisy:
            return 0.0
        length = self.ramp_epochs * per_epoch
        if self.ramp == "constant" or done >= length:
            return 1.0
        share = done / length
        return share if self.ramp == "linear" else 0.5 * (1 - math.cos(math.pi * share))


_require = partial(require, op="dnq")


@dataclass
class _Weight:
    """A weight under noise: its parameter, its stream, its quantization and its errors' record."""

    layer: str
    parameter: nn.Parameter
    recorder: ErrorEMA  # WQER

    @property
    def name(self) -> str:
        return f"{self.layer}.weight"

    @property
    def axis(self) -> int:
        axis = self.recorder.spec.axis
        assert axis is not None, "ptq_qconfig quantizes weights per channel"
        return axis


class Dnq(Recipe):
    """Train a float model that is to be quantized afterwards.

    All noise of the weights is drawn in one call a step, into new tensors that take the parameters'
    place for the time of forward and backward. Nothing waits for the device.

    Args:
        dnq: what is simulated, which noise and when.
    """

    name = "dnq"

    def __init__(self, dnq: DnqConfig) -> None:
        self.dnq = dnq

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self.dnq)}

    def bind(self, config: TrainConfig, data: Dataset) -> None:
        super().bind(config, data)
        self.weights: list[_Weight] = []
        self.handles: list[NoiseHandle] = []
        # what discrete noise draws from: at a step, and at the step before an epoch's first one
        self.errors: list[Tensor] = []
        self.errors_before: list[Tensor] = []
        self._stats: tuple[Any, Any] = (None, None)
        self.per_epoch = batch_count(data.train, config.batch_size)
        dnq, epochs = self.dnq, config.epochs
        end = dnq.warmup_epochs + dnq.ramp_epochs
        _require(
            end <= epochs,
            "warmup_epochs + ramp_epochs",
            f"at most the {epochs} epochs of the run",
            f"{dnq.warmup_epochs} + {dnq.ramp_epochs}",
        )
        self.noise = qkernels.Noise(config.seed)
        self.batches = calibration_images(data, config, dnq.calibration_images)

    def setup(self, model: nn.Module) -> nn.Module:
        dnq = self.dnq
        quantized = quant_layers(prepare(model, dnq.qconfig()))
        inputs: defaultdict[QuantSpec, list[str]] = defaultdict(list)
        seen: set[int] = set()  # a tied weight has its noise once, under its first name
        for name, layer in quantized.items():
            weight: Any = model.get_submodule(name).weight
            if id(weight) not in seen:
                seen.add(id(weight))
                recorder = ErrorEMA(layer.weight_fake_quant.spec, decay=dnq.decay)
                recorder.sync_ranks = False
                self.weights.append(_Weight(name, weight, recorder))
            inputs[layer.input_fake_quant.spec].append(name)
        if dnq.activation_noise == "drop_in":
            for spec, names in inputs.items():
                what = NoiseSpec("drop_in", spec, p=dnq.p, decay=dnq.decay)
                # names, where attach_noise takes patterns
                layers = [escape(name) for name in names]
                handle = attach_noise(model, noise=self.noise, activations=what, layers=layers)
                handle.enabled, handle.frozen = False, True
                self.handles.append(handle)
        return model

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Simulate PTQ, once there is noise to draw from it."""
        if not self.dnq.noisy or epoch < self.dnq.warmup_epochs:
            return
        step = epoch * self.per_epoch
        for weight in self.weights:
            weight.recorder.update(weight.parameter, step=step)
        if self.dnq.weight_noise == "discrete":
            before = self.errors
            self.errors = [weight_errors(w.parameter, w.recorder.spec) for w in self.weights]
            self.errors_before = before or self.errors
        if self.handles:
            seen = input_errors(model, self.dnq.qconfig(), self.batches)
            for name, (stats, count) in seen.items():
                recorder: Any = model.get_submodule(name).input_noise
                recorder.errors.record(stats, count, step=step)

    def perturbation(self, step: int) -> AbstractContextManager[Any]:
        ramp = self.dnq.ramp_at(step, self.per_epoch)
        return self._noisy(step, ramp) if ramp > 0 else nullcontext()

    @contextmanager
    def _noisy(self, step: int, ramp: float) -> Iterator[None]:
        self.noise.step = step
        for handle in self.handles:
            handle.enabled, handle.ramp = True, ramp
        temporary = [] if self.dnq.permanent else self.weights
        clean = [weight.parameter.data for weight in temporary]
        try:
            if temporary:
                noisy = self._draw(step, ramp)
                for weight, value in zip(temporary, noisy, strict=True):
                    weight.parameter.data = value
            yield
        finally:
            for weight, value in zip(temporary, clean, strict=True):
                weight.parameter.data = value
            for handle in self.handles:
                handle.enabled = False

    def on_step_end(self, model: nn.Module, step: int) -> None:
        ramp = self.dnq.ramp_at(step, self.per_epoch)
        if self.dnq.permanent and ramp > 0:
            self._draw(step, ramp, inplace=True)

    @torch.no_grad()
    def _draw(self, step: int, ramp: float, *, inplace: bool = False) -> list[Tensor]:
        """The weights with this step's noise."""
        kind, values = self.dnq.weight_noise, [w.parameter.data for w in self.weights]
        seeds = [self.noise.at(w.name, kind=kind)["seed"] for w in self.weights]
        axes = [w.axis for w in self.weights]
        if kind == "none":
            return values
        if kind == "discrete":
            # what was added at the step before is what is taken away
            latest = self.errors_before if step % self.per_epoch == 0 else self.errors
            return discrete_noise(values, self.errors, latest, axes, seeds, step, ramp)
        now, before = self._statistics(step)
        where: dict[str, Any] = {"axis": axes, "seed": seeds, "ramp": ramp, "inplace": inplace}
        if kind == "naive":
            return foreach.drop_in_noise(values, now, p=1.0, step=step, **where)
        if kind == "iid":
            # steps two apart share no delta: differences of the same law, independent of each other
            return foreach.differential_noise(values, now, step=2 * step, **where)
        return foreach.differential_noise(values, now, before, step=step, **where)

    def _statistics(self, step: int) -> tuple[list[Any], list[Any]]:
        """(mean, std) of each weight's errors at this step and at the step before."""
        epoch, within = divmod(step, self.per_epoch)
        key = (epoch, within == 0)
        if self._stats[0] != key:
            pairs = [weight.recorder.at(step) for weight in self.weights]
            now, before = ([(s.mean, s.std) for s in column] for column in zip(*pairs, strict=True))
            self._stats = (key, (now, before))
        return self._stats[1]

    def before_evaluation(self, model: nn.Module, step: int) -> None:
        """Noise moves BatchNorm's running statistics in training; it must not in an evaluation."""
        if self.dnq.ramp_at(step - 1, self.per_epoch) > 0:
            reestimate_batchnorm(model, self.data, self.config)

    def finish(self, model: nn.Module) -> nn.Module:
        return without_noise(model)

    def state_dict(self) -> dict[str, Any]:
        recorders = {w.name: w.recorder.state_dict() for w in self.weights}
        state: dict[str, Any] = {"wqer": recorders}
        if self.dnq.weight_noise == "discrete":
            state["errors"] = [self.errors, self.errors_before]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for weight in self.weights:
            weight.recorder.load_state_dict(state["wqer"][weight.name])
            weight.recorder.to(weight.parameter.device)
        device = self.weights[0].parameter.device
        if self.dnq.weight_noise == "discrete":
            self.errors, self.errors_before = (
                [error.to(device) for error in errors] for errors in state["errors"]
            )
