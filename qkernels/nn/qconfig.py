"""QConfig: what `prepare` does to each quantizable layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from qkernels.nn.quant_spec import QuantSpec, known_keys


@dataclass(frozen=True)
class QConfig:
    """What `prepare` does to each quantizable layer.

    Attributes:
        weight: how weights are quantized; None: not at all.
        activation: how the input of each layer is quantized; None: not at all.
        overrides: fnmatch pattern of a layer's dotted name -> its own QConfig, or None to leave the
            layer float. The first pattern that matches wins, and wins over first_last_bits. Of the
            other QConfig only weight and activation are read.
        first_last_bits: the first and the last quantizable layer (in the order of the modules'
            registration) get at least so many bits, as is usual from LSQ's paper on. None: no
            exception. DoReFa's become min-max there, see `dorefa`.

    Raises:
        TypeError, ValueError: an attribute of the wrong kind.
    """

    weight: QuantSpec | None
    activation: QuantSpec | None
    overrides: Mapping[str, QConfig | None] = field(default_factory=dict)
    first_last_bits: int | None = 8

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, QuantSpec):
                raise TypeError(f"QConfig: {name} must be a QuantSpec or None, got {value!r}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"QConfig: overrides must be a mapping, got {self.overrides!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, other in self.overrides.items():
            self._check_override(pattern, other)
        bits = self.first_last_bits
        if bits is not None and type(bits) is not int:
            raise TypeError(f"QConfig: first_last_bits must be an int or None, got {bits!r}")
        if bits is not None and not 1 <= bits <= 16:
            raise ValueError(f"QConfig: first_last_bits must be in 1..16 or None, got {bits}")

    @staticmethod
    def _check_override(pattern: Any, other: Any) -> None:
        if not isinstance(pattern, str):
            raise TypeError(f"QConfig: overrides must have str patterns as keys, got {pattern!r}")
        if other is not None and not isinstance(other, QConfig):
            raise TypeError(
                f"QConfig: overrides must hold a QConfig or None, got {other!r} for {pattern!r}"
            )
        if other is not None and other.overrides:
            raise ValueError(
                "QConfig: overrides must not hold overrides of their own, "
                f"got {list(other.overrides)} for {pattern!r}"
            )

    @classmethod
    def minmax(
        cls, weight_bits: int | None, activation_bits: int | None, **options: Any
    ) -> QConfig:
        """Min-max ranges with the straight-through gradient.

        Weights: symmetric, per output channel, range of the weight at hand. Activations: affine,
        per tensor, running range with decay 0.9.

        Args:
            weight_bits, activation_bits: 1 .. 16; None: not quantized. So in all presets.
            options: `overrides` and `first_last_bits`. So in all presets.
        """
        return cls(_minmax_weight(weight_bits), _minmax_activation(activation_bits), **options)

    @classmethod
    def lsq(cls, weight_bits: int | None, activation_bits: int | None, **options: Any) -> QConfig:
        """Learned scales (LSQ, Esser et al. 2019, arXiv 1902.08153).

        Weights: symmetric, per output channel. Activations: affine, per tensor; the zero point is
        that of the first batch (0 for x >= 0) and stays. Both start at 2 mean|x| / sqrt(Qp) and
        clip by value, as the paper does.
        """
        weight = _spec(weight_bits, axis=0, symmetric=True, **_LSQ)
        return cls(weight, _spec(activation_bits, **_LSQ), **options)

    @classmethod
    def lsq_plus(
        cls, weight_bits: int | None, activation_bits: int | None, **options: Any
    ) -> QConfig:
        """Learned scales and, for activations, zero points (LSQ+, Bhalgat et al. 2020, arXiv
        2004.09576).

        Weights: symmetric, per output channel. Activations: affine, per tensor. Activations start
        where the squared error of the first batch is least, as in the paper, among the candidates
        of `quant_range`'s "mse"; weights too (our choice: the paper starts them from their mean and
        standard deviation).
        """
        learned = {**_LSQ, "method": "mse"}
        weight = _spec(weight_bits, axis=0, symmetric=True, **learned)
        return cls(weight, _spec(activation_bits, learned_zero_point=True, **learned), **options)

    @classmethod
    def pact(cls, weight_bits: int | None, activation_bits: int | None, **options: Any) -> QConfig:
        """Activations clipped at a learned bound (PACT, Choi et al. 2018, arXiv 1805.06085), see
        `PactFakeQuantize`. Weights as in `minmax` (our choice: the paper takes DoReFa's)."""
        return cls(
            _minmax_weight(weight_bits),
            _spec(activation_bits, kind="pact", learned=True),
            **options,
        )

    @classmethod
    def dorefa(
        cls, weight_bits: int | None, activation_bits: int | None, **options: Any
    ) -> QConfig:
        """tanh-normalised weights, activations clipped to [0, 1] (DoReFa, Zhou et al. 2016, arXiv
        1606.06160), see `DorefaWeightFakeQuantize` and `DorefaActivationFakeQuantize`. Gradients
        are not quantized.

        The paper leaves the first and the last layer float; with first_last_bits they are as in
        `minmax`, with first_last_bits=None they are DoReFa's too.
        """
        return cls(
            _spec(weight_bits, kind="dorefa_weight"),
            _spec(activation_bits, kind="dorefa_activation", clip="value"),
            **options,
        )

    @classmethod
    def quant_noise(
        cls,
        weight_bits: int | None,
        activation_bits: int | None,
        *,
        p: float = 0.5,
        **options: Any,
    ) -> QConfig:
        """`minmax`, but in training only a random share p of each weight is quantized (Quant-Noise,
        Fan et al. 2020, arXiv 2004.07320), see `QuantNoiseFakeQuantize`."""
        weight = _minmax_weight(weight_bits)
        if weight is not None:
            weight = replace(weight, kind="quant_noise", p=p)
        return cls(weight, _minmax_activation(activation_bits), **options)

    @classmethod
    def qdrop(
        cls,
        weight_bits: int | None,
        activation_bits: int | None,
        *,
        p: float = 0.5,
        **options: Any,
    ) -> QConfig:
        """`lsq`, but in training only a random share p of each activation is quantized (QDrop, Wei
        et al. 2022, arXiv 2203.05740), see `QDropFakeQuantize`. The paper reconstructs a model
        after training so; that it trains one with labels here is ours."""
        weight = _spec(weight_bits, axis=0, symmetric=True, **_LSQ)
        return cls(weight, _spec(activation_bits, kind="qdrop", p=p, **_LSQ), **options)

    @staticmethod
    def matches(pattern: str, names: list[str]) -> bool:
        """Whether a pattern of overrides matches one of the names."""
        return any(fnmatchcase(name, pattern) for name in names)

    def widened(self) -> QConfig:
        """This config with at least first_last_bits bits."""
        if self.first_last_bits is None:
            return self
        bits = self.first_last_bits
        weight = self.weight and self.weight.widened(bits)
        activation = self.activation and self.activation.widened(bits)
        return replace(self, weight=weight, activation=activation)

    @property
    def random(self) -> bool:
        """Whether training draws masks somewhere, so that `prepare` needs a noise."""
        specs = (self.weight, self.activation)
        here = any(spec is not None and spec.random for spec in specs)
        return here or any(c is not None and c.random for c in self.overrides.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        return {
            "weight": self.weight and self.weight.to_dict(),
            "activation": self.activation and self.activation.to_dict(),
            "overrides": {k: v and v.to_dict() for k, v in self.overrides.items()},
            "first_last_bits": self.first_last_bits,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """The inverse of `to_dict`; unknown keys raise ValueError."""
        known_keys(cls, data)
        rest = dict(data)
        for name in ("weight", "activation"):
            spec = rest.get(name)
            rest[name] = spec if spec is None else QuantSpec.from_dict(spec)
        others = rest.get("overrides", {})
        rest["overrides"] = {k: v if v is None else cls.from_dict(v) for k, v in others.items()}
        return cls(**rest)


_LSQ: dict[str, Any] = {"method": "lsq", "learned": True, "clip": "value"}


def _spec(bits: int | None, **attributes: Any) -> QuantSpec | None:
    return None if bits is None else QuantSpec(bits, **attributes)


def _minmax_weight(bits: int | None) -> QuantSpec | None:
    return _spec(bits, axis=0, symmetric=True)


def _minmax_activation(bits: int | None) -> QuantSpec | None:
    return _spec(bits, ema=0.9)
