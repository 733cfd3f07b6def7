"""What the basin report has found, and what it says about it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .basin_probe import Slice, first_entry, inside

QAT = "QAT"
RANGES = {"minmax": "min-max", "mse": "MSE"}
ENOUGH, NEEDED = "PTQ is enough", "QAT is needed"
FLOAT_ENOUGH, NEITHER = "more float training is enough", "neither PTQ nor QAT is enough"
# the deployed loss fell "before the latent one moved" if that changed by less than this share of
# the fall (our choice; the paper shows curves)
MOVED = 0.1


def rtn(method: str) -> str:
    """What rounding to nearest is called, on the grid of a range method."""
    return f"RTN {RANGES[method]}"


@dataclass(frozen=True)
class Solution:
    """One way to a quantized model.

    Attributes:
        name: "RTN min-max", "AdaRound", "QAT", "more float + AdaRound", ..
        control: whether it had the equal budget of float training first.
        loss, accuracy: on the evaluation set; the accuracy is None for a loss without one.
        test_loss, test_accuracy: on the test set, if there is one.
        inside: whether ``loss`` is inside the basin of the float model.
        distance: norm of its quantized weights less those of the float model.
        relative_distance: that over the norm of the float model's.
        angle: between this displacement and that of RTN on the shared grid, in degrees; None for
            RTN itself, and where one of them is 0.
    """

    name: str
    control: bool
    loss: float
    accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    inside: bool
    distance: float
    relative_distance: float
    angle: float | None


@dataclass(frozen=True)
class Moment:
    """A look at the evaluation set during QAT.

    Attributes:
        latent_loss, deployed_loss: f(w) and f(Q(w)).
        latent_cosine, deployed_cosine: cos(-grad f(w), w_fp - Q(w)) and cos(-grad f(Q(w)),
            w_fp - Q(w)): above 0, descent there leads back to the float model.
        latent_distance, deployed_distance: |w - w_fp| and |Q(w) - w_fp|.
        train_loss: of the batch of this step; None before the first.
    """

    step: int
    train_loss: float | None
    latent_loss: float
    deployed_loss: float
    latent_cosine: float | None
    deployed_cosine: float | None
    latent_distance: float
    deployed_distance: float


class Fall(NamedTuple):
    """When the deployed loss had made half of its way down.

    Attributes:
        fall: how far it had come.
        latent_change: by how much the latent loss was above its start.
    """

    step: int
    fall: float
    latent_change: float

    @property
    def before_latent(self) -> bool:
        """Whether the latent loss had hardly moved."""
        return abs(self.latent_change) < MOVED * self.fall


@dataclass(frozen=True)
class Width:
    """All figures of a bit width.

    Attributes:
        grid: method of the shared grid: "minmax" or "mse".
        solutions: of PTQ, QAT and the control.
        curve: of QAT.
        profiles: (name, f) for lines between two models ("float to QAT"), at even distances.
        plane: f in the plane through w_fp, RTN and QAT; None where they lie on a line, or not asked
            for.
    """

    bits: int
    grid: str
    solutions: tuple[Solution, ...]
    curve: tuple[Moment, ...]
    profiles: tuple[tuple[str, tuple[float, ...]], ...]
    plane: Slice | None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Width:
        """The inverse of ``asdict``, also through JSON."""
        plane = value["plane"]
        return cls(
            bits=value["bits"],
            grid=value["grid"],
            solutions=tuple(Solution(**solution) for solution in value["solutions"]),
            curve=tuple(Moment(**moment) for moment in value["curve"]),
            profiles=tuple((name, tuple(line)) for name, line in value["profiles"]),
            plane=None if plane is None else Slice.from_dict(plane),
        )

    def named(self, name: str) -> Solution:
        """Raises: KeyError if there is no such solution."""
        found = {solution.name: solution for solution in self.solutions}
        return found[name]

    @property
    def nearest(self) -> Solution:
        """RTN on the shared grid: Q(w_fp)."""
        return self.named(rtn(self.grid))

    @property
    def qat(self) -> Solution:
        return self.named(QAT)

    @property
    def ptq(self) -> list[Solution]:
        """Those without any training."""
        return [s for s in self.solutions if not s.control and s.name != QAT]

    @property
    def control(self) -> list[Solution]:
        return [s for s in self.solutions if s.control]

    def entry(self, limit: float) -> int | None:
        """The first step that was looked at with the deployed loss inside the basin: 0 if RTN never
        left it; None if QAT never came in."""
        return first_entry(((m.step, m.deployed_loss) for m in self.curve), limit)

    @property
    def half_fall(self) -> Fall | None:
        """None if the deployed loss did not fall."""
        first, last = self.curve[0], self.curve[-1]
        half = (first.deployed_loss + last.deployed_loss) / 2
        if not last.deployed_loss < first.deployed_loss:
            return None
        at = next(m for m in self.curve if m.deployed_loss <= half)
        fall = first.deployed_loss - at.deployed_loss
        return Fall(at.step, fall, at.latent_loss - first.latent_loss)


def best(solutions: Sequence[Solution]) -> Solution:
    """That of the lowest loss; a NaN is the highest."""
    return min(solutions, key=lambda s: (s.loss != s.loss, s.loss))


def answer(width: Width) -> str:
    """Is PTQ enough at this width, or is QAT needed? By the evaluation loss alone."""
    if any(s.inside for s in width.ptq):
        return ENOUGH
    if any(s.inside for s in width.control):
        return FLOAT_ENOUGH
    return NEEDED if width.qat.inside else NEITHER


def verdict(width: Width, home: float, limit: float) -> str:
    """The figures of a width in words.

    Args:
        home: f(w_fp).
        limit: the highest loss inside the basin.
    """
    parts = [_of_ptq(width, home), _of_qat(width, limit)]
    if width.control:
        control = best(width.control)
        where = "inside" if control.inside else "outside"
        parts.append(
            f"with the same steps of float training first, PTQ is {where} ({control.name}, loss "
            f"{control.loss:.3g})"
        )
    return f"at W{width.bits} {'; '.join(parts)}: {answer(width)}"


def _of_ptq(width: Width, home: float) -> str:
    stay = [s for s in width.ptq if s.inside]
    leave = [s for s in width.ptq if not s.inside]
    named = {
        kind: ", ".join(f"{s.name} {s.loss:.3g}" for s in some)
        for kind, some in (("stay", stay), ("leave", leave))
    }
    against = f"against {home:.3g}"
    if not leave:
        return f"PTQ stays in the basin: loss {named['stay']} {against}"
    if not stay:
        return f"PTQ leaves the basin: loss {named['leave']} {against}"
    return (
        f"PTQ leaves the basin by some ways (loss {named['leave']} {against}) and stays in it by "
        f"others ({named['stay']})"
    )


def _of_qat(width: Width, limit: float) -> str:
    entry, last = width.entry(limit), width.curve[-1]
    loss = f"loss {width.qat.loss:.3g}"
    if entry is None:
        return f"QAT did not come into it in {last.step} steps ({loss})"
    how = "started inside" if entry == 0 else f"came back at step {entry}"
    if not width.qat.inside:
        return f"QAT {how} but ended outside ({loss})"
    if any(not inside(m.deployed_loss, limit) for m in width.curve if m.step > entry):
        how += ", was outside on the way"
    return f"QAT {how} and ended inside ({loss})"


@dataclass(frozen=True)
class BasinReport:
    """What `qtrain.basin` returns.

    Attributes:
        home: the float model, as a solution at distance 0.
        limit: the highest loss inside its basin.
        more_float: the float model after the equal budget of training.
        widths: by bit width, as asked for.
    """

    home: Solution
    limit: float
    more_float: Solution
    widths: tuple[Width, ...]

    @property
    def verdict(self) -> list[str]:
        """A sentence for each bit width."""
        return [verdict(width, self.home.loss, self.limit) for width in self.widths]

    def width(self, bits: int) -> Width:
        """Raises: KeyError if that width was not asked for."""
        return {width.bits: width for width in self.widths}[bits]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of what JSON knows, the sentences too."""
        return {**asdict(self), "verdict": self.verdict}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> BasinReport:
        """The inverse of ``to_dict``, also through JSON."""
        return cls(
            home=Solution(**value["home"]),
            limit=value["limit"],
            more_float=Solution(**value["more_float"]),
            widths=tuple(Width.from_dict(width) for width in value["widths"]),
        )
