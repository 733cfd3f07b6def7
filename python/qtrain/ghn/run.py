"""A whole GHN run: settings by preset, and training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loop import TrainResult, train
from ..progress import Track
from ..recipe import TrainConfig, require
from .nets import KEPT
from .quantizers import FLOAT_BITS
from .train import GhnRecipe, GhnTraining, Start

# what the preset "paper" adds for an encoder: GHN-3 as it was trained (its penalty is of the whole
# meta-batch of 8, ours of the mean), and GHN-2 (with Adam, that is AdamW without decay)
PAPER: dict[str, dict[str, Any]] = {
    "graphormer": {
        "train": {"lr": 4e-4, "weight_decay": 1e-2, "schedule": "cosine"},
        "training": {"penalty": 8 * 3e-5},
    },
    "gated": {
        "train": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "steps", "warmup": 0.0},
        "ghn": {"width": 32},
    },
}
SMALL: dict[str, Any] = {"width": 32, "heads": 4, "layers": 3, "max_shape": [16, 16, 7, 7]}
# paper: what GHN-2 and GHN-3 have for CIFAR-10, and GHN-Q fine-tunes; its epochs are our choice.
# digits and shapes: small enough for two cores.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "train": {"dataset": "cifar10", "epochs": 100, "eval_every": 10},
        "ghn": {},
        # no more than are kept in memory: to make one takes longer than a step on a GPU
        "training": {"space": "paper", "nets": KEPT},
    },
    "digits": {
        # of half as many images a step costs less, and twice the steps gained more
        "train": {
            "dataset": "digits",
            "epochs": 50,
            "batch_size": 32,
            "eval_every": 10,
            "lr": 2e-3,
        },
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
    inherited = chosen["ghn"] if start is None else start.ghn.config.to_dict()
    encoder = {**inherited, **ghn}.get("encoder", "graphormer")
    of_encoder = PAPER.get(encoder, {}) if preset == "paper" else {}
    how = GhnTraining(
        **{**chosen["training"], **of_encoder.get("training", {}), **(training or {})}
    )
    if ghn.get("bit_widths") is True:
        require(bool(how.bits), "bits", "some to tell the GHN", "none", "ghn")
        ghn["bit_widths"] = sorted(set(how.bits) - {FLOAT_BITS})
    options = {**of_encoder.get("ghn", {}), **inherited, **ghn}
    given = {"clip": 5.0, **chosen["train"], **of_encoder.get("train", {}), **(train or {})}
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
