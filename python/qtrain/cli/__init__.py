"""The command line: ``qtrain --help``. One file per family of commands; ``app`` and ``options`` are
what they share."""

# each import adds its commands to the app; this is the order of --help
from . import (  # noqa: I001
    train,
    ptq,
    dnq,
    error_model,
    bias_toy,
    flatness,
    init_study,
    bwrf,
    basin,
    ghn_train,
    ghn_use,
    ghn,
    ghn_study,
)
from .app import app
from .options import parse_settings

__all__ = [
    "app",
    "basin",
    "bias_toy",
    "bwrf",
    "dnq",
    "error_model",
    "flatness",
    "ghn",
    "ghn_study",
    "ghn_train",
    "ghn_use",
    "init_study",
    "main",
    "parse_settings",
    "ptq",
    "train",
]


def main() -> None:
    app()
