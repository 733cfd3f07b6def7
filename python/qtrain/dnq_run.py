"""A whole DNQ run: settings by dataset, training, quantization in every usual way, one report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from qkernels.nn import fold_batchnorm

from .adaround import AdaRound
from .data import Dataset
from .dnq import Dnq, DnqConfig
from .loop import TrainResult, train
from .progress import Track
from .ptq import calibration_images, ptq_qconfig, sweep
from .recipe import TrainConfig, require
from .report import (
    ACCURACY,
    CURVES,
    REPORT,
    RESULTS,
    Row,
    markdown_table,
    plot_accuracy,
    plot_curves,
    read_rows,
)
from .rundir import read_json, to_json, write_atomic

SHARED: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "swa_start": 0.75,
    "lr": 0.05,
    "batch_size": 64,
}
# narrow nets and hard pictures on purpose: where rounding does not hurt there is nothing to learn
DEEP_CNN = {"widths": [8, 8, 8, 16, 16, 16, 32, 32], "strides": [1, 1, 1, 2, 1, 1, 2, 1]}
LARGE = {"batch_size": 128, "lr": 0.1, "eval_every": 10}
# "paper" is what the summaries of arXiv 2511.01462 tell; its model, batch and rate are our choice
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "cnn", "model_options": DEEP_CNN, "epochs": 40, "eval_every": 5},
    "shapes": {
        "model": "resnet8",
        "model_options": {"width": 8},
        "data_options": {"difficulty": 0.7, "train_size": 2560},
        "epochs": 20,
        "eval_every": 5,
    },
    "cifar10": {"model": "resnet20", "epochs": 200, **LARGE},
    "cifar100": {"model": "resnet20", "epochs": 200, **LARGE},
    "imagefolder": {"model": "torchvision/resnet18", "epochs": 90, **LARGE, "batch_size": 256},
    "paper": {
        "dataset": "cifar100",
        "model": "resnet20",
        "model_options": {"width": 64},
        "epochs": 400,
        **LARGE,
    },
}


def settings_for(preset: str, **changed: Any) -> TrainConfig:
    """The settings of a preset: a dataset's name, or "paper".

    Args:
        changed: fields of ``TrainConfig`` that differ from the preset; of model_options and
            data_options the entries that differ. Another model or dataset starts without the
            preset's options for its own.

    Raises:
        ValueError: no such preset; a bad setting.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"dnq: preset or dataset must be one of {', '.join(PRESETS)}, got {preset!r}"
        )
    settings = {**SHARED, "dataset": preset, **PRESETS[preset]}
    for name, options in (("model", "model_options"), ("dataset", "data_options")):
        same = changed.get(name, settings[name]) == settings[name]
        given = changed.get(options, {})
        if same and isinstance(given, Mapping):
            changed[options] = {**settings.get(options, {}), **given}
    return TrainConfig(**{**_without_options(settings), **changed})


def _without_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if not k.endswith("_options")}


def phases(epochs: int, **changed: Any) -> dict[str, Any]:
    """The paper's proportions: half the epochs warm-up, a quarter in which the noise grows, and a
    quarter in which it is full and the weights are averaged."""
    return {"warmup_epochs": epochs // 2, "ramp_epochs": epochs // 4, **changed}


@dataclass(frozen=True)
class PtqPlan:
    """How a trained model is quantized, in all combinations; W and A have the same bits.

    Attributes:
        images: of the calibration set.
        adaround: None: no AdaRound.

    Raises:
        ValueError: nothing to do, or a quantization that there is not.
    """

    bits: tuple[int, ...] = (8, 4, 3, 2)
    methods: tuple[str, ...] = ("minmax", "percentile", "mse")
    folds: tuple[bool, ...] = (True, False)
    percentile: float = 99.9
    images: int = 100
    first_last_bits: int | None = 8
    adaround: AdaRound | None = field(default_factory=AdaRound)

    def __post_init__(self) -> None:
        for name in ("bits", "methods", "folds"):
            require(bool(getattr(self, name)), name, "at least one", "none", "ptq")
        require(self.images >= 1, "images", "at least 1", self.images, "ptq")
        for bits, method in product(self.bits, self.methods):
            percentile = self.percentile if method == "percentile" else None
            fallback = self.first_last_bits
            ptq_qconfig(method, bits, bits, percentile=percentile, first_last_bits=fallback)

    def check(self, model: nn.Module, data: Dataset) -> None:
        """Raise a ValueError if a model or its data cannot be quantized in this way."""
        rule = f"at most the {len(data.train)} training examples"
        require(self.images <= len(data.train), "images", rule, self.images, "calibration")
        if True in self.folds:
            fold_batchnorm(model)

    def count(self) -> int:
        """How many models it makes."""
        each = len(self.methods) * len(self.folds) + (self.adaround is not None)
        return each * len(self.bits)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return json.loads(to_json(asdict(self)))


class Planned(Dnq):
    """DNQ for a model that is known to be quantizable before it is trained."""

    def __init__(self, dnq: DnqConfig, plan: PtqPlan) -> None:
        super().__init__(dnq)
        self.plan = plan

    def setup(self, model: nn.Module) -> nn.Module:
        self.plan.check(model, self.data)
        return super().setup(model)


def run_dnq(
    config: TrainConfig,
    dnq: DnqConfig,
    out: str | Path,
    *,
    plan: PtqPlan | None = None,
    overwrite: bool = False,
    cpu: bool = False,
    quiet: bool = False,
) -> list[Row]:
    """Train with DNQ, or go on with ``out``; then quantize. A finished run is read back.

    Args:
        plan: how it is quantized in the end.
        quiet: no progress.

    Returns:
        The float model's row, then one for each way of quantizing it. On other ranks than the
        first, which alone quantizes: none.

    Raises:
        ValueError: bad settings, before anything is written; ``out`` holds another run.
    """
    plan = plan or PtqPlan()
    out = Path(out)
    silent = Track(0, "", quiet=True) if quiet else None
    result = train(config, Planned(dnq, plan), out, overwrite=overwrite, cpu=cpu, track=silent)
    if not PartialState().is_main_process:
        return []
    done = read_json(out / RESULTS) if (out / RESULTS).exists() else {}
    if done.get("plan") == plan.to_dict() and not overwrite:
        return read_rows(out)
    rows = [Row("float", None, result.test_accuracy, result.test_loss)]
    rows += quantize_all(result, config, plan, quiet=quiet)
    write_report(out, result, rows, plan)
    return rows


def quantize_all(
    result: TrainResult, config: TrainConfig, plan: PtqPlan, *, quiet: bool
) -> list[Row]:
    """The rows of a plan; calibrated on the same images that DNQ takes its statistics from."""
    batches = calibration_images(result.data, config, plan.images)
    pairs = tuple((bits, bits) for bits in plan.bits)
    with Track(plan.count(), "PTQ", quiet=quiet) as track:
        return sweep(
            result.model,
            result.data.test,
            batches,
            bits=pairs,
            methods=plan.methods,
            folds=plan.folds,
            percentile=plan.percentile,
            adaround=plan.adaround,
            first_last_bits=plan.first_last_bits,
            seed=config.seed,
            track=track,
        )


def write_report(out: Path, result: TrainResult, rows: list[Row], plan: PtqPlan) -> None:
    """Pictures, report.md and, last, results.json."""
    plot_curves(out / CURVES, {out.name: result.run.metrics()})
    plot_accuracy(out / ACCURACY, rows)
    described: Mapping[str, Any] = result.run.config
    write_atomic(out / REPORT, _report_text(described, rows, plan, len(result.data.test)).encode())
    table = [asdict(row) for row in rows]
    write_atomic(out / RESULTS, to_json({"rows": table, "plan": plan.to_dict()}))


def _report_text(
    described: Mapping[str, Any], rows: list[Row], plan: PtqPlan, pictures: int
) -> str:
    run, dnq = described["train"], described["recipe"]
    noise = f"with noise of W{dnq['weight_bits']}A{dnq['activation_bits']}: "
    noise += f"{dnq['weight_noise']} on weights, {dnq['activation_noise']} on activations"
    if not DnqConfig(**{k: v for k, v in dnq.items() if k != "name"}).noisy:
        noise = "without noise"
    swa = "no SWA" if run["swa_start"] is None else f"SWA from {100 * run['swa_start']:g} %"
    return f"""# qtrain dnq: {run["model"]} on {run["dataset"]}

{markdown_table(rows)}
- Trained in float, {run["epochs"]} epochs, seed {run["seed"]}, {noise}.
  {dnq["warmup_epochs"]} epochs warm-up, {dnq["ramp"]} ramp over {dnq["ramp_epochs"]}; {swa}.
  Nothing was chosen by test score.
- WnAm: weights of n bits (symmetric, per channel), layer inputs of m bits (affine, per tensor).
  First and last layer: {plan.first_last_bits or "same"} bits. Calibrated on {plan.images} training
  images. "unfolded": BatchNorm is not folded first.
- One test picture is {100 / pictures:.2f} points.

![accuracy]({ACCURACY})
![training curves]({CURVES})

Settings: config.json. Every logged step: metrics.jsonl.
"""
