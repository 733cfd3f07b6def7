"""``qtrain ghn-study``: GHN-Q, GHN-QAT and their variants over seeds, evaluated on every split.

A variant is a training run that may start from another one. Studies share a directory, and with it
their runs: each run is made once, whoever asks for it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..progress import Track
from ..recipe import TrainConfig, require
from ..rundir import METRICS, read_metrics
from ..study import run_all
from .evaluate import EvalPlan, NetScore
from .evaluate_run import GhnSource, drawn, run_evaluation
from .quantizers import Quantizer
from .run import run_ghn, settings_for
from .study_report import Outcome, write_report
from .train import GhnTraining, Start


@dataclass(frozen=True)
class Variant:
    """A way to train a GHN.

    Attributes:
        name: in the tables.
        start: slug of the variant that it starts from, and trains on for the shorter time; None:
            fresh weights.
        ghn, training: what differs from the preset's settings.
    """

    name: str
    start: str | None = None
    ghn: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def _quantized(kind: str, *bits: int, **ranges: Any) -> dict[str, Any]:
    return {"quantizer": Quantizer(kind, **ranges), "bits": bits}


TOLD = {"bit_widths": True}
BARE = {"norm": False}
VARIANTS = {
    "q": Variant("GHN-Q"),
    "more": Variant("GHN-Q, longer", "q"),
    "w8": Variant("GHN-QAT W8A8", "q", training=_quantized("sim", 8)),
    "w4": Variant("GHN-QAT W4A4, SimQuant", "q", training=_quantized("sim", 4)),
    "w4-noise": Variant("GHN-QAT W4A4, NoiseQuant", "q", training=_quantized("noise", 4)),
    "w2-sim": Variant("GHN-QAT W2A2, SimQuant", "q", training=_quantized("sim", 2)),
    "w2": Variant("GHN-QAT W2A2, NoiseQuant", "q", training=_quantized("noise", 2)),
    "all-untold": Variant("all widths, untold", "q", training=_quantized("paper", 8, 4, 2)),
    "all": Variant("all widths, told", "q", TOLD, _quantized("paper", 8, 4, 2)),
    "mixed": Variant("mixed, told", "q", TOLD, {**_quantized("paper", 8, 4, 2), "mixed": 0.5}),
    "low": Variant("low rank, GHN-Q", None, {"head": "low_rank", "rank": 16}),
    "low-w4": Variant("low rank, W4A4 SimQuant", "low", training=_quantized("sim", 4)),
    "low-w2": Variant("low rank, W2A2 NoiseQuant", "low", training=_quantized("noise", 2)),
    "bare": Variant("BN-free GHN-Q", None, training=BARE),
    "bare-minmax": Variant(
        "BN-free W4A4, min-max", "bare", training={**BARE, **_quantized("sim", 4)}
    ),
    "bare-percentile": Variant(
        "BN-free W4A4, percentile",
        "bare",
        training={**BARE, **_quantized("sim", 4, method="percentile", percentile=99.0)},
    ),
}
# the variants of each study; the first is the one that the others are held against
STUDIES: dict[str, tuple[str, ...]] = {
    "quantized": ("more", "q", "w8", "w4", "w2"),
    "quantizers": ("w4", "w4-noise", "w2-sim", "w2"),
    "bn-free": ("bare", "bare-minmax", "bare-percentile"),
    "heads": ("q", "w4", "w2", "low", "low-w4", "low-w2"),
    "widths": ("more", "w8", "w4", "w2", "all-untold", "all", "mixed"),
}


@dataclass(frozen=True)
class Plan:
    """What all variants share.

    Attributes:
        preset: of `qtrain.ghn.run.PRESETS`.
        epochs, tuning_epochs: of variants with fresh weights, and of those that start from another.
        lr, tuning_lr: likewise; None: the preset's, and half of it.
        train: other fields of `TrainConfig`.
        nets: of each split, to evaluate on.
        evaluation: see `EvalPlan`.
    """

    preset: str = "digits"
    epochs: int = 100
    tuning_epochs: int = 50
    lr: float | None = None
    tuning_lr: float | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    nets: int = 20
    splits: tuple[str, ...] | None = None
    evaluation: EvalPlan = field(default_factory=lambda: EvalPlan(mixed=(8, 4, 2)))

    def settings(
        self, variant: Variant, seed: int, start: Start | None
    ) -> tuple[TrainConfig, GhnTraining]:
        """Raises: as `settings_for`."""
        first = settings_for(self.preset, train=self.train)[0]
        lr = first.lr if self.lr is None else self.lr
        train = {"epochs": self.epochs, "lr": lr}
        if variant.start is not None:
            lower = lr / 2 if self.tuning_lr is None else self.tuning_lr
            train = {"epochs": self.tuning_epochs, "lr": lower}
        return settings_for(
            self.preset,
            train={**self.train, **train, "seed": seed},
            ghn=variant.ghn,
            training={**self.training, **variant.training, "net_seed": seed},
            start=start,
        )


@dataclass(frozen=True)
class Job:
    """A variant with a seed: its run, and its evaluation."""

    slug: str
    seed: int
    plan: Plan
    out: Path

    def folder(self, slug: str | None = None) -> Path:
        return self.out / "runs" / (slug or self.slug) / f"seed{self.seed}"

    @property
    def scores(self) -> Path:
        return self.out / "scores" / self.slug / f"seed{self.seed}"


def _train(job: Job) -> None:
    variant = VARIANTS[job.slug]
    start = None if variant.start is None else Start.load(job.folder(variant.start))
    config, training = job.plan.settings(variant, job.seed, start)
    quiet = Track(0, "", quiet=True)
    run_ghn(config, training, job.folder(), start=start, cpu=True, track=quiet)


def _evaluate(job: Job) -> list[NetScore]:
    """On networks that are not the training's: another split, and another seed."""
    source = GhnSource.load(job.folder())
    plan, seed = job.plan, job.seed + 1000
    nets = drawn(source.space, plan.splits, count=plan.nets, seed=seed, quiet=True)
    return run_evaluation(source, nets, job.scores, plan.evaluation, cpu=True, quiet=True)


def run_study(
    name: str, plan: Plan, out: str | Path, *, seeds: Iterable[int] = range(3), jobs: int = 2
) -> list[Outcome]:
    """Train and evaluate what is not yet there, and write report.md, results.json and a picture.

    Args:
        name: of ``STUDIES``.
        jobs: runs at a time, each in a process of its own on the CPU with one thread.

    Raises:
        ValueError: an unknown study; bad settings; ``out`` holds runs with other settings.
        FloatingPointError: a run with too many steps whose gradient was not finite.
    """
    require(name in STUDIES, "study", f"one of {', '.join(STUDIES)}", repr(name), "ghn-study")
    numbers, out = sorted(set(seeds)), Path(out)
    require(bool(numbers), "seeds", "at least one", "none", "ghn-study")
    slugs = STUDIES[name]
    train_variants(slugs, plan, out, numbers, jobs)
    todo = [Job(slug, seed, plan, out) for slug in slugs for seed in numbers]
    runs = run_all(todo, _evaluate, label="evaluation", processes=jobs)
    found = {job.scores: scores for job, scores in runs}
    outcomes = [_outcome(job, found[job.scores]) for job in todo]
    write_report(name, plan.preset, outcomes, out / name, asdict(plan))
    return outcomes


def train_variants(
    slugs: Sequence[str], plan: Plan, out: Path, seeds: Sequence[int], jobs: int
) -> None:
    """Train what is not yet there, and first what it starts from. Raises: as `run_study`."""
    for wave in waves(slugs):
        todo = [Job(slug, seed, plan, out) for seed in seeds for slug in wave]
        for _ in run_all(todo, _train, label=f"training {', '.join(wave)}", processes=jobs):
            pass


def waves(slugs: Sequence[str]) -> list[list[str]]:
    """The variants and what they start from, in an order in which they can run: those of a wave
    start from nothing, or from an earlier one."""
    chain = list(slugs)
    for slug in chain:
        start = VARIANTS[slug].start
        if start is not None and start not in chain:
            chain.append(start)
    found: list[list[str]] = []
    done: set[str | None] = {None}
    while len(done) <= len(chain):
        wave = [slug for slug in chain if slug not in done and VARIANTS[slug].start in done]
        found.append(wave)
        done |= set(wave)
    return found


def _outcome(job: Job, scores: list[NetScore]) -> Outcome:
    records = [r for r in read_metrics(job.folder() / METRICS) if "loss" in r]
    losses = [record["loss"] for record in records if record["loss"] is not None]
    last = records[-1]
    return Outcome(
        variant=VARIANTS[job.slug].name,
        seed=job.seed,
        scores=tuple(scores),
        loss=losses[-1],
        highest=max(losses),
        skipped=last["skipped"],
        exploded=last["exploded"],
        steps=last["step"],
    )
