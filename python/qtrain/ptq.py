"""Post-training quantization: a float checkpoint, ranges from a few batches, no training."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.nn import QConfig, calibrate, fold_batchnorm, prepare

from .data import Dataset, load_dataset
from .loop import TrainResult, evaluate, new_model
from .qat import calibration_batches
from .recipe import TrainConfig
from .rundir import RunDir
from .source import FloatSource

METHODS = ("minmax", "percentile", "mse")


def ptq_qconfig(
    method: str,
    weight_bits: int,
    activation_bits: int,
    *,
    percentile: float | None = None,
    first_last_bits: int | None = 8,
) -> QConfig:
    """Weights symmetric per channel, activations affine per tensor, both ranges by ``method``."""
    if method not in METHODS:
        raise ValueError(f"ptq: method must be one of {', '.join(METHODS)}, got {method!r}")
    base = QConfig.minmax(weight_bits, activation_bits, first_last_bits=first_last_bits)
    assert base.weight is not None and base.activation is not None
    how: dict[str, Any] = {"method": method, "percentile": percentile}
    return replace(
        base, weight=replace(base.weight, **how), activation=replace(base.activation, **how)
    )


def quantize_after_training(
    model: nn.Module, qconfig: QConfig, batches: list, *, fold: bool = True
) -> nn.Module:
    """A calibrated copy of a float model, in eval mode.

    Args:
        batches: what the activations' ranges are taken from.
        fold: fold BatchNorm into the layers first, as a deployed model has it.
    """
    model = fold_batchnorm(model.eval()) if fold else model
    model = prepare(model, qconfig).eval()
    calibrate(model, batches)
    return model


def run_ptq(
    source: FloatSource,
    qconfig: QConfig,
    out: str | Path,
    *,
    calibration: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    fold: bool = True,
    overwrite: bool = False,
    data: Dataset | None = None,
) -> TrainResult:
    """Quantize a checkpoint, evaluate it, and leave a run directory.

    Args:
        calibration: training batches for the ranges of the activations.
        data: the dataset, if it is loaded already.

    Raises:
        ValueError: ``out`` holds another config; the model cannot be folded or quantized.
    """
    config = TrainConfig(**source.settings(), batch_size=batch_size, seed=seed)
    recipe: dict[str, Any] = {
        "name": "ptq",
        "source": source.digest,
        "qconfig": qconfig.to_dict(),
        "fold_batchnorm": fold,
        "calibration_batches": calibration,
    }
    run = RunDir(out, {"train": asdict(config), "recipe": recipe}, overwrite=overwrite)
    data = data if data is not None else load_dataset(config.dataset, config.data_options)
    model = source.fill(new_model(config, data))
    before = evaluate(model, data.test)
    batches = calibration_batches(data, config, calibration)
    model = quantize_after_training(model, qconfig, batches, fold=fold)
    after = evaluate(model, data.test)
    names = {"float_loss": before["test_loss"], "float_accuracy": before["test_accuracy"]}
    run.create()
    # nothing here is worth a checkpoint: a second call does the work again, to the same bits
    run.load_checkpoint()
    run.append({"step": 0, "epoch": 0, **after, **names})
    run.save_model(model.state_dict(), run.config)
    return TrainResult(model, data, run, steps=0, **after)
