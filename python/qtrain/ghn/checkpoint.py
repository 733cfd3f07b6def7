"""Files of graph hypernetworks: our own, and the public ones of GHN-2."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipe import require
from ..rundir import RunDir, config_differences, load_model_file
from .config import GhnConfig, ghn2
from .model import Ghn

# the parts of the public GHN-2 (facebookresearch/ppuda), and of ours
PUBLIC_PARTS = {
    "ln": "norm",
    "embed": "embedding.primitive",
    "shape_enc.embed_spatial": "embedding.kernel",
    "shape_enc.embed_channel": "embedding.channel",
    "gnn.mlp.fc": "encoder.direct",
    "gnn.mlp_ve.fc": "encoder.virtual",
    "gnn.gru": "encoder.gru",
    "decoder.fc.0": "head.spread",
    "decoder.conv.0": "head.hidden",
    "decoder.conv.2": "head.block",
    "decoder.class_layer_predictor.1": "head.classes",
    "decoder_1d.fc": "head.vectors",
    "bias_class.1": "head.class_bias",
}
# of a public file's config: what we build, where a GHN-1 has something else
PUBLIC_SETTINGS = {
    "hypernet": "gatedgnn",
    "decoder": "conv",
    "weight_norm": True,
    "ve": True,
    "layernorm": True,
}


def save_ghn(ghn: Ghn, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a directory with config.json and model.safetensors, which `load_ghn` reads.

    Args:
        path: new, empty, or with a GHN of the same config; of any config with ``overwrite``.

    Raises:
        ValueError: another config or other files are there. Nothing has been written then.
    """
    run = RunDir(path, {"ghn": ghn.config.to_dict()}, overwrite=overwrite)
    run.create()
    run.save_model(ghn.state_dict(), run.config)


def load_ghn(path: str | Path, config: GhnConfig | None = None) -> Ghn:
    """The GHN of a model.safetensors, or of the directory that holds one, on the CPU.

    Args:
        config: what it must be; None: whatever it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not of a GHN, or of another configuration (the keys are named).
    """
    weights, meta = load_model_file(path)
    settings = settings_in(meta)
    if settings is None:
        raise ValueError(f"checkpoint: {path} must be of a GHN, got a file without its settings")
    found = GhnConfig.from_dict(settings)
    _require_config(path, found, config)
    return _filled(path, found, weights)


def settings_in(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the GHN in a file's header: one of `save_ghn`, or of a training run."""
    run = meta.get("train", {})
    return run.get("model_options") if run.get("model") == "ghn" else meta.get("ghn")


def load_public_ghn2(path: str | Path, config: GhnConfig | None = None) -> Ghn:
    """A GHN-2 in the format of facebookresearch/ppuda, on the CPU.

    The file is what torch.save made of {"state_dict": ..., "config": ...} or of the state_dict
    alone. It is read with weights_only=True, which runs no code of the file's. The configuration is
    read off the shapes.

    Args:
        config: what it must be; None: whatever it is. Its bit_widths are taken: the public GHN-2
            has none, and they start at zero, where they make no difference.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; keys that are missing or too many, or settings of a GHN that
            is no GHN-2 (they are named); another configuration.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint: {path} must be a file of torch.save with tensors and plain values, "
            f"got: {error}"
        ) from error
    require(isinstance(data, Mapping), str(path), "a mapping", type(data).__name__, "checkpoint")
    settings, state = data.get("config"), data.get("state_dict", data)
    different = [
        f"{key} ({settings[key]!r} there, {value!r} in a GHN-2)"
        for key, value in PUBLIC_SETTINGS.items()
        if isinstance(settings, Mapping) and settings.get(key, value) != value
    ]
    require(not different, str(path), "of a GHN-2", "; ".join(different), "checkpoint")
    weights = _from_public(path, state)
    found = ghn2(**_settings_of(weights), bit_widths=config.bit_widths if config else ())
    _require_config(path, found, config)
    if found.bit_widths:
        rows = len(found.bit_widths) + 1
        weights["embedding.bits.weight"] = torch.zeros(rows, found.width)
    return _filled(path, found, weights)


def _from_public(path: str | Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A public state_dict under our names; its 1 x 1 convolutions are linear layers here."""
    known = {_public_name(name): name for name in _empty(ghn2()).state_dict()}
    differences = [f"{k} is missing" for k in known if not isinstance(state.get(k), Tensor)]
    differences += [f"{k} is unknown" for k in state if k not in known]
    require(not differences, str(path), "of a GHN-2", "; ".join(differences), "checkpoint")
    weights = {ours: state[public] for public, ours in known.items()}
    return {k: w.flatten(1) if w.ndim == 4 else w for k, w in weights.items()}


def _public_name(name: str) -> str:
    public, ours = next(p for p in PUBLIC_PARTS.items() if name.startswith(f"{p[1]}."))
    return public + name.removeprefix(ours)


def _settings_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Width, max_shape and classes from the shapes of a GHN-2's parameters."""
    width = weights["embedding.primitive.weight"].shape[1]
    classes, c_out = weights["head.classes.weight"].shape
    c_in = len(weights["head.block.bias"]) // c_out
    size = isqrt(len(weights["head.spread.bias"]) // (4 * width))
    return {"width": width, "max_shape": (c_out, c_in, size, size), "classes": classes}


def _require_config(path: str | Path, found: GhnConfig, wanted: GhnConfig | None) -> None:
    if wanted is not None:
        different = config_differences(found.to_dict(), wanted.to_dict())
        rule = "of the configuration asked for"
        require(not different, str(path), rule, "; ".join(different), "checkpoint")


def _filled(path: str | Path, config: GhnConfig, weights: Mapping[str, Tensor]) -> Ghn:
    ghn = _empty(config)
    there = {name: list(value.shape) for name, value in weights.items()}
    here = {name: list(value.shape) for name, value in ghn.state_dict().items()}
    different = config_differences(there, here)
    require(not different, str(path), "of its configuration", "; ".join(different), "checkpoint")
    ghn.load_state_dict(dict(weights), assign=True)
    return ghn


def _empty(config: GhnConfig) -> Ghn:
    """Without values, so that reading a file draws nothing from the global generator."""
    with torch.device("meta"):
        return Ghn(config)
