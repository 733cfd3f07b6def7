"""QuantSpec and QConfig: what is quantized, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from qkernels import numeric
from qkernels.ops import _check


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized. The names are those of `qkernels.fake_quant`.

    The range comes from one of three places:
        dynamic (learned=False, ema=None): from the tensor at hand, in every forward;
        running (ema given): from an average over training steps, see `FakeQuantize`;
        learned (learned=True): the scale is a parameter, trained with the gradient of LSQ.

    Attributes:
        bits: 1 .. 16.
        axis: dimension with one scale per entry; None: one scale for the tensor. For the weight of
            a ConvTranspose, 0 and 1 mean output and input channels as for the other layers; see
            `qkernels.nn.prepare`.
        group_size: one scale per run of group_size elements. Not together with axis.
        symmetric, narrow_range, percentile: as in `fake_quant`.
        method: "minmax", "percentile", "mse" or "lsq": how a range is taken from a tensor; for a
            learned scale, where it starts. "lsq" gives a scale and no range, so not with ema.
        learned: make the scale a parameter.
        clip: "code" or "value", see `fake_quant`.
        ema: decay d in [0, 1) of the running range, range <- d range + (1 - d) observed.

    Raises:
        TypeError, ValueError: an attribute that no op would take, or a pair that excludes itself.
    """

    bits: int
    axis: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    narrow_range: bool = False
    method: str = "minmax"
    percentile: float | None = None
    learned: bool = False
    clip: str = "code"
    ema: float | None = None

    def __post_init__(self) -> None:
        for name in ("symmetric", "narrow_range", "learned"):
            _require_type(name, getattr(self, name), bool, "a bool")
        for name in ("axis", "group_size"):
            if getattr(self, name) is not None:
                _require_type(name, getattr(self, name), int, "an int or None")
        numeric.code_range("QuantSpec", self.bits, self.symmetric, self.narrow_range)
        _check.as_percentile("QuantSpec", self.method, self.percentile)
        _check.check_choice("QuantSpec", "clip", self.clip, numeric.CLIPS)
        if self.group_size is not None and self.axis is not None:
            _fail("group_size", "None when axis is given", self.group_size)
        if self.group_size is not None and self.group_size < 1:
            _fail("group_size", "at least 1", self.group_size)
        self._check_ema()

    def _check_ema(self) -> None:
        if self.ema is None:
            return
        if isinstance(self.ema, bool) or not isinstance(self.ema, (int, float)):
            raise TypeError(f"QuantSpec: ema must be a number in [0, 1) or None, got {self.ema!r}")
        if not 0.0 <= self.ema < 1.0:
            _fail("ema", "in [0, 1) or None", self.ema)
        if self.learned:
            _fail("ema", "None when learned is True", self.ema)
        if self.method == "lsq":
            _fail("method", "minmax, percentile or mse when ema is given", repr(self.method))

    @property
    def dynamic(self) -> bool:
        """Whether the range is that of the tensor at hand, so that nothing is kept."""
        return not self.learned and self.ema is None

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one scale."""
        return self.axis is not None or self.group_size is not None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `fake_quant` and `error_stats` for a tensor of this kind."""
        kept = ("learned", "ema")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in kept}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of `to_dict`; unknown keys raise ValueError."""
        _known_keys(cls, data)
        return cls(**data)


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
            exception.

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
            weight_bits, activation_bits: 1 .. 16; None: not quantized.
            options: `overrides` and `first_last_bits`.
        """
        weight = activation = None
        if weight_bits is not None:
            weight = QuantSpec(weight_bits, axis=0, symmetric=True)
        if activation_bits is not None:
            activation = QuantSpec(activation_bits, ema=0.9)
        return cls(weight, activation, **options)

    @classmethod
    def lsq(cls, weight_bits: int | None, activation_bits: int | None, **options: Any) -> QConfig:
        """Learned scales (LSQ, Esser et al. 2019, arXiv 1902.08153).

        Weights: symmetric, per output channel. Activations: affine, per tensor; the zero point is
        that of the first batch (0 for x >= 0) and stays. Both start at 2 mean|x| / sqrt(Qp) and
        clip by value, as the paper does.

        Args:
            weight_bits, activation_bits: 1 .. 16; None: not quantized.
            options: `overrides` and `first_last_bits`.
        """
        learned: dict[str, Any] = {"method": "lsq", "learned": True, "clip": "value"}
        weight = activation = None
        if weight_bits is not None:
            weight = QuantSpec(weight_bits, axis=0, symmetric=True, **learned)
        if activation_bits is not None:
            activation = QuantSpec(activation_bits, **learned)
        return cls(weight, activation, **options)

    @staticmethod
    def matches(pattern: str, names: list[str]) -> bool:
        """Whether a pattern of overrides matches one of the names."""
        return any(fnmatchcase(name, pattern) for name in names)

    def widened(self) -> QConfig:
        """This config with at least first_last_bits bits."""
        if self.first_last_bits is None:
            return self

        def widen(spec: QuantSpec | None) -> QuantSpec | None:
            return spec and replace(spec, bits=max(spec.bits, self.first_last_bits or 0))

        return replace(self, weight=widen(self.weight), activation=widen(self.activation))

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
        _known_keys(cls, data)
        rest = dict(data)
        for name in ("weight", "activation"):
            spec = rest.get(name)
            rest[name] = spec if spec is None else QuantSpec.from_dict(spec)
        others = rest.get("overrides", {})
        rest["overrides"] = {k: v if v is None else cls.from_dict(v) for k, v in others.items()}
        return cls(**rest)


def _fail(name: str, rule: str, value: Any) -> None:
    raise ValueError(f"QuantSpec: {name} must be {rule}, got {value}")


def _require_type(name: str, value: Any, kind: type, rule: str) -> None:
    if type(value) is not kind:
        raise TypeError(f"QuantSpec: {name} must be {rule}, got {value!r}")


def _known_keys(cls: type, data: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    unknown = [k for k in data if k not in known]
    if unknown:
        raise ValueError(
            f"{cls.__name__}.from_dict: keys must be of {', '.join(known)}, got {unknown}"
        )
