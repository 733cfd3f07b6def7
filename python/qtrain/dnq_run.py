"""A whole DNQ run: settings by dataset, training, quantization in every usual way, one report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .adaround import AdaRound
from .dnq import Dnq, DnqConfig
from .loop import TrainResult, train
from .progress import Track
from .ptq import calibration_images, sweep
from .recipe import TrainConfig
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
        changed: fields of ``TrainConfig`` that differ from the preset. Another model starts without
            the preset's options for its own.

    Raises:
        ValueError: no such preset; a bad setting.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"dnq: preset or dataset must be one of {', '.join(PRESETS)}, got {preset!r}"
        )
    settings = {**SHARED, "dataset": preset, **PRESETS[preset]}
    for name in ("model", "dataset"):
        if changed.get(name, settings[name]) != settings[name]:
            settings.pop(f"{name}_options".replace("dataset_", "data_"), None)
    return TrainConfig(**{**settings, **changed})


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
    """

    bits: tuple[int, ...] = (8, 4, 3, 2)
    methods: tuple[str, ...] = ("minmax", "percentile", "mse")
    folds: tuple[bool, ...] = (True, False)
    percentile: float = 99.9
    images: int = 100
    first_last_bits: int | None = 8
    adaround: AdaRound | None = field(default_factory=AdaRound)

    def count(self) -> int:
        """How many models it makes."""
        each = len(self.methods) * len(self.folds) + (self.adaround is not None)
        return each * len(self.bits)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


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
    result = train(config, Dnq(dnq), out, overwrite=overwrite, cpu=cpu, track=silent)
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
    noise = f"W{dnq['weight_bits']}A{dnq['activation_bits']}: {dnq['weight_noise']} on weights, "
    noise += f"{dnq['activation_noise']} on activations"
    swa = "no SWA" if run["swa_start"] is None else f"SWA from {100 * run['swa_start']:g} %"
    return f"""# qtrain dnq: {run["model"]} on {run["dataset"]}

{markdown_table(rows)}
- Trained in float, {run["epochs"]} epochs, seed {run["seed"]}, with noise of {noise}.
  {dnq["warmup_epochs"]} epochs warm-up, {dnq["ramp"]} ramp over {dnq["ramp_epochs"]}; {swa}.
  The last weights, none chosen by test score.
- WnAm: weights of n bits (symmetric, per channel), layer inputs of m bits (affine, per tensor).
  First and last layer: {plan.first_last_bits or "same"} bits. Calibrated on {plan.images} training
  images. "unfolded": BatchNorm is not folded first.
- One test picture is {100 / pictures:.2f} points.

![accuracy]({ACCURACY})
![training curves]({CURVES})

Settings: config.json. Every logged step: metrics.jsonl.
"""
