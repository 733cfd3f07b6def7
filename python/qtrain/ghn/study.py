"""``qtrain ghn-study``: GHN-Q, GHN-QAT and their variants over seeds, evaluated on every split.

A variant is a training run that may start from another one. Studies share a directory, and with it
their runs: each run is made once, whoever asks for it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..progress import Track
from ..recipe import TrainConfig, require
from ..rundir import METRICS, read_json, read_metrics, to_json, write_atomic
from ..study import run_all
from .evaluate import EvalPlan, NetScore
from .evaluate_run import GhnSource, drawn, run_evaluation
from .quantizers import FLOAT_BITS, Quantizer
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
        train: likewise, of fields of `TrainConfig`; before the plan's.
    """

    name: str
    start: str | None = None
    ghn: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


def _quantized(kind: str, *bits: int, **ranges: Any) -> dict[str, Any]:
    return {"quantizer": Quantizer(kind, **ranges), "bits": bits}


# float is one of them, for it is evaluated too
WIDTHS = (8, 4, 2, FLOAT_BITS)
TOLD = {"bit_widths": True}
BARE = {"norm": False}
GENTLY = {"lr": 1e-4}
VARIANTS = {
    "q": Variant("GHN-Q"),
    "more": Variant("GHN-Q, longer", "q"),
    "w8": Variant("GHN-QAT W8A8", "q", training=_quantized("sim", 8)),
    "w4": Variant("GHN-QAT W4A4, SimQuant", "q", training=_quantized("sim", 4)),
    "w4-noise": Variant("GHN-QAT W4A4, NoiseQuant", "q", training=_quantized("noise", 4)),
    "w2-sim": Variant("GHN-QAT W2A2, SimQuant", "q", training=_quantized("sim", 2)),
    "w2": Variant("GHN-QAT W2A2, NoiseQuant", "q", training=_quantized("noise", 2)),
    "all-untold": Variant("all widths, untold", "q", training=_quantized("paper", *WIDTHS)),
    "all": Variant("all widths, told", "q", TOLD, _quantized("paper", *WIDTHS)),
    "mixed": Variant("mixed, told", "q", TOLD, {**_quantized("paper", *WIDTHS), "mixed": 0.5}),
    "low": Variant("low rank, GHN-Q", None, {"head": "low_rank", "rank": 16}),
    "low-more": Variant("low rank, longer", "low"),
    "low-w4": Variant("low rank, W4A4 SimQuant", "low", training=_quantized("sim", 4)),
    "low-w2": Variant("low rank, W2A2 NoiseQuant", "low", training=_quantized("noise", 2)),
    # fresh weights, whose first predictions are 50 times too small to let anything through without
    # BatchNorm, do not train; a GHN-Q's are too large
    "bare": Variant("BN-free GHN-Q", "q", {"gain": 0.6}, BARE, GENTLY),
    "bare-more": Variant("BN-free, longer", "bare", training=BARE, train=GENTLY),
    "bare-minmax": Variant(
        "BN-free W4A4, min-max", "bare", training={**BARE, **_quantized("sim", 4)}, train=GENTLY
    ),
    "bare-percentile": Variant(
        "BN-free W4A4, percentile",
        "bare",
        training={**BARE, **_quantized("sim", 4, method="percentile", percentile=99.0)},
        train=GENTLY,
    ),
}


@dataclass(frozen=True)
class Study:
    """Variants, in the order of the tables, and pairs of which the first is held against the
    second."""

    variants: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


STUDIES = {
    "quantized": Study(
        ("q", "more", "w8", "w4", "w2"), (("w8", "more"), ("w4", "more"), ("w2", "more"))
    ),
    "quantizers": Study(("w4", "w4-noise", "w2-sim", "w2"), (("w4-noise", "w4"), ("w2", "w2-sim"))),
    "bn-free": Study(
        ("bare", "bare-more", "bare-minmax", "bare-percentile"),
        (
            ("bare-minmax", "bare-more"),
            ("bare-percentile", "bare-more"),
            ("bare-percentile", "bare-minmax"),
        ),
    ),
    "heads": Study(
        ("more", "w4", "w2", "low-more", "low-w4", "low-w2"),
        (("low-more", "more"), ("low-w4", "w4"), ("low-w2", "w2")),
    ),
    "widths": Study(
        ("w8", "w4", "w2", "all-untold", "all", "mixed"),
        (("all", "w8"), ("all", "w4"), ("all", "w2"), ("all", "all-untold"), ("mixed", "all")),
    ),
}
# in the directory of a run that gave up
GAVE_UP = "gave-up.json"


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
            train={**self.train, **train, **variant.train, "seed": seed},
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

    @property
    def gave_up(self) -> str | None:
        """Why the run gave up, if it did."""
        file = self.folder() / GAVE_UP
        return read_json(file)["error"] if file.exists() else None


def _train(job: Job) -> None:
    variant = VARIANTS[job.slug]
    start = None if variant.start is None else Start.load(job.folder(variant.start))
    config, training = job.plan.settings(variant, job.seed, start)
    if job.gave_up is not None:
        return
    quiet = Track(0, "", quiet=True)
    try:
        run_ghn(config, training, job.folder(), start=start, cpu=True, track=quiet)
    except FloatingPointError as error:
        # a result, not an accident: that training is not stable is what some variants are there for
        write_atomic(job.folder() / GAVE_UP, to_json({"error": str(error)}))


def _evaluate(job: Job) -> list[NetScore]:
    """On networks that are not the training's: another split, and another seed; none for a run that
    gave up."""
    if job.gave_up is not None:
        return []
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
    """
    require(name in STUDIES, "study", f"one of {', '.join(STUDIES)}", repr(name), "ghn-study")
    numbers, out = sorted(set(seeds)), Path(out)
    require(bool(numbers), "seeds", "at least one", "none", "ghn-study")
    study = STUDIES[name]
    slugs = study.variants
    for slug in slugs:
        told = VARIANTS[slug].ghn == TOLD
        plan.evaluation.check(sorted({*VARIANTS[slug].training["bits"]}) if told else ())
    train_variants(slugs, plan, out, numbers, jobs)
    todo = [Job(slug, seed, plan, out) for slug in slugs for seed in numbers]
    runs = run_all(todo, _evaluate, label="evaluation", processes=jobs)
    found = {job.scores: scores for job, scores in runs}
    outcomes = [_outcome(job, found[job.scores]) for job in todo]
    pairs = [(VARIANTS[ours].name, VARIANTS[theirs].name) for ours, theirs in study.pairs]
    write_report(name, plan.preset, outcomes, pairs, out / name, asdict(plan))
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
    file = job.folder() / METRICS
    records = [r for r in read_metrics(file) if "loss" in r] if file.exists() else []
    losses = [record["loss"] for record in records if record["loss"] is not None] or [math.nan]
    last = records[-1] if records else {"skipped": 0, "exploded": 0, "step": 0}
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
