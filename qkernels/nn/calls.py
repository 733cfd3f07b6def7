"""Calls: a random draw of its own for each call of a layer within a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.nn import observe
from qkernels.noise_source import Noise

# the k-th call of a layer in one step (k from 0) draws at step + k 2^40, which no run reaches
CALL_BITS = 40


def step_of_call(state: Tensor, step: Tensor, turn: Tensor) -> Tensor:
    """The step at which a call draws. state: int64 [2], the turn (see `Noise.turn`) and number of
    the latest call."""
    if observe.recomputing():
        return (step + (state[1] << CALL_BITS)) & numeric.LARGEST_SEED
    number = torch.where(state[0] == turn, state[1] + 1, 0)
    state.copy_(torch.stack((turn, number)))
    return (step + (number << CALL_BITS)) & numeric.LARGEST_SEED


# for compiled code, which may run it again in a backward
call_op = torch.library.custom_op(
    "qkernels::noise_step_of_call",
    step_of_call,
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor step, Tensor turn) -> Tensor",
)


@call_op.register_fake
def _call_fake(state: Tensor, step: Tensor, turn: Tensor) -> Tensor:
    return torch.empty_like(step)


class Calls(nn.Module):
    """Numbers the calls of a layer within a step of a `Noise`.

    A forward that activation checkpointing repeats in the backward draws what it drew the first
    time. It is found again among the latest 16 calls of the step, by sums over the input where
    there are several; compiled code takes the latest call for it. Not part of a state_dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latest", torch.full((2,), -1, dtype=torch.int64), persistent=False)
        self._turn = -1
        self._count = 0
        self._recent = observe.Recent()

    def step(self, noise: Noise, step: Any, x: Tensor) -> Any:
        """Where this call draws: step + k 2^40 in the k-th call of the step; like step."""
        if torch.compiler.is_compiling():
            turn_at = noise.turn_tensor.to(step.device)
            return call_op(self.latest, step, turn_at)
        turn = noise.turn
        number: Any = 0
        if observe.recomputing():
            if self._count > 1:
                first = torch.zeros((), dtype=torch.int64, device=x.device)
                number = self._recent.recall(fingerprint(x), first)
        else:
            if turn != self._turn:
                self._turn, self._count, self._recent = turn, 0, observe.Recent()
            number = self._count
            self._count += 1
            if number:
                at = torch.full((), number, dtype=torch.int64, device=x.device)
                self._recent.remember(fingerprint(x), at)
        if isinstance(number, int) and number == 0:
            return step
        return (step + (number << CALL_BITS)) & numeric.LARGEST_SEED


@torch.no_grad()
def fingerprint(x: Tensor) -> Tensor:
    """[3], sums over x and over two halves of it: a recomputed x has the same, bit for bit, and one
    with other values or in another order does not, but for a coincidence."""
    halves = [x]
    if x.dim():
        halves += [x[: (x.shape[0] + 1) // 2], x[..., : (x.shape[-1] + 1) // 2]]
    dtype = numeric.compute_dtype(x.dtype)
    return torch.stack([part.sum(dtype=dtype) for part in halves])
