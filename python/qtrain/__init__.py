"""Trainers on top of qkernels: float training, PTQ and QAT, their runs and reports.

``qtrain demo`` is the place to start; ``qtrain --help`` lists the rest. From Python::

    from qtrain.loop import Recipe, TrainConfig, train

    train(TrainConfig(dataset="digits", model="cnn", epochs=5), Recipe(), "runs/float")

For a loop, a model and batches of one's own: `BlockReplacement` and `basin`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .basin_run import basin
    from .bwrf import BlockReplacement

__all__ = ["BlockReplacement", "basin"]

# imported when they are asked for: the command line's --help is not to wait for torch
_HOMES = {"BlockReplacement": "bwrf", "basin": "basin_run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
