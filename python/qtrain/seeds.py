"""Randomness named by (seed, step, stream).

No stream depends on how many numbers another one drew, so a run that was killed continues with
exactly the numbers it would have drawn: there is no generator state to save.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, step: int, stream: str) -> int:
    """A 63-bit seed that is the same in every process (Python's ``hash`` of a str is not)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, step: int, stream: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator at the start of the named stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, step, stream))


def seed_globals(seed: int, step: int, stream: str) -> None:
    """Put the global generators (torch on all devices, numpy, random) at the named stream.

    Dropout, drop-path and the like of any model draw from these.
    """
    value = stream_seed(seed, step, stream)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


@contextmanager
def keeping_globals() -> Iterator[None]:
    """The global generators are, afterwards, where they were before."""
    ours = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(ours[0])
            np.random.set_state(ours[1])
