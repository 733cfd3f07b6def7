"""What a model with noise is made of: the noise of weights, of inputs, and their switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import foreach, numeric
from qkernels.nn.calls import Calls
from qkernels.nn.error_ema import ErrorEMA
from qkernels.nn.quant_spec import QuantSpec
from qkernels.noise_source import Noise
from qkernels.ops import _check
from qkernels.ops.error_stats import ErrorStats
from qkernels.ops.noise import differential_noise, drop_in_noise, uniform_noise
from qkernels.ops.quant_range import quant_range

KINDS = ("differential", "drop_in", "uniform")


@dataclass(frozen=True, eq=False)
class NoiseSpec:
    """What noise a kind of tensor gets.

    Attributes:
        kind: "differential", "drop_in" or "uniform": the op, see `qkernels.differential_noise` and
            so on.
        quant: the quantization whose errors the noise stands for. What is drawn from follows from
            it: for the first two kinds the moving averages of an `ErrorEMA`, for uniform noise the
            scale that `quant_range` gives for the tensor at hand. Of kind plain, or one that is
            plain when evaluated (quant_noise, qdrop).
        p: probability that an element gets noise; None: 0.5 for drop_in, 1 for uniform. None for
            differential.
        decay: of the ErrorEMA.
        given: draw from this instead: statistics (an ErrorStats or a pair (mean, std)), for uniform
            noise a scale; or a mapping from names ("conv1.weight", "conv1.input") to these. One
            entry, or one per channel as `quant` has them.
        permanent: for differential noise of weights: forwards leave the weight alone, and
            `NoiseHandle.perturb_` adds the noise to it.

    Raises:
        TypeError, ValueError: an attribute that no op would take; a quant of another kind.
    """

    kind: str
    quant: QuantSpec
    p: float | None = None
    decay: float = 0.9
    given: Any = None
    permanent: bool = False

    def __post_init__(self) -> None:
        _check.check_choice("NoiseSpec", "kind", self.kind, KINDS)
        if not isinstance(self.quant, QuantSpec):
            raise TypeError(f"NoiseSpec: quant must be a QuantSpec, got {self.quant!r}")
        self.quant.require_plain("NoiseSpec", "quant")
        if self.p is not None:
            _check.check_probability("NoiseSpec", "p", self.p)
            if self.kind == "differential":
                raise ValueError(f"NoiseSpec: p must be None for differential, got {self.p}")
        _check.check_decay("NoiseSpec", self.decay)
        if type(self.permanent) is not bool:
            raise TypeError(f"NoiseSpec: permanent must be a bool, got {self.permanent!r}")
        if self.permanent and self.kind != "differential":
            raise ValueError(f"NoiseSpec: permanent must be False for {self.kind}, got True")

    @property
    def share(self) -> float:
        """p, or what stands for None."""
        if self.p is not None:
            return self.p
        return 0.5 if self.kind == "drop_in" else 1.0

    def parts(self, name: str) -> tuple[Any, ...]:
        """What is given for a name: (), (scale,) or (mean, std)."""
        value = self.given
        if value is None:
            return ()
        if isinstance(value, Mapping):
            if name not in value:
                raise ValueError(f"NoiseSpec: given must have an entry for {name!r}, got none")
            value = value[name]
        if self.kind == "uniform":
            parts: tuple[Any, ...] = (value,)
        elif isinstance(value, ErrorStats):
            parts = (value.mean, value.std)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            parts = tuple(value)
        else:
            raise TypeError(
                "NoiseSpec: given must be an ErrorStats or a pair (mean, std), got "
                f"{type(value).__name__}"
            )
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, (int, float, Tensor)):
                raise TypeError(f"NoiseSpec: given must be of Tensors or numbers, got {part!r}")
        return parts


class NoiseControl:
    """The switches that all noise of one `attach_noise` obeys. Copied and saved with the model."""

    def __init__(self, noise: Noise, in_eval: bool) -> None:
        self.noise = noise
        self.in_eval = in_eval
        self.enabled = False
        self.frozen = False
        self.measuring = False
        self.measurements = 0  # how many times it was switched on
        self.ramp = 1.0
        step = noise.step
        device = step.device if isinstance(step, Tensor) else None
        # compiled code and captured graphs read the tensor: a number would be part of them
        self.ramp_at = torch.ones((), dtype=torch.float64, device=device)

    def set_ramp(self, ramp: Any) -> None:
        """The factor of all noise."""
        _check.check_number("attach_noise", "ramp", ramp)
        if ramp < 0:
            raise ValueError(f"attach_noise: ramp must be at least 0, got {ramp}")
        self.ramp = float(ramp)
        self.ramp_at.fill_(self.ramp)

    def active(self, module: nn.Module) -> bool:
        """Whether a module makes noise now."""
        return self.enabled and not self.measuring and (module.training or self.in_eval)


class TensorNoise(nn.Module):
    """What the noise of a weight and that of an input share."""

    per_rank = False

    def __init__(
        self, name: str, spec: NoiseSpec, control: NoiseControl, channels: int | None
    ) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.control = control
        quant = spec.quant
        self._layout: dict[str, Any] = {"axis": quant.axis, "group_size": quant.group_size}
        self._range: dict[str, Any] = {
            **self._layout,
            "bits": quant.bits,
            "symmetric": quant.symmetric,
            "narrow_range": quant.narrow_range,
            "method": quant.method,
            "percentile": quant.percentile,
        }
        parts = spec.parts(name)
        self._given = [f"given{i}" for i in range(len(parts))]
        for attribute, part in zip(self._given, parts, strict=True):
            if isinstance(part, Tensor):
                self.register_buffer(attribute, part.detach().clone(), persistent=False)
            else:
                setattr(self, attribute, float(part))
        self.errors: ErrorEMA | None = None
        if not parts and spec.kind != "uniform":
            self.errors = ErrorEMA(quant, decay=spec.decay, channels=channels)

    def place(self, x: Tensor) -> dict[str, Any]:
        """seed and step of this name."""
        kind, noise = self.spec.kind, self.control.noise
        return noise.at(self.name, kind=kind, per_rank=self.per_rank, device=x.device)

    def statistics(self, x: Tensor, step: int | Tensor) -> tuple[Any, Any]:
        """((mean, std) at step, at step - 1), moved by x first if they follow it."""
        if self.errors is None:
            mean, std = (getattr(self, name) for name in self._given)
            return (mean, std), (mean, std)
        if self.training and not self.control.frozen:
            self.errors.update(x, step=step)
        now, before = self.errors.at(step)
        return (now.mean, now.std), (before.mean, before.std)

    def arguments(self, x: Tensor, step: int | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, keyword) arguments of the op for x, less seed and step."""
        ramp = self.control.ramp_at if isinstance(step, Tensor) else self.control.ramp
        if self.spec.kind == "uniform":
            if self._given:
                scale = getattr(self, self._given[0])
            else:
                scale = quant_range(x.detach(), **self._range).scale
            return (x, self._times(scale, ramp, x)), {"p": self.spec.share, **self._layout}
        now, before = self.statistics(x, step)
        if isinstance(ramp, Tensor):
            now = tuple(self._times(value, ramp, x) for value in now)
            before = tuple(self._times(value, ramp, x) for value in before)
            ramp = 1.0
        if self.spec.kind == "differential":
            return (x, now, before), {"ramp": ramp, **self._layout}
        return (x, now), {"p": self.spec.share, "ramp": ramp, **self._layout}

    def _times(self, value: Tensor | float, ramp: Tensor | float, x: Tensor) -> Tensor | float:
        """value * ramp; a tensor if ramp is one, with an entry per channel."""
        if not isinstance(ramp, Tensor):
            return value * ramp
        if not isinstance(value, Tensor):
            shape = numeric.params_shape(x.shape, self.spec.quant.axis, self.spec.quant.group_size)
            dtype = numeric.compute_dtype(x.dtype)
            value = torch.full(shape, value, dtype=dtype, device=x.device)
        return value * ramp.to(value.dtype)

    def extra_repr(self) -> str:
        parts = [repr(self.name), self.spec.kind]
        if self.spec.kind != "differential":
            parts.append(f"p={self.spec.share}")
        if self.spec.permanent:
            parts.append("permanent")
        return ", ".join(parts)


OPS: dict[str, Any] = {
    "differential": differential_noise,
    "drop_in": drop_in_noise,
    "uniform": uniform_noise,
}
LIST_OPS: dict[str, Any] = {
    "differential": foreach.differential_noise,
    "drop_in": foreach.drop_in_noise,
    "uniform": foreach.uniform_noise,
}


class WeightNoise(TensorNoise):
    """A parametrization: weight plus noise, the same on all ranks and in all calls of a step."""

    def __init__(
        self, name: str, spec: NoiseSpec, control: NoiseControl, channels: int | None
    ) -> None:
        super().__init__(name, spec, control, channels)
        self._measured = 0
        if self.errors is not None:
            self.errors.sync_ranks = False

    def forward(self, weight: Tensor) -> Tensor:
        control = self.control
        if control.measuring:
            self._measure(weight)
        if self.spec.permanent or not control.active(self):
            return weight
        place = self.place(weight)
        args, options = self.arguments(weight, place["step"])
        return OPS[self.spec.kind](*args, **options, **place)

    def _measure(self, weight: Tensor) -> None:
        """Once for each `NoiseHandle.measuring`, however many batches run in it."""
        if self.errors is not None and self._measured != self.control.measurements:
            self.errors.update(weight, step=self.place(weight)["step"], again=True)
            self._measured = self.control.measurements

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the layer's weight is the weight without noise."""
        return weight


class InputNoise(TensorNoise):
    """The noise of a layer's input: each rank its own, and each call of a step its own; `Calls`
    says which forward counts as a call."""

    per_rank = True

    def __init__(
        self, name: str, spec: NoiseSpec, control: NoiseControl, channels: int | None
    ) -> None:
        super().__init__(name, spec, control, channels)
        self.calls = Calls()

    def forward(self, x: Tensor) -> Tensor:
        control = self.control
        if control.measuring and self.errors is not None:
            self.errors.update(x, step=self.place(x)["step"], again=True)
        if not control.active(self):
            return x
        place = self.place(x)
        args, options = self.arguments(x, place["step"])
        place["step"] = self.calls.step(control.noise, place["step"], x)
        return OPS[self.spec.kind](*args, **options, **place)


def add_input_noise(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a layer with noise on its input."""
    noise: Any = layer.input_noise
    if args:
        return (noise(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": noise(kwargs["input"])}
