"""The command line: ``qtrain --help``. One file per family of commands; ``app`` and ``options`` are
what they share."""

# each import adds its commands to the app; this is the order of --help
from . import train, ptq, dnq, error_model, bias_toy, flatness  # noqa: I001
from .app import app
from .options import parse_settings

__all__ = [
    "app",
    "bias_toy",
    "dnq",
    "error_model",
    "flatness",
    "main",
    "parse_settings",
    "ptq",
    "train",
]


def main() -> None:
    app()
