"""The float checkpoint that a quantizer starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .rundir import MODEL, file_digest, load_model_file

# recipes whose model is float in the end
FLOAT_RECIPES = ("float", "dnq")


@dataclass(frozen=True)
class FloatSource:
    """Float weights, and the dataset and model they belong to.

    Attributes:
        digest: names the file in the config of the run that starts from it; its path does not,
            for a run may be moved.
        label_smoothing: of the loss that it was trained with, as far as the file says.
        path: what was read, if it was.
    """

    weights: Mapping[str, Tensor]
    digest: str
    dataset: str
    data_options: Mapping[str, Any]
    model: str
    model_options: Mapping[str, Any]
    label_smoothing: float = 0.0
    path: Path | None = None

    @classmethod
    def load(
        cls, path: str | Path, *, dataset: str | None = None, model: str | None = None
    ) -> FloatSource:
        """Read a model.safetensors, or that of a run directory.

        Args:
            dataset, model: needed for a file that qtrain did not write; else its header knows.

        Raises:
            FileNotFoundError, ValueError: no file; a damaged one; one of a quantized model; one
                that does not say what it is.
        """
        path = Path(path)
        weights, meta = load_model_file(path)
        recipe = meta.get("recipe", {}).get("name", "float")
        if recipe not in FLOAT_RECIPES:
            raise ValueError(f"checkpoint: {path} must be of a float model, got one of {recipe}")
        known = meta.get("train", {})
        dataset, model = dataset or known.get("dataset"), model or known.get("model")
        if dataset is None or model is None:
            raise ValueError(
                f"checkpoint: {path} must say its dataset and model, got a file without qtrain's "
                "header; name them with --dataset and --model"
            )
        return cls(
            weights=weights,
            digest=file_digest(path / MODEL if path.is_dir() else path),
            dataset=dataset,
            data_options=known.get("data_options", {}) if dataset == known.get("dataset") else {},
            model=model,
            model_options=known.get("model_options", {}) if model == known.get("model") else {},
            label_smoothing=known.get("label_smoothing", 0.0),
            path=path,
        )

    def settings(self) -> dict[str, Any]:
        """The fields of ``TrainConfig`` that come with the checkpoint."""
        names = ("dataset", "data_options", "model", "model_options")
        return {name: getattr(self, name) for name in names}

    def fill(self, model: nn.Module) -> nn.Module:
        """Load the weights. Raises: ValueError if they are not this model's."""
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            first = [line.strip() for line in str(error).splitlines()[1:2]]
            raise ValueError(
                f"checkpoint: weights must be those of {self.model}, got: {' '.join(first)}"
            ) from error
        return model
