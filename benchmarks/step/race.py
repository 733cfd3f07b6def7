"""Training steps of several models in turn: times, peak memory, bytes saved for the backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PEAK_HOW = {
    "cuda": "peak of the CUDA allocator above the state",
    "cpu": "highest sum of the allocator's records in torch.profiler, above the state",
}


class Step:
    """One model with its own optimizer; a call is one step: forward, loss, backward, SGD.

    Args:
        around: called with the number of the step; what it gives is entered for the time of forward
            and backward.
        loss: called with the number of the step; None: cross entropy of the model's logits.
        beside: models that the loss needs and that are not trained; part of the state.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        around: Callable[[int], AbstractContextManager[Any]] = nullcontext,
        *,
        loss: Callable[[int], Tensor] | None = None,
        beside: Sequence[nn.Module] = (),
    ) -> None:
        self.model = model.train()
        self.x, self.labels, self.around = x, labels, around
        self.other_loss, self.beside = loss, beside
        self.number = 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """Of the forward alone."""
        if self.other_loss is not None:
            return self.other_loss(self.number)
        return F.cross_entropy(self.model(self.x), self.labels)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.around(self.number):
            loss = self.loss()
            loss.backward()
        self.optimizer.step()
        self.number += 1
        return loss.detach()


def seconds(call: Callable[[], Any], steps: int, device: str) -> float:
    """Seconds a step of `steps` steps in a row; by CUDA events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            call()
        return (time.perf_counter() - start) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(steps):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def race(
    steps: dict[str, Callable[[], Any]], rounds: int, in_a_row: int, device: str
) -> dict[str, list[float]]:
    """Seconds a step of each, `rounds` times in turn, so that all share the machine's drift."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            times[name].append(seconds(steps[name], in_a_row, device))
        order.reverse()  # so that none has always the same one before it
    return times


def peak_bytes(step: Step, device: str) -> int:
    """Most bytes that a step holds above the state (parameters, momentum, buffers, batch).

    CUDA: max_memory_allocated. CPU: the highest running sum over the profiler's records of torch's
    allocator; scratch memory that oneDNN takes for itself is not among them.
    """
    step.optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    return most


def saved_bytes(step: Step) -> int:
    """Bytes of the storages that a forward saves for its backward, each once; the parameters,
    buffers and the batch, which exist anyway, are not counted."""
    models = (step.model, *step.beside)
    state = [t for model in models for t in (*model.parameters(), *model.buffers())]
    known = (*state, step.x, step.labels)
    seen = {t.untyped_storage().data_ptr() for t in known}
    total = 0
    alive = []  # an address counts once only while its tensor lives

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(t)
            total += storage.nbytes()
        return t

    with step.around(step.number), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.loss()
    return total


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph; its first steps (ranges, momentum) are run before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
