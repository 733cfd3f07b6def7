"""QuantSpec: how one kind of tensor is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qkernels import numeric
from qkernels.ops import _check

_PAPERS_ALONE = {
    "axis": None,
    "group_size": None,
    "symmetric": False,
    "narrow_range": False,
    "method": "minmax",
    "learned": False,
    "ema": None,
    "learned_zero_point": False,
}
# kind -> the attributes in which it leaves no choice
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pact": {
        "learned": True,
        "learned_zero_point": False,
        "symmetric": False,
        "axis": None,
        "group_size": None,
        "clip": "code",
    },
    "dorefa_weight": {**_PAPERS_ALONE, "clip": "code"},
    "dorefa_activation": _PAPERS_ALONE,
    "quant_noise": {"learned": False},
    "qdrop": {},
}
# the kinds with a random mask, of which p is the share
RANDOM = ("quant_noise", "qdrop")
# what stands in for a kind in layers that get more bits: its paper leaves those float
_WIDE: dict[str, dict[str, Any]] = {
    "dorefa_weight": {"kind": "plain", "axis": 0, "symmetric": True},
    "dorefa_activation": {"kind": "plain", "ema": 0.9, "clip": "code"},
}
# attributes younger than the first run directories: a config from before has no such keys
_YOUNGER = ("learned_zero_point", "kind", "p")


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
        learned_zero_point: make the zero point a parameter too (LSQ+): affine and learned only.
        kind: which module does it, see `fake_quantizer`:
            "plain": `FakeQuantize`;
            "pact": `PactFakeQuantize`, a learned width of the range; affine, per tensor, learned;
            "dorefa_weight": `DorefaWeightFakeQuantize`; only bits can be chosen;
            "dorefa_activation": `DorefaActivationFakeQuantize`; only bits and clip;
            "quant_noise": `QuantNoiseFakeQuantize`, not learned;
            "qdrop": `QDropFakeQuantize`.
        p: for quant_noise and qdrop, the probability that an element is quantized in training.

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
    learned_zero_point: bool = False
    kind: str = "plain"
    p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("symmetric", "narrow_range", "learned", "learned_zero_point"):
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
        self._check_kind()

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

    def _check_kind(self) -> None:
        _check.check_choice("QuantSpec", "kind", self.kind, tuple(KINDS))
        for name, value in KINDS[self.kind].items():
            if getattr(self, name) != value:
                _fail(name, f"{value!r} for kind {self.kind}", repr(getattr(self, name)))
        if self.learned_zero_point and (self.symmetric or not self.learned):
            _fail("learned_zero_point", "False unless learned and not symmetric", True)
        _check.check_probability("QuantSpec", "p", self.p)
        if self.p != 1.0 and not self.random:
            _fail("p", f"1 unless kind is {' or '.join(RANDOM)}", self.p)

    @property
    def dynamic(self) -> bool:
        """Whether the range is that of the tensor at hand, so that nothing is kept."""
        return not self.learned and self.ema is None and self.kind != "dorefa_activation"

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one scale."""
        return self.axis is not None or self.group_size is not None

    @property
    def random(self) -> bool:
        """Whether training draws a mask, for which it needs a `Noise`."""
        return self.kind in RANDOM

    def require_plain(self, op: str, argument: str) -> None:
        """Raise ValueError, in the name of an argument of an op, if the kind is one whose quantized
        values are not those of `fake_quant` with `options` and the range of the tensor at hand."""
        if self.kind not in ("plain", *RANDOM):
            raise ValueError(f"{op}: {argument} must be of kind plain, got {self.kind}")

    def widened(self, bits: int) -> QuantSpec:
        """This with at least so many bits; if it was DoReFa's, min-max, see `QConfig.dorefa`."""
        return replace(self, bits=max(self.bits, bits), **_WIDE.get(self.kind, {}))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `fake_quant` and `error_stats` for a tensor of this kind; see
        `require_plain`."""
        kept = ("learned", "ema", *_YOUNGER)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in kept}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it. learned_zero_point, kind and p stand in it only where
        they are not the default, so that configs written before they came are still the same."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        usual = {f.name for f in fields(self) if values[f.name] == f.default}
        return {k: v for k, v in values.items() if k not in _YOUNGER or k not in usual}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of `to_dict`; unknown keys raise ValueError."""
        known_keys(cls, data)
        return cls(**data)


def _fail(name: str, rule: str, value: Any) -> None:
    raise ValueError(f"QuantSpec: {name} must be {rule}, got {value}")


def _require_type(name: str, value: Any, kind: type, rule: str) -> None:
    if type(value) is not kind:
        raise TypeError(f"QuantSpec: {name} must be {rule}, got {value!r}")


def known_keys(cls: type, data: Mapping[str, Any]) -> None:
    """Raise on keys that are no fields of a dataclass."""
    known = [f.name for f in fields(cls)]
    unknown = [k for k in data if k not in known]
    if unknown:
        raise ValueError(
            f"{cls.__name__}.from_dict: keys must be of {', '.join(known)}, got {unknown}"
        )
