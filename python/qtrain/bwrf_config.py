"""The settings of BWRF; `qtrain.bwrf` says what they do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from .recipe import require

MODES = ("prefix", "single", "sampled")
SCHEDULES = ("linear", "exponential")
EFFECTS = ("both", "forward", "backward")

_require = partial(require, op="bwrf")


@dataclass(frozen=True)
class BwrfConfig:
    """What is replaced, and how it enters the loss. The paper's full text could not be had: all
    defaults here are our choice but for what the modes have in common.

    Attributes:
        blocks: names of the modules that end the blocks; None: found by `find_blocks`.
        mode: "prefix": M_k = F_n .. F_{k+1} Q_k .. Q_1 for k = 1 .. n-1, all at every step;
            "sampled": one of these a step, each equally often, so that the loss is that of "prefix"
            in the mean; "single": M_k is F with block k alone replaced, for k = 1 .. n.
        block: the one k of mode "single"; None: all.
        temperature: T of KD(z, z_F) = T^2 KL(softmax(z_F / T) || softmax(z / T)).
        alpha: weight of KD(z_Q, z_F).
        beta: weight of the mean over k of KD(z_Mk, z_F); 0: no mixed network is run.
        schedule: None: all M_k from the first step. Else M_1 .. M_m, where m grows over the run's
            progress p in [0, 1] from 1 to K, the last k of the mode: m = floor(1 + K p) ("linear")
            or floor((K + 1)^p) ("exponential": slow at first), at most K.
        effect: which of the two effects of replacement is at work. "forward": z_Mk counts with its
            value, but its gradient goes straight to z_Q and not through F's blocks. "backward":
            the value is z_Q's, the gradient that of z_Mk, through F's blocks. "both": neither is
            taken out.
    """

    blocks: tuple[str, ...] | None = None
    mode: str = "prefix"
    block: int | None = None
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 1.0
    schedule: str | None = None
    effect: str = "both"

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("schedule", SCHEDULES), ("effect", EFFECTS)):
            value = getattr(self, name)
            optional = name == "schedule" and value is None
            _require(optional or value in known, name, f"one of {', '.join(known)}", repr(value))
        for name in ("temperature", "alpha", "beta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number, name, "a number", repr(value))
            _require(0 <= value < math.inf, name, "at least 0 and finite", value)
        _require(self.temperature > 0, "temperature", "positive and finite", self.temperature)
        if self.block is not None:
            _require(type(self.block) is int, "block", "a whole number or None", repr(self.block))
            _require(self.mode == "single", "block", "None unless mode is single", self.block)
            _require(self.schedule is None, "schedule", "None with a single block", self.schedule)


def scheduled(schedule: str, progress: float, last: int) -> int:
    """How many of the mixed networks 1 .. last take part, see `BwrfConfig`."""
    reached = 1 + last * progress if schedule == "linear" else (last + 1) ** progress
    return min(last, math.floor(reached))
