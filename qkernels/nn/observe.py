"""What an observer needs beside the range ops: the running average, recomputation, other ranks."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qkernels.ops.quant_range import QuantRange, follow_range


def recomputing() -> bool:
    """Whether this forward is run by a backward: activation checkpointing runs it a second time.

    Both kinds of torch.utils.checkpoint recompute inside the autograd engine, as does the backward
    of a compiled model; a forward of a training step never runs there.
    """
    return torch._C._current_graph_task_id() != -1


def follow(
    running: Tensor, local: Tensor, decay: float, union: bool, sync: bool, **codes: Any
) -> QuantRange:
    """Move the running range in place; its scale and zero point. Arguments as in `step`, and those
    of `qkernels.qparams`."""
    observed = local
    if sync:
        observed = widest(local) if union else average(local)
    return follow_range(running, observed, decay, **codes)


def step(running: Tensor, local: Tensor, decay: float, union: bool, sync: bool) -> Tensor:
    """Move the running range in place, once per step; returns a copy, to quantize with.

    Args:
        running: [2] or [2, channels], changed.
        local: what this rank observes, of running's shape.
        decay: of the running range.
        union: ranks agree on the widest range, and not on the mean.
        sync: whether there are other ranks to agree with.
    """
    if not recomputing():
        follow(running, local, decay, union, sync, bits=8)  # the range is the same for all bits
    return running.clone()


# a compiled graph calls this op, which asks at run time: its backward, or a checkpoint round it,
# may run the forward's part again, after `running` was moved
step_op = torch.library.custom_op(
    "qkernels::observe_step",
    step,
    mutates_args=("running",),
    schema="(Tensor(a!) running, Tensor local, float decay, bool union, bool sync) -> Tensor",
)


@step_op.register_fake
def _step_fake(running: Tensor, local: Tensor, decay: float, union: bool, sync: bool) -> Tensor:
    return torch.empty_like(running)


def many_ranks() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def widest(observed: Tensor) -> Tensor:
    """[2, ...] -> the union of all ranks' ranges; one collective."""
    outward = torch.stack((-observed[0], observed[1]))
    dist.all_reduce(outward, dist.ReduceOp.MAX)
    return torch.stack((-outward[0], outward[1]))


def average(observed: Tensor, seen: bool = True) -> Tensor:
    """The mean over the ranks that saw something; NaN if none did."""
    count = torch.full_like(observed, float(seen))
    total = torch.stack((observed if seen else torch.zeros_like(observed), count))
    dist.all_reduce(total, dist.ReduceOp.SUM)
    return total[0] / total[1]


class Recent:
    """The ranges that the latest forwards used, found again by what they observed.

    Where several forwards come before one backward (a layer called twice, two views of a batch),
    the running range has moved on when a checkpoint recomputes the first of them. The recomputation
    sees the same tensor, so it observes the same range, bit for bit; that leads to the range used.
    Tensors only: nothing is read back from the device.
    """

    LENGTH = 16

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.LENGTH)

    def remember(self, observed: Tensor, used: Tensor) -> None:
        """Both [2, ...], and not changed afterwards."""
        self._pairs.append((observed, used))

    def recall(self, observed: Tensor, otherwise: Tensor) -> Tensor:
        """The latest range used for this observation; `otherwise` if it is too long ago."""
        if not self._pairs:
            return otherwise
        seen = torch.stack([pair[0] for pair in self._pairs])
        used = torch.stack([otherwise] + [pair[1] for pair in self._pairs])
        same = (seen == observed).flatten(1).all(1)
        order = torch.arange(1, len(seen) + 1, device=seen.device)
        # index_select, for used[i] would wait for the device; 0 where nothing matches
        return used.index_select(0, (same * order).amax().reshape(1))[0]

    def __reduce__(self) -> tuple[type[Recent], tuple[()]]:
        """A copy or a saved model starts without a past."""
        return Recent, ()
