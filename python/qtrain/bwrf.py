"""BWRF, the block-wise replacement framework: QAT beside a frozen full-precision partner.

arXiv 2412.15846 (Yu, Yang, Zhang, Ma, Wang, Li 2024). A low-precision network Q = Q_n .. Q_1 is
trained while mixed-precision networks, made by replacing blocks of the full-precision F = F_n ..
F_1 by blocks of Q, work beside it. In a loop of one's own::

    bwrf = BlockReplacement(student, teacher)
    loss, parts = bwrf.loss(x, y)
    loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from qkernels.nn import FakeQuantize, float_state_dict

from .blocks import find_blocks, split
from .bwrf_config import BwrfConfig, scheduled
from .recipe import require
from .seeds import generator

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_require = partial(require, op="bwrf")


class Logits(NamedTuple):
    """Of a batch: the student's, the teacher's, and those of the mixed networks by k, [N, C]."""

    student: Tensor
    teacher: Tensor
    mixed: dict[int, Tensor]


class BlockReplacement:
    """The loss of a quantized student beside its frozen full-precision partner.

        loss = CE(z_Q, y) + alpha KD(z_Q, z_F) + beta mean_k KD(z_Mk, z_F)

    The student runs once, by its own forward; its activations after the blocks branch into F's
    suffixes. F is in eval mode and its parameters do not require grad, but gradients flow through
    it to the student. Branches that have come to the same block of F go through it as one batch.
    Beside plain QAT a step costs, in blocks: n forwards of F for z_F, and

        prefix:   n (n-1) / 2 of F, forward and backward to the input
        sampled:  n / 2 of F in the mean, forward and backward to the input
        single:   n (n-1) / 2 of F so, and n of the student; for one block k: n - k, and 1

    A student's block that runs a second time ("single": on F's activation) normalises with that
    batch's statistics as in training, but its BatchNorm records nothing, and its quantizers keep
    the ranges that the student's own pass has set.

    Nothing is put on the student that outlasts a call: its state_dict, its hooks and its
    parameters are those of plain QAT.

    Args:
        student: a prepared model; wrapped in DistributedDataParallel or not.
        teacher: the float model of the same architecture, on the student's device. It is put into
            eval mode, and its parameters no longer require grad.
        blocks: see `BwrfConfig`.
        seed: with the step, names the k of mode "sampled".
        task_loss: called with (logits, y).
        options: the other fields of `BwrfConfig`.

    Attributes:
        blocks: their names, in the order of the forward.

    Raises:
        TypeError: an unknown option; no Module; blocks is a single string.
        ValueError: a bad option; teacher and student differ in architecture or share parameters;
            blocks that are not there or not sequential (see `split`).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: Sequence[str] | None = None,
        *,
        seed: int = 0,
        task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        **options: Any,
    ) -> None:
        if isinstance(blocks, str):
            raise TypeError(f"bwrf: blocks must be a list of names, got {blocks!r}")
        names = None if blocks is None else tuple(blocks)
        self.config = config = BwrfConfig(blocks=names, **options)
        plain = student.module if isinstance(student, DistributedDataParallel) else student
        check_partners(plain, teacher)
        self.blocks = find_blocks(teacher) if names is None else names
        self.count = len(self.blocks)
        _require(
            config.block is None or 1 <= config.block <= self.count,
            "block",
            f"in 1..{self.count}",
            config.block,
        )
        self.student, self.plain = student, plain
        self.teacher = teacher.eval().requires_grad_(False)
        self.seed, self.task_loss = seed, task_loss
        self.teacher_stages = split(teacher, self.blocks)
        single = config.mode == "single"
        self.student_stages = split(plain, self.blocks) if single else []

    def loss(
        self,
        x: Tensor,  # [N, ...]
        y: Tensor,
        *,
        step: int | None = None,
        progress: float | None = None,
        model: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts, detached: "task", "distill", "replaced" (before they
        are weighted; "replaced" is 0 where beta is 0).

        Args:
            y: what ``task_loss`` takes; for cross entropy [N] int64.
            step: number of the training step; mode "sampled" needs it.
            progress: share of the run that is done, in [0, 1]; a schedule needs it.
            model: the student as a library has wrapped it since; None: the student.

        Raises:
            ValueError: step or progress is needed or out of range; the model does not give logits
                [N, C]; a block that changes its input in place.
        """
        config = self.config
        logits = self.logits(x, step=step, progress=progress, model=model)
        task = self.task_loss(logits.student, y)
        distill = distillation(logits.student, logits.teacher, config.temperature)
        loss = task + config.alpha * distill
        replaced = torch.zeros_like(distill)
        if logits.mixed:
            mixed = torch.cat(list(logits.mixed.values()))
            aims = logits.teacher.repeat(len(logits.mixed), 1)
            replaced = distillation(mixed, aims, config.temperature)
            loss = loss + config.beta * replaced
        parts = {"task": task, "distill": distill, "replaced": replaced}
        return loss, {name: part.detach() for name, part in parts.items()}

    def logits(
        self,
        x: Tensor,  # [N, ...]
        *,
        step: int | None = None,
        progress: float | None = None,
        model: nn.Module | None = None,
    ) -> Logits:
        """What the loss is made of; arguments and errors as there."""
        chosen = self.chosen(step, progress)
        if self.teacher.training:  # a loop may have put it back
            self.teacher.eval()
        single = self.config.mode == "single"
        teacher, inputs = self._teacher(x, chosen if single else ())
        with self._watched([] if single else chosen) as seen:
            student = (self.student if model is None else model)(x)
        for name, z in (("student", student), ("teacher", teacher)):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            sound = isinstance(z, Tensor) and z.dim() == 2 and len(z) == len(x)
            _require(sound, name, f"a model that gives logits [{len(x)}, C]", got)
        without_grad = self.config.effect == "forward"
        with torch.no_grad() if without_grad else nullcontext():
            starts = self._replaced(inputs) if single else self._taken(chosen, seen)
            mixed = self._suffixes(starts, len(x))
        return Logits(student, teacher, {k: self._effect(z, student) for k, z in mixed.items()})

    def chosen(self, step: int | None, progress: float | None) -> tuple[int, ...]:
        """The k whose mixed networks a step runs, ascending."""
        config = self.config
        if config.beta == 0:
            return ()
        if config.block is not None:
            return (config.block,)
        last = self.count if config.mode == "single" else self.count - 1
        if config.schedule is not None:
            known = progress is not None and 0 <= progress <= 1
            _require(known, "progress", "in [0, 1] for a schedule", progress)
            last = scheduled(config.schedule, progress or 0.0, last)
        if config.mode != "sampled":
            return tuple(range(1, last + 1))
        _require(step is not None, "step", "the number of the step for mode sampled", step)
        draw = torch.randint(last, (), generator=generator(self.seed, step or 0, "bwrf"))
        return (int(draw) + 1,)

    @torch.no_grad()
    def _teacher(self, x: Tensor, chosen: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """(z_F, what goes into its blocks k)."""
        inputs = {}
        for k, stage in enumerate(self.teacher_stages, start=1):
            before, version = x, x._version
            x = stage(before)
            if k in chosen:
                self._check_version(before, version, k - 1)
                inputs[k] = before
        return x, inputs

    @contextmanager
    def _watched(self, chosen: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, int]]]:
        """Notes the student's outputs of these blocks, with their versions."""
        seen: dict[int, tuple[Tensor, int]] = {}

        def watch(k: int) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> None:
                _require(
                    isinstance(output, Tensor),
                    "blocks",
                    "modules that give one tensor",
                    f"{type(output).__name__} from {self.blocks[k - 1]!r}",
                )
                seen[k] = output, output._version

            return self.plain.get_submodule(self.blocks[k - 1]).register_forward_hook(after)

        handles = [watch(k) for k in chosen]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _taken(
        self, chosen: Sequence[int], seen: dict[int, tuple[Tensor, int]]
    ) -> dict[int, Tensor]:
        """The student's activations after its blocks."""
        for k in chosen:
            name = self.blocks[k - 1]
            rule = "a model that calls all its blocks in each forward"
            _require(k in seen, "student", rule, f"no call of {name!r}")
            self._check_version(*seen[k], k)
        return {k: seen[k][0] for k in chosen}

    def _check_version(self, h: Tensor, version: int, k: int) -> None:
        rule = "such that no module after a block changes its output in place"
        name = repr(self.blocks[k - 1]) if k else "the input"
        _require(h._version == version, "blocks", rule, f"a change of {name}")

    def _replaced(self, inputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Outputs of the student's single blocks on F's activations."""
        with _unmoved(self.plain):
            return {k: self.student_stages[k - 1](h) for k, h in inputs.items()}

    def _suffixes(self, starts: dict[int, Tensor], examples: int) -> dict[int, Tensor]:
        """Each activation after block k through F's blocks k+1 .. n. As F is in eval mode its
        examples do not see each other, and branches can share a batch."""
        joined: Tensor | None = None
        for k in range(1, self.count + 1):
            if joined is not None:
                joined = self.teacher_stages[k - 1](joined)
            if k in starts:
                new = starts[k]
                self._check_batch(new, examples, self.blocks[k - 1])
                joined = new if joined is None else torch.cat((joined, new))
        if joined is None:
            return {}
        self._check_batch(joined, examples * len(starts), "the last one")
        return dict(zip(sorted(starts), joined.split(examples), strict=True))

    @staticmethod
    def _check_batch(h: Tensor, examples: int, name: str) -> None:
        rule = f"modules that keep the batch ({examples}) in dim 0"
        holds = h.dim() > 0 and h.shape[0] == examples
        _require(holds, "blocks", rule, f"{tuple(h.shape)} from {name!r}")

    def _effect(self, mixed: Tensor, student: Tensor) -> Tensor:
        if self.config.effect == "forward":
            return _graft(mixed, student)
        return _graft(student, mixed) if self.config.effect == "backward" else mixed


def distillation(logits: Tensor, aims: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation (Hinton 2015): T^2 KL(softmax(aims / T) || softmax(logits / T)), mean
    over the batch; in fp32 at least.

    Args:
        logits, aims: [N, C].
        temperature: T.
    """
    student, teacher = (
        (z if z.dtype == torch.float64 else z.float()).div(temperature).log_softmax(1)
        for z in (logits, aims)
    )
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def _graft(value: Tensor, path: Tensor) -> Tensor:
    """The value of one, the gradient to the other."""
    return value.detach() + (path - path.detach())


def check_partners(student: nn.Module, teacher: nn.Module) -> None:
    """Raise unless they have the same float weights by name and shape, and share none."""
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"bwrf: {name} must be a Module, got {type(model).__name__}")
    ours, theirs = float_state_dict(student), float_state_dict(teacher)
    rule = "a float model of the student's architecture"
    extra = sorted(set(theirs) ^ set(ours))
    if extra:
        only = "student" if extra[0] in ours else "teacher"
        _require(False, "teacher", rule, f"{extra[0]!r} in the {only} alone")
    for key, value in theirs.items():
        other = ours[key]
        if isinstance(value, Tensor):
            shapes = f"{key!r} of {list(value.shape)}, {list(other.shape)} in the student"
            _require(value.shape == other.shape, "teacher", rule, shapes)
    prepared = any(isinstance(module, FakeQuantize) for module in teacher.modules())
    _require(not prepared, "teacher", "a float model", "one with fake quantizers")
    mine = {id(parameter) for parameter in student.parameters()}
    shared = any(id(parameter) in mine for parameter in teacher.parameters())
    _require(not shared, "teacher", "another module than the student", "one that shares parameters")


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """A pass in training mode that moves no running statistics and no ranges."""
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    # in eval mode the statistics are read, and must stay
    norms = [norm for norm in norms if norm.training]
    observers = [m for m in model.modules() if isinstance(m, FakeQuantize) and m.observer_enabled]
    for norm in norms:
        norm.track_running_stats = False
    for observer in observers:
        observer.observer_enabled = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for observer in observers:
            observer.observer_enabled = True
