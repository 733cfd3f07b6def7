"""The moving average behind ErrorEMA, decided on the device: eager, over ranks, and compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qkernels.backends.reference.error_stats import move_average
from qkernels.nn import observe


def joint(stats: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Statistics of the elements of all ranks together, and how many; one collective.

    Args:
        stats: [4, channels], this rank's mean, var, mean_square and clip_rate.
        count: its elements per channel.
    """
    mean, var, square, clip_rate = stats.double()
    sums = torch.cat((mean, var + mean * mean, square, clip_rate)) * count
    sums = torch.cat((sums, sums.new_full((1,), count)))
    dist.all_reduce(sums)
    total = sums[-1]
    mean, second, square, clip_rate = (sums[:-1] / total.clamp_min(1)).reshape(4, -1)
    var = (second - mean * mean).clamp_min(0)
    return torch.stack((mean, var, square, clip_rate)).to(stats.dtype), total


def move(
    ema: Tensor,
    before: Tensor,
    updates: Tensor,
    last_step: Tensor,
    stats: Tensor,
    count: int,
    step: Tensor | None,
    decay: float,
    sync: bool,
    again: bool,
) -> None:
    """One update of an ErrorEMA's buffers; whether this step had one is decided on the device.

    Args:
        ema, before, updates, last_step: the buffers, changed.
        stats: [4, channels], of this rank.
        count: its elements per channel.
        sync: whether there are other ranks to agree with.
        step, again: as in `ErrorEMA.update`.
    """
    if observe.recomputing():
        return
    total = torch.full((), count, device=ema.device)
    if sync:
        stats, total = joint(stats, count)
    fresh = torch.ones_like(last_step, dtype=torch.bool) if step is None else last_step != step
    moving = (fresh | again) & (total > 0)
    moved = ema.clone()
    move_average(moved, stats, decay)
    moved = torch.where(moving, moved, ema)
    began = fresh & moving  # an x without elements begins no step
    before.copy_(torch.where(began, torch.where(updates == 0, moved, ema), before))
    ema.copy_(moved)
    updates.add_(moving)
    now = torch.full_like(last_step, -1) if step is None else step
    last_step.copy_(torch.where(moving, now, last_step))


_compiled = 0


def compiled_moves() -> int:
    """How many updates compiled code has made: what modules remember may be out of date then."""
    return _compiled


def _move_compiled(*args: Any) -> None:
    global _compiled
    _compiled += 1
    move(*args)


# a compiled graph calls this op, which asks at run time whether a backward runs it again
move_op = torch.library.custom_op(
    "qkernels::error_ema_step",
    _move_compiled,
    mutates_args=("ema", "before", "updates", "last_step"),
    schema="(Tensor(a!) ema, Tensor(b!) before, Tensor(c!) updates, Tensor(d!) last_step, "
    "Tensor stats, SymInt count, Tensor? step, float decay, bool sync, bool again) -> ()",
)


@move_op.register_fake
def _move_fake(*args: Any) -> None:
    return None
