"""What can be measured at a point of weight space: the figures of the basin report.

Li, Ma, Cui, "Understanding QAT", arXiv 2606.09012. f is the mean loss over a fixed evaluation set,
the model in eval mode. w_fp is the float model, Q the rounding onto a frozen grid, and a point
counts as inside the basin of w_fp while f <= f(w_fp) + eps (`threshold`; the paper's basin is a
distance to a manifold of low loss, which nobody can measure: the loss stands in for it, our
choice).

Distances, angles and cosines are those of the quantized weights, as one vector in fp64. Where a
state is moved along a line or in a plane, all its floating entries move in proportion: biases and
normalization too, for QAT has changed them, and the ends of a line are the models themselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.nn import float_state_dict

from .adaround import weight_layers
from .hessian import Loss, Objective, cross_entropy, standing_still

State = Mapping[str, Tensor]  # of a float model


@torch.no_grad()
def deployed_state(model: nn.Module) -> dict[str, Tensor]:
    """The float state of a prepared model with each quantized weight on its grid: Q(w)."""
    on_grid = {id(m.weight): m.weight_fake_quant(m.weight) for m in weight_layers(model).values()}
    # a shared weight has several keys, and all of them are to hold the rounded one
    live = model.state_dict(keep_vars=True)
    return {
        key: on_grid.get(id(live[key]), value).detach().clone()
        for key, value in float_state_dict(model).items()
    }


def latent_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the float state of a prepared model, its weights as training holds them: w."""
    return {key: value.detach().clone() for key, value in float_state_dict(model).items()}


def weight_names(model: nn.Module) -> list[str]:
    """Keys of the quantized weights of a prepared model, each weight once."""
    wanted = {id(layer.weight) for layer in weight_layers(model).values()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


class Probe:
    """A float model in which states are tried out.

    Args:
        model: float; not changed.
        names: keys of the weights that are quantized.
        batches: the evaluation set.
        loss: of (model, batch): the mean over the batch's examples.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Iterable[Any],
        loss: Loss = cross_entropy,
    ) -> None:
        self.model, self.names = copy.deepcopy(model).eval(), list(names)
        self.model.requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.weights = [parameters[name].requires_grad_() for name in self.names]
        self.objective = Objective(self.model, batches, loss)

    def vector(self, state: State) -> Tensor:
        """The quantized weights of a state: [n], fp64."""
        return torch.cat([state[name].detach().flatten().double() for name in self.names])

    def scores(self, state: State) -> tuple[float, float | None]:
        """f and, for a `CrossEntropy` of classes, the accuracy."""
        self.model.load_state_dict(state)
        with standing_still(self.model):
            return self.objective.scores()

    def loss(self, state: State) -> float:
        return self.scores(state)[0]

    def slope(self, state: State) -> tuple[float, Tensor]:
        """f, and its gradient with respect to the quantized weights: [n], fp64."""
        self.model.load_state_dict(state)
        total, gradient = 0.0, torch.zeros(sum(w.numel() for w in self.weights))
        gradient = gradient.to(self.weights[0].device, torch.float64)
        objective = self.objective
        with standing_still(self.model), torch.enable_grad():
            for share, batch in zip(objective.shares, objective.batches, strict=True):
                value = objective.loss(self.model, batch)
                # a layer that this loss does not see has gradient 0
                how: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
                parts = torch.autograd.grad(value, self.weights, **how)
                flat = torch.cat([part.flatten().double() for part in parts])
                gradient.add_(flat, alpha=share)
                total += share * float(value.detach())
        return total, gradient


def threshold(home: float, *, relative: float, absolute: float) -> float:
    """The highest loss that counts as inside the basin: f(w_fp) + eps with
    eps = relative |f(w_fp)| + absolute."""
    return home + relative * abs(home) + absolute


def inside(loss: float, limit: float) -> bool:
    """Whether a loss is inside the basin: not for NaN. The exit test is its opposite,
    f(Q(w)) - f(w_fp) > eps."""
    return loss <= limit


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Of the angle between two vectors [n] of fp64; None if one is 0 or not finite."""
    norms = float(a.norm()) * float(b.norm())
    if norms == 0 or not math.isfinite(norms):
        return None
    return max(-1.0, min(1.0, float(a @ b) / norms))


def inward_cosine(gradient: Tensor, place: Tensor, home: Tensor) -> float | None:
    """cos(-gradient, home - place), all [n]: positive where descent leads back to ``home``."""
    return cosine(-gradient, home - place)


def angle(a: Tensor, b: Tensor) -> float | None:
    """Between two displacements [n], in degrees; None if one is 0."""
    value = cosine(a, b)
    return None if value is None else math.degrees(math.acos(value))


def first_entry(curve: Iterable[tuple[int, float]], limit: float) -> int | None:
    """The first step of a curve (step, deployed loss) that is inside the basin; None: none is."""
    return next((step for step, loss in curve if inside(loss, limit)), None)


def blend(states: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    """sum of share * state over all floating entries; the shares sum to 1.

    Other entries (counters) are those of the first state. A running variance that extrapolation
    made negative becomes 0.
    """
    mixed: dict[str, Tensor] = {}
    for key, first in states[0].items():
        if not first.is_floating_point():
            mixed[key] = first
            continue
        value = sum(
            share * state[key].double() for share, state in zip(shares, states, strict=True)
        )
        assert isinstance(value, Tensor), "there is at least one state"
        if key.rpartition(".")[2] == "running_var":
            value = value.clamp(min=0)
        mixed[key] = value.to(first.dtype)
    return mixed


def profile(probe: Probe, start: State, end: State, points: int) -> tuple[float, ...]:
    """f at ``points`` evenly spaced places of the line from one state to another, both included."""
    places = [number / (points - 1) for number in range(points)]
    return tuple(probe.loss(blend([start, end], [1 - t, t])) for t in places)


@dataclass(frozen=True)
class Slice:
    """f in the plane through three models: w_fp at (0, 0), PTQ on the first axis.

    Attributes:
        ptq, qat: their places, in units of the weights' distance.
        first, second: coordinates along the axes.
        losses: [second][first].
    """

    ptq: tuple[float, float]
    qat: tuple[float, float]
    first: tuple[float, ...]
    second: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Slice:
        """The inverse of ``asdict``, also through JSON."""
        lists = {key: tuple(value[key]) for key in ("ptq", "qat", "first", "second")}
        return cls(**lists, losses=tuple(tuple(row) for row in value["losses"]))


@dataclass(frozen=True)
class Plane:
    """The plane through three states, its axes by Gram-Schmidt on their quantized weights.

    Attributes:
        states: w_fp, PTQ, QAT.
        ptq, qat: coordinates of the latter two; ptq[1] is 0.
    """

    states: tuple[State, State, State]
    ptq: tuple[float, float]
    qat: tuple[float, float]

    @classmethod
    def through(cls, probe: Probe, home: State, ptq: State, qat: State) -> Plane | None:
        """None if the three lie on a line."""
        origin = probe.vector(home)
        first, other = probe.vector(ptq) - origin, probe.vector(qat) - origin
        length = float(first.norm())
        along = float(other @ first) / length if length > 0 else 0.0
        across = float((other - along * first / length).norm()) if length > 0 else 0.0
        if across <= 1e-9 * max(length, abs(along)):
            return None
        return cls((home, ptq, qat), (length, 0.0), (along, across))

    def state(self, first: float, second: float) -> dict[str, Tensor]:
        """The state at a place of the plane; the corners are the three states."""
        qat = second / self.qat[1]
        ptq = (first - qat * self.qat[0]) / self.ptq[0]
        return blend(self.states, (1 - ptq - qat, ptq, qat))


def loss_slice(probe: Probe, plane: Plane, points: int, *, margin: float = 0.25) -> Slice:
    """f on a grid of points x points around the three models.

    Args:
        margin: by how much the grid goes beyond them, in shares of its sides.
    """
    corners = ((0.0, 0.0), plane.ptq, plane.qat)
    axes = []
    for values in zip(*corners, strict=True):
        low, high = min(values), max(values)
        beyond = margin * (high - low)
        step = (high - low + 2 * beyond) / (points - 1)
        axes.append(tuple(low - beyond + step * number for number in range(points)))
    first, second = axes
    losses = tuple(tuple(probe.loss(plane.state(a, b)) for a in first) for b in second)
    return Slice(plane.ptq, plane.qat, first, second, losses)
