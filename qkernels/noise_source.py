"""Noise: one seed and one step for a whole run, and a stream of its own for every name.

The stream of a name is the seed that the noise ops get. With text = "SEED|RANK|KIND|NAME",

    stream = the first 16 hex digits of the SHA-256 of the text (UTF-8), as a number, mod 2^63

where RANK is a number, or "all" for what every rank draws alike. So `Noise(seed=0).at("a.weight")`
has the stream of `printf '0|all|noise|a.weight' | sha256sum`: it depends on nothing else, neither
on the order in which names are asked for nor on the process.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qkernels import numeric


def stream(seed: int, rank: int | None, kind: str, name: str) -> int:
    """The seed, in 0 .. 2^63 - 1, for a name; see the module's docstring."""
    text = f"{seed}|{'all' if rank is None else rank}|{kind}|{name}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % (1 << 63)


_OBJECTS = itertools.count()

# what torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes a
# second: a compiled graph holds the stream as a number, and the hash is not traced
stream._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Noise:
    """The seed and the step of a run's noise; each name draws from a stream of its own.

    noise = Noise(seed=0)
    for x, y in loader:
        w = qkernels.differential_noise(w, stats, **noise.at("layer1.weight"))
        ...
        noise.advance()  # once per optimizer step

    Args:
        seed: of the run, 0 .. 2^63 - 1.
        step: where to start, 0 .. 2^63 - 1.
        device: None: the step is a number. A device: the step is a 0-dim int64 tensor there, so
            that a captured CUDA graph reads it, and `advance` in the graph moves it.

    Raises:
        TypeError, ValueError: a seed or a step that is no int or out of range.
    """

    def __init__(
        self, seed: int, *, step: int = 0, device: torch.device | str | None = None
    ) -> None:
        _check_number("seed", seed)
        _check_number("step", step)
        self._seed = seed
        # the tensor is kept without a device too: compiled code reads it, as a number would be
        # compiled into the graph, and each step anew
        self._number: int | None = step if device is None else None
        self._tensor = torch.full((), step, dtype=torch.int64, device=device)
        # turns of two objects differ too: one may take the place of the other
        self._turn = next(_OBJECTS) << 32
        self._turn_tensor = torch.full((), self._turn, dtype=torch.int64, device=device)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self._seed

    @property
    def step(self) -> int | Tensor:
        """The present step: an int, or with a device the tensor itself. Can be set to an int."""
        # the number is not even looked at in compiled code, which would be compiled for it
        if torch.compiler.is_compiling() or self._number is None:
            return self._tensor
        return self._number

    @step.setter
    def step(self, value: int) -> None:
        self._next_turn()
        if value is self._tensor:  # noise.step += 1 has moved it already
            return
        _check_number("step", value)
        self._tensor.fill_(value)
        if self._number is not None:
            self._number = value

    @property
    def turn(self) -> int:
        """A number that differs from one step to the next, known without asking a device."""
        return self._turn

    @property
    def turn_tensor(self) -> Tensor:
        """`turn` as a 0-dim int64 tensor, for compiled and captured code."""
        return self._turn_tensor

    def _next_turn(self) -> None:
        self._turn += 1
        self._turn_tensor.add_(1)

    def at(
        self,
        name: str,
        *,
        kind: str = "noise",
        per_rank: bool = False,
        rank: int | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments `seed` and `step` of the noise ops, for the noise of a name.

        Args:
            name: what gets the noise, as a rule the qualified name of a parameter or a layer.
            kind: tells apart several draws for one name; without "|".
            per_rank: False: all ranks draw the same (weights). True: each its own (activations).
            rank: this process's, with per_rank; None: that of torch.distributed, 0 without it.
            device: of the tensor that gets the noise: where the step is wanted if it is a tensor
                (as it is in compiled code). None: where the step is.

        Raises:
            TypeError, ValueError: name or kind is no str, kind has a "|", rank is no int of at
                least 0 or given without per_rank.
        """
        _check_str("name", name)
        _check_str("kind", kind)
        if "|" in kind:
            raise ValueError(f"Noise.at: kind must be without '|', got {kind!r}")
        if per_rank:
            rank = _this_rank() if rank is None else rank
            if type(rank) is not int:
                raise TypeError(f"Noise.at: rank must be an int or None, got {rank!r}")
            if rank < 0:
                raise ValueError(f"Noise.at: rank must be at least 0, got {rank}")
        elif rank is not None:
            raise ValueError(f"Noise.at: rank must be None unless per_rank is True, got {rank!r}")
        step = self.step
        if isinstance(step, Tensor) and device is not None:
            step = step.to(device)
        return {"seed": stream(self._seed, rank, kind, name), "step": step}

    def advance(self) -> None:
        """On to the next step; after 2^63 - 1 comes 0. Reads nothing back from a device."""
        self._tensor.add_(1).bitwise_and_(numeric.LARGEST_SEED)
        self._next_turn()
        if self._number is not None:
            self._number = (self._number + 1) & numeric.LARGEST_SEED

    def state_dict(self) -> dict[str, int]:
        """Seed and step as numbers (waits for the device, if the step is on one)."""
        step = int(self._tensor) if self._number is None else self._number
        return {"seed": self._seed, "step": step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on as the Noise that `state_dict` was taken from.

        A step on a device is overwritten in place. A seed is part of a captured or compiled graph:
        load before capturing.

        Raises:
            TypeError, ValueError: other keys than seed and step, or bad values. Nothing changes.
        """
        if not isinstance(state, Mapping) or set(state) != {"seed", "step"}:
            raise ValueError(
                f"Noise.load_state_dict: state must have the keys seed and step, got {state!r}"
            )
        _check_number("seed", state["seed"])
        _check_number("step", state["step"])
        self._seed = state["seed"]
        self.step = state["step"]

    def __repr__(self) -> str:
        where = "" if self._number is not None else f", device={str(self._tensor.device)!r}"
        return f"Noise(seed={self._seed}, step={self.state_dict()['step']}{where})"


def _this_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _check_number(name: str, value: Any) -> None:
    if type(value) is not int:
        raise TypeError(f"Noise: {name} must be an int, got {value!r}")
    if not 0 <= value <= numeric.LARGEST_SEED:
        raise ValueError(f"Noise: {name} must be in 0..{numeric.LARGEST_SEED}, got {value}")


def _check_str(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Noise.at: {name} must be a str, got {value!r}")
