"""The work of the basin report: both arms, every way of quantizing, lines and planes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from qkernels.nn import QConfig, prepare

from .adaround import AdaRound, work
from .basin_probe import (
    Plane,
    Probe,
    Slice,
    State,
    angle,
    deployed_state,
    inside,
    inward_cosine,
    latent_state,
    loss_slice,
    profile,
    threshold,
    weight_names,
)
from .basin_result import QAT, RANGES, BasinReport, Moment, Solution, Width, rtn
from .basin_train import Batches, Schedule, Training, freeze_grid, require_whole
from .data import Batch
from .hessian import Loss
from .progress import Track
from .ptq import Rounding, ptq_qconfig, quantize
from .recipe import require
from .report import RESULTS, reading_results
from .rundir import RunDir, to_json, write_atomic
from .seeds import keeping_globals, seed_globals

Scores = tuple[float | None, float | None]  # loss, accuracy
LINES = 4


@dataclass(frozen=True)
class BasinConfig:
    """How the basin is looked for.

    Attributes:
        bits: of the weights; activations stay float.
        grid: where the scales of the shared grid are from: "minmax" or "mse", symmetric per output
            channel; taken from the float model, then frozen.
        first_last_bits: the first and last layer get at least so many; None: as the others.
        schedule: of QAT and of the float training that is its control.
        adaround: its settings.
        eps_relative, eps_absolute: of `basin_probe.threshold`.
        reestimate_batchnorm: give models that PTQ made BatchNorm statistics of their own, from the
            calibration set; else they have those of their float model, as deployed.
        profile_points: places on a line.
        slice_points: places along each axis of the plane; 0: no plane.
        seed: names all randomness.

    Raises:
        TypeError, ValueError: a value of another kind, or out of its range.
    """

    bits: Sequence[int] = (4, 3, 2)
    grid: str = "minmax"
    first_last_bits: int | None = 8
    schedule: Schedule = field(default_factory=Schedule)
    adaround: AdaRound = field(default_factory=AdaRound)
    eps_relative: float = 0.1
    eps_absolute: float = 0.05
    reestimate_batchnorm: bool = False
    profile_points: int = 21
    slice_points: int = 13
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        once = 0 < len(self.bits) == len(set(self.bits))
        require(once, "bits", "one or more, each once", self.bits, "basin")
        known = self.grid in RANGES
        require(known, "grid", f"one of {', '.join(RANGES)}", repr(self.grid), "basin")
        if self.first_last_bits is not None:
            require_whole("first_last_bits", self.first_last_bits, 1)
        for bits in self.bits:
            require_whole("bits", bits, 1)
            self.qconfig(bits)
        for name in ("eps_relative", "eps_absolute"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "at least 0 and finite", value, "basin")
        require_whole("seed", self.seed)
        require_whole("profile_points", self.profile_points, 2)
        points = self.slice_points
        require_whole("slice_points", points)
        require(points == 0 or points >= 2, "slice_points", "0, or at least 2", points, "basin")

    def qconfig(self, bits: int, method: str | None = None) -> QConfig:
        """Of a width; ``method`` instead of the grid's."""
        return ptq_qconfig(method or self.grid, bits, None, first_last_bits=self.first_last_bits)


@dataclass(frozen=True)
class Ground:
    """What is looked at.

    Attributes:
        model: float, in eval mode; not changed.
        batches: to train on.
        evaluation: what f is the mean over.
        calibration: what AdaRound learns from.
        loss: of training, and f.
        test: loss and accuracy of a model on a test set.
    """

    model: nn.Module
    batches: Batches
    evaluation: Sequence[Batch]
    calibration: Sequence[Batch]
    loss: Loss
    test: Callable[[nn.Module], Scores] | None = None


def measure(
    ground: Ground, config: BasinConfig, run: RunDir | None, *, quiet: bool = False
) -> BasinReport:
    """All figures of a model.

    Args:
        run: made already; arms and widths get directories of their own in it, and what is there
            already is gone on with. None: nothing is written.

    Raises:
        ValueError: the model cannot be quantized; no batches; files that are damaged.
        FloatingPointError: a training loss is no longer finite.
    """
    survey = Survey(ground, config, run)
    if run is not None:
        run.create()
    with Track(survey.work(), "basin", quiet=quiet) as bar:
        control = survey.more_float(bar)
        widths = tuple(survey.width(bits, control, bar) for bits in config.bits)
    home = survey.solution("float", survey.home)
    more = survey.solution("more float", control.state_dict(), control=True)
    return BasinReport(home, survey.limit, more, widths)


class Survey:
    """The state that the parts of a measurement share."""

    def __init__(self, ground: Ground, config: BasinConfig, run: RunDir | None) -> None:
        self.ground, self.config, self.run = ground, config, run
        sample = prepare(ground.model, config.qconfig(config.bits[0]))
        self.rounding_steps = work(sample, config.adaround)
        names = weight_names(sample)
        self.probe = Probe(ground.model, names, ground.evaluation, ground.loss)
        self.home: State = {k: v.detach().clone() for k, v in ground.model.state_dict().items()}
        self.origin = self.probe.vector(self.home)
        relative, absolute = config.eps_relative, config.eps_absolute
        self.limit = threshold(self.probe.loss(self.home), relative=relative, absolute=absolute)

    def work(self) -> int:
        """What the progress bar counts: training steps, AdaRound's, and places looked at."""
        return self.config.schedule.steps + len(self.config.bits) * self._work_of_width()

    def _work_of_width(self) -> int:
        config = self.config
        places = LINES * config.profile_points + config.slice_points**2
        return config.schedule.steps + 2 * self.rounding_steps + places

    def part(self, name: str) -> RunDir | None:
        """The directory of an arm or a width."""
        if self.run is None:
            return None
        recipe = {**self.run.config["recipe"], "part": name}
        return RunDir(self.run.file(name), {**self.run.config, "recipe": recipe})

    def solution(
        self, name: str, state: State, *, control: bool = False, away: Tensor | None = None
    ) -> Solution:
        """The figures of a state; ``away`` is the displacement that its own is held against."""
        loss, accuracy = self.probe.scores(state)
        test: Scores = (None, None)
        if self.ground.test is not None:
            test = self.ground.test(self.probe.model)
        moved = self.probe.vector(state) - self.origin
        distance = float(moved.norm())
        return Solution(
            name,
            control,
            loss,
            accuracy,
            *test,
            inside=inside(loss, self.limit),
            distance=distance,
            relative_distance=distance / float(self.origin.norm()),
            angle=None if away is None else angle(moved, away),
        )

    def more_float(self, bar: Track) -> nn.Module:
        """The control: the float model after the steps that QAT gets, on the same batches."""
        bar.relabel("more float training")
        model = copy.deepcopy(self.ground.model)
        self._train(model, lambda m: {"loss": self.probe.loss(m.state_dict())}, "float", bar)
        return model.eval()

    def _train(
        self, model: nn.Module, watch: Callable[[nn.Module], Any], part: str, bar: Track
    ) -> list[dict[str, Any]]:
        ground, config = self.ground, self.config
        how: dict[str, Any] = {"seed": config.seed, "run": self.part(part)}
        arm = Training(model, ground.batches, ground.loss, config.schedule, watch, **how)
        return arm.train(bar)

    def width(self, bits: int, control: nn.Module, bar: Track) -> Width:
        """All of one width: read back, or measured."""
        part = self.part(f"w{bits}")
        if part is not None and part.file(RESULTS).exists():
            bar.advance(self._work_of_width())
            with reading_results("basin", part.file(RESULTS)) as results:
                return Width.from_dict(results["width"])
        model, curve = self._qat(bits, bar)
        states = self._ptq(self.ground.model, bits, bar)
        nearest = states[rtn(self.config.grid)]
        away = self.probe.vector(nearest) - self.origin
        states[QAT] = deployed_state(model)
        solutions = [
            self.solution(name, state, away=None if state is nearest else away)
            for name, state in states.items()
        ]
        solutions += [
            self.solution(f"more float + {name}", state, control=True, away=away)
            for name, state in self._ptq(control, bits, bar).items()
        ]
        lines, plane = self._pictures(states, bits, bar)
        width = Width(bits, self.config.grid, tuple(solutions), curve, lines, plane)
        if part is not None:
            part.save_model(model.state_dict(), part.config)
            write_atomic(part.file(RESULTS), to_json({"width": asdict(width)}))
        return width

    def _qat(self, bits: int, bar: Track) -> tuple[nn.Module, tuple[Moment, ...]]:
        bar.relabel(f"QAT W{bits}")
        model = prepare(self.ground.model, self.config.qconfig(bits))
        freeze_grid(model)
        curve = self._train(model, self._watch, f"w{bits}", bar)
        return model.eval(), tuple(Moment(**record) for record in curve)

    def _watch(self, model: nn.Module) -> dict[str, Any]:
        probe, latent, deployed = self.probe, latent_state(model), deployed_state(model)
        place = probe.vector(deployed)
        latent_loss, latent_slope = probe.slope(latent)
        deployed_loss, deployed_slope = probe.slope(deployed)
        return {
            "latent_loss": latent_loss,
            "deployed_loss": deployed_loss,
            "latent_cosine": inward_cosine(latent_slope, place, self.origin),
            "deployed_cosine": inward_cosine(deployed_slope, place, self.origin),
            "latent_distance": float((probe.vector(latent) - self.origin).norm()),
            "deployed_distance": float((place - self.origin).norm()),
        }

    def _ptq(self, base: nn.Module, bits: int, bar: Track) -> dict[str, dict[str, Tensor]]:
        """States by name: rounded to nearest with each range, and by AdaRound on the grid."""
        config = self.config
        ways: list[tuple[str, str, Rounding]] = [(rtn(m), m, "nearest") for m in RANGES]
        ways.append(("AdaRound", config.grid, config.adaround))
        states = {}
        for name, method, rounding in ways:
            done = bar.done
            model, _ = quantize(
                base,
                config.qconfig(bits, method),
                self.ground.calibration,
                fold=False,
                rounding=rounding,
                seed=config.seed,
                track=bar,
            )
            if name == "AdaRound":
                # a layer that the batches never reach makes fewer steps
                bar.advance(max(0, self.rounding_steps - (bar.done - done)))
            states[name] = self._with_statistics(deployed_state(model))
        return states

    def _with_statistics(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state, with BatchNorm statistics of its own if they are asked for."""
        if not self.config.reestimate_batchnorm:
            return state
        model = copy.deepcopy(self.ground.model)
        model.load_state_dict(state)
        with keeping_globals():
            # the pass is one in training mode, and may drop out
            seed_globals(self.config.seed, 0, "basin/batchnorm")
            update_bn(self.ground.calibration, model)
        return {key: value.detach().clone() for key, value in model.state_dict().items()}

    def _pictures(
        self, states: Mapping[str, State], bits: int, bar: Track
    ) -> tuple[tuple[tuple[str, tuple[float, ...]], ...], Slice | None]:
        """f along the lines between the models, and in their plane."""
        bar.relabel(f"loss landscape W{bits}")
        config, nearest = self.config, rtn(self.config.grid)
        ends = {"float": self.home, **states}
        lines = [("float", nearest), ("float", "AdaRound"), ("float", QAT), (nearest, QAT)]
        profiles = []
        for start, end in lines:
            losses = profile(self.probe, ends[start], ends[end], config.profile_points)
            profiles.append((f"{start} to {end}", losses))
            bar.advance(config.profile_points)
        plane = None
        if config.slice_points:
            through = Plane.through(self.probe, self.home, ends[nearest], ends[QAT])
            if through is not None:
                plane = loss_slice(self.probe, through, config.slice_points)
            bar.advance(config.slice_points**2)
        return tuple(profiles), plane
