"""A whole GHN run: settings by preset, and training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loop import TrainResult, train
from ..progress import Track
from ..recipe import TrainConfig, require
from .quantizers import FLOAT_BITS
from .train import GhnRecipe, GhnTraining, Start

# GHN-3 as it was trained, and GHN-2 (with Adam, that is AdamW without decay)
BY_ENCODER: dict[str, dict[str, Any]] = {
    "graphormer": {"lr": 4e-4, "weight_decay": 1e-2, "schedule": "cosine"},
    "gated": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "steps", "warmup": 0.0},
}
WIDTH = {"graphormer": 64, "gated": 32}
SMALL: dict[str, Any] = {"width": 32, "heads": 4, "layers": 3, "max_shape": [16, 16, 7, 7]}
# paper: what GHN-2 and GHN-3 have for CIFAR-10, and GHN-Q fine-tunes; its epochs are our choice.
# digits and shapes: small enough for two cores.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "train": {"dataset": "cifar10", "epochs": 100, "eval_every": 10},
        "ghn": {},
        "training": {"space": "paper", "nets": 10000, "penalty": 3e-5},
    },
    "digits": {
        "train": {"dataset": "digits", "epochs": 100, "eval_every": 20, "lr": 2e-3},
        "ghn": SMALL,
        "training": {"space": "digits"},
    },
    "shapes": {
        "train": {
            "dataset": "shapes",
            "data_options": {"train_size": 2560, "difficulty": 0.3},
            "epochs": 50,
            "batch_size": 32,
            "eval_every": 10,
            "lr": 2e-3,
        },
        "ghn": SMALL,
        "training": {"space": "digits", "meta_batch": 4, "held_out": 4},
    },
}


def settings_for(
    preset: str,
    *,
    train: Mapping[str, Any] | None = None,
    ghn: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    start: Start | None = None,
) -> tuple[TrainConfig, GhnTraining]:
    """The settings of a preset, and what differs from it.

    Args:
        train: fields of `TrainConfig`.
        ghn: fields of `GhnConfig`. "bit_widths": True stands for the widths of training.
        training: fields of `GhnTraining`.
        start: a GHN to start from, whose settings come before the preset's.

    Raises:
        TypeError, ValueError: no such preset; a bad setting.
    """
    require(preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}", repr(preset), "ghn")
    chosen, ghn = PRESETS[preset], dict(ghn or {})
    how = GhnTraining(**{**chosen["training"], **(training or {})})
    if ghn.get("bit_widths") is True:
        require(bool(how.bits), "bits", "some to tell the GHN", "none", "ghn")
        ghn["bit_widths"] = sorted(set(how.bits) - {FLOAT_BITS})
    options = {**chosen["ghn"], **ghn} if start is None else {**start.ghn.config.to_dict(), **ghn}
    encoder = options.get("encoder", "graphormer")
    given = {"clip": 5.0, **BY_ENCODER.get(encoder, {}), **chosen["train"], **(train or {})}
    if start is None and preset == "paper":
        options = {"width": WIDTH.get(encoder, 64), **options}
    given["model_options"] = {**options, **given.get("model_options", {})}
    return TrainConfig(**{**given, "model": "ghn"}), how


def run_ghn(
    config: TrainConfig,
    training: GhnTraining,
    out: str | Path,
    *,
    start: Start | None = None,
    overwrite: bool = False,
    cpu: bool = False,
    track: Track | None = None,
) -> TrainResult:
    """Train a GHN, or go on with the run in ``out``; a finished run is read back. See `train`.

    Raises:
        ValueError: as `train`; settings that do not go together.
        FloatingPointError: too many steps whose gradient was not finite.
    """
    return train(config, GhnRecipe(training, start), out, overwrite=overwrite, cpu=cpu, track=track)
