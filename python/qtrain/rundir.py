"""A run directory: config.json, metrics.jsonl, checkpoint.pt, model.safetensors.

Every file is either there in full or not there: it is written under another name, flushed to
the disk and renamed. metrics.jsonl alone grows; the checkpoint holds its length, and a resumed
run cuts it back to that. It holds nothing that depends on the clock, so the metrics of two runs
can be compared byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

CONFIG, METRICS = "config.json", "metrics.jsonl"
CHECKPOINT, MODEL = "checkpoint.pt", "model.safetensors"
FORMAT_KEY, FORMAT = "qtrain_format", 1
# the checkpoint file: this line, the SHA-256 of the rest, then what torch.save wrote. torch's
# zip reader notices a short file but not a flipped bit in a weight.
CHECKPOINT_MAGIC = b"qtrain checkpoint 1\n"


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a kill leaves the old or the new file, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> Any:
    """Raises: ValueError naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"run directory: {path} must be a JSON file, got: {error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line without its end (a killed run) is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"run directory: {path} must hold JSON lines, got: {error}") from error


def config_differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """One sentence for each key in which two configs differ, nested keys joined by dots."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}):
            there, here = old.get(key, "nothing"), new.get(key, "nothing")
            lines += config_differences(there, here, f"{prefix}{key}.")
        return lines
    return [] if old == new else [f"{prefix[:-1]} ({old!r} there, {new!r} asked for)"]


def _kind(config: Mapping[str, Any]) -> str:
    """What sort of run a config is of: its recipe's name, or what it describes."""
    recipe = config.get("recipe")
    if isinstance(recipe, Mapping):
        return str(recipe.get("name"))
    return ", ".join(sorted(key for key in config if key != FORMAT_KEY)) or "nothing"


class RunDir:
    """One run's directory, for the run that has this config. Writes nothing before ``create``.

    Args:
        path: need not be there.
        config: JSON-able; all that decides the result.
        overwrite: start afresh if the directory holds a run of this kind.
        writer: False on ranks that only read.

    Raises:
        ValueError: the directory holds another config (the keys that differ are named), or
            files that are not a run's.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        writer: bool = True,
    ) -> None:
        self.path, self.writer, self.overwrite = Path(path), writer, overwrite
        # through JSON and back, so that tuples and lists compare equal to what the file holds
        self.config = json.loads(json.dumps({FORMAT_KEY: FORMAT, **config}))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run directory: {self.path} must be a directory, got a file")
        if writer or not overwrite:
            self._check()

    def create(self) -> None:
        """Make the directory and its config.json; with ``overwrite``, in place of what is there."""
        if self.writer:
            if self.overwrite and self.file(CONFIG).exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.file(CONFIG).exists():
                write_atomic(self.file(CONFIG), to_json(self.config))

    def _check(self) -> None:
        file = self.file(CONFIG)
        if not file.exists():
            strangers = [p.name for p in self.path.glob("*") if not p.name.endswith(".part")]
            if strangers:
                raise ValueError(
                    f"run directory: {self.path} must be new, empty or hold a run, "
                    f"got a directory with {', '.join(sorted(strangers)[:3])} and no {CONFIG}"
                )
            return
        old = read_json(file)
        if not isinstance(old, dict) or FORMAT_KEY not in old:
            raise ValueError(
                f"run directory: {file} must be written by qtrain, got a file without {FORMAT_KEY}"
            )
        different = config_differences(old, self.config)
        if _kind(old) != _kind(self.config):
            # to overwrite a trained model by a report on it can only be a slip
            raise ValueError(
                f"run directory: {self.path} must be another one, got one that holds a run of "
                f"{_kind(old)}, this is one of {_kind(self.config)}"
            )
        if different and not self.overwrite:
            raise ValueError(
                f"run directory: {self.path} must hold this run's config, got another: "
                f"{'; '.join(different)}. Choose another directory, or overwrite it (--overwrite)"
            )

    def file(self, name: str) -> Path:
        return self.path / name

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.writer:
            with open(self.file(METRICS), "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.file(METRICS)) if self.file(METRICS).exists() else []

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write checkpoint.pt. The metrics so far reach the disk first."""
        if not self.writer:
            return
        with open(self.file(METRICS), "ab") as file:
            os.fsync(file.fileno())
            length = file.tell()
        buffer = io.BytesIO()
        torch.save({**state, "metrics_bytes": length}, buffer)
        payload = buffer.getvalue()
        digest = hashlib.sha256(payload).digest()
        write_atomic(self.file(CHECKPOINT), CHECKPOINT_MAGIC + digest + payload)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU, or None; metrics.jsonl is cut back to it.

        Raises:
            ValueError: the checkpoint is truncated or damaged (the file is named).
        """
        if not self.file(CHECKPOINT).exists():
            self._cut_metrics(0)
            return None
        state = read_checkpoint(self.file(CHECKPOINT))
        self._cut_metrics(state["metrics_bytes"])
        return state

    def _cut_metrics(self, length: int) -> None:
        path = self.file(METRICS)
        have = path.stat().st_size if path.exists() else 0
        if have < length:
            raise ValueError(
                f"run directory: {path} must have the {length} bytes that its checkpoint "
                f"knows of, got {have}"
            )
        if self.writer and have > length:
            os.truncate(path, length)

    def finished_scores(self) -> dict[str, float] | None:
        """What the model that this run left scored; None if it left none, or one of another run."""
        if not self.file(MODEL).exists():
            return None
        meta = load_model_file(self.file(MODEL))[1]
        scores = meta.pop("scores", None)
        return scores if meta == self.config else None

    def save_model(self, state: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Write model.safetensors; ``meta`` goes into its header under the key "qtrain"."""
        if self.writer:
            write_model_file(self.file(MODEL), state, meta)


def write_model_file(
    path: Path, state: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> None:
    """What `load_model_file` reads; the file is there in full or not at all."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    # one sorted string: the header's bytes then do not depend on a map's order
    header = {"qtrain": json.dumps(meta, sort_keys=True)}
    write_atomic(path, safetensors_save(tensors, metadata=header))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint file. Raises: ValueError naming the file."""
    data = path.read_bytes()
    start = len(CHECKPOINT_MAGIC) + 32
    digest, payload = data[len(CHECKPOINT_MAGIC) : start], data[start:]
    if not data.startswith(CHECKPOINT_MAGIC) or hashlib.sha256(payload).digest() != digest:
        raise ValueError(
            f"checkpoint: {path} must be a whole checkpoint of qtrain, got {len(data)} bytes that "
            "are truncated or damaged; take it from a backup, or start afresh with --overwrite"
        )
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint: {path} must be readable by this torch, got: {error}"
        ) from error


def load_model_file(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state_dict, metadata) of a model.safetensors, or of the run directory that holds one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not a safetensors file.
    """
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"checkpoint: {path} must be a model.safetensors or a run directory with one, "
            "got neither"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            meta = opened.metadata() or {}
        return safetensors_load(file.read_bytes()), json.loads(meta.get("qtrain", "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: {file} must be a whole safetensors file, got: {error}"
        ) from error


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256: names a starting checkpoint in a config."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
