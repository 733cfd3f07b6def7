"""``qtrain ghn-predict``: a file with a model's predicted weights, which qat and ptq start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, load_dataset
from ..loop import evaluate
from ..models import build_model
from ..recipe import require
from ..rundir import write_model_file
from ..seeds import keeping_globals, seed_globals
from .checkpoint import ghn_digest
from .evaluate import EvalPlan, Ground
from .graph import build_graph
from .model import Ghn
from .prediction import Coverage, as_ghn, coverage, predicted_model

# of a model without a dataset: those of torchvision's and timm's models for ImageNet
IMAGENET = {"channels": 3, "classes": 1000, "size": 224}


@dataclass(frozen=True)
class ModelToPredict:
    """A model by name, as `qtrain.models.build_model` builds it.

    Attributes:
        dataset: that it is built for; None: for 3 x 224 x 224 images and 1000 classes.
    """

    model: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The header's part that says what the weights are of."""
        described: dict[str, Any] = {"model": self.model, "model_options": dict(self.model_options)}
        if self.dataset is not None:
            described |= {"dataset": self.dataset, "data_options": dict(self.data_options)}
        return described


@dataclass(frozen=True)
class Written:
    """What `write_prediction` did.

    Attributes:
        channels: the most output and input channels that the GHN decodes; what is wider is tiled.
        kernel: the largest that it decodes, k x k; what is larger is interpolated.
        images: training images that BatchNorm's statistics are of; 0: they are as in a new model.
        scores: on the dataset's test split, if there is a dataset.
    """

    coverage: Coverage
    channels: tuple[int, int]
    kernel: int
    images: int
    scores: Mapping[str, float] | None


def write_prediction(
    wanted: ModelToPredict,
    out: str | Path,
    ghn: Ghn | str | Path,
    *,
    bits: int | None = None,
    noise: float = 0.0,
    rescale: bool = False,
    seed: int = 0,
    batchnorm_images: int | None = None,
    overwrite: bool = False,
    cpu: bool = False,
) -> Written:
    """Predict a model's weights and write its whole state_dict to a safetensors file.

    Parameters that the GHN does not reach have fresh values, named by the seed. With a dataset,
    BatchNorm's statistics are taken from its training images and the model is evaluated.

    Args:
        out: file to write.
        bits, noise, rescale: see `qtrain.ghn.prediction.predict`.
        seed: of the fresh values, the noise and the images.
        batchnorm_images: see `EvalPlan`.
        overwrite: replace the file if there is one.
        cpu: stay on the CPU.

    Raises:
        FileNotFoundError: no such GHN.
        ValueError: ``out`` is there; as `predict`; unknown model, dataset or option. Nothing has
            been written then.
    """
    out = Path(out)
    free = overwrite or not out.exists()
    require(free, "out", "a new file", f"{out} (--overwrite replaces it)", "ghn-predict")
    require(not out.is_dir(), "out", "a file", f"the directory {out}", "ghn-predict")
    path, ghn = ghn, as_ghn(ghn)
    digest = None if isinstance(path, Ghn) else ghn_digest(Path(path))
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    data: Dataset | None = None
    if wanted.dataset is not None:
        data = load_dataset(wanted.dataset, wanted.data_options).to(torch.device(device))
    shape = IMAGENET if data is None else {n: getattr(data, n) for n in IMAGENET}
    with keeping_globals():
        seed_globals(seed, 0, "init")
        model = build_model(wanted.model, **shape, options=wanted.model_options).to(device)
    sides = shape["size"], shape["size"]
    graph = build_graph(model, torch.zeros(1, shape["channels"], *sides, device=device))
    plan = EvalPlan(batchnorm_images=batchnorm_images, seed=seed)
    batches = None if data is None else Ground.of(data, plan).batchnorm
    how: dict[str, Any] = {"bits": bits, "noise": noise, "rescale": rescale, "seed": seed}
    made = predicted_model(model, ghn, batches, graph=graph, **how)
    scores = None if data is None else evaluate(made, data.test)
    images = sum(len(y) for _, y in batches or ())
    told = {"ghn": digest, **how, "batchnorm_images": images}
    meta = {"train": wanted.describe(), "recipe": {"name": "float"}, "predicted": told}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_model_file(out, made.state_dict(), meta | ({"scores": scores} if scores else {}))
    c_out, c_in, kernel, _ = ghn.config.max_shape
    return Written(coverage(model, graph, ghn.config), (c_out, c_in), kernel, images, scores)
