"""ErrorEMA: moving averages of the quantization error's statistics, per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.nn import observe
from qkernels.nn.error_moves import compiled_moves, move, move_op
from qkernels.nn.fake_quantize import NARROW
from qkernels.nn.quant_spec import QuantSpec
from qkernels.ops import _check
from qkernels.ops._library import call
from qkernels.ops.error_stats import ErrorStats, stats_call, update_error_stats


class ErrorEMA(nn.Module):
    """Averages of mean, var, mean_square and clip_rate of e = Q(x) - x over training steps.

    The recorders of weight and activation errors (WQER, AQER) of DNQ, Xia et al., arXiv 2511.01462:
        weight <- weight + (1 - decay) (1 - weight)
        average <- average + (1 - decay) / weight (new - average)
    so the first update is taken as it is. A channel whose new statistics are not finite (an
    overflow under fp16), or an x without elements, leaves the average alone.

    Buffers: `ema` [5, channels], the averages and the weight; `ema_before`, what `ema` was before
    the latest step's update (after the first update: `ema` itself); `updates`, their number;
    `last_step`, the step of the latest one, -1 for none. fp32 (fp64 for fp64 x) in a model cast to
    fp16 or bf16 too. The first two are None until the number of channels is known: from `channels`,
    the first x, or a checkpoint.

    With torch.distributed the averages are those of all ranks' elements together, by one all_reduce
    of [4 channels + 1] numbers in fp64, equal on all ranks; every rank must run the same recorders
    in the same order. Without a given scale each rank quantizes with the range of its own x.

    Args:
        spec: bits, axis, group_size, symmetric, narrow_range, method, percentile and clip as in
            `qkernels.error_stats`. The rest of it is not read: the range is that of x, unless a
            scale is given with x. ValueError on kinds that are not plain when evaluated (PACT's and
            DoReFa's).
        decay: of the average, in [0, 1).
        channels: number of channels, where it is known ahead; always 1 without axis or group_size.

    Attributes:
        sync_ranks: False keeps this rank's statistics to itself, as is right for weights, which are
            the same everywhere.
    """

    ema: Tensor | None
    ema_before: Tensor | None
    updates: Tensor
    last_step: Tensor

    def __init__(self, spec: QuantSpec, *, decay: float = 0.9, channels: int | None = None) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"ErrorEMA: spec must be a QuantSpec, got {spec!r}")
        spec.require_plain("ErrorEMA", "spec")
        _check.check_decay("ErrorEMA", decay)
        if channels is not None and (type(channels) is not int or channels < 0):
            raise ValueError(f"ErrorEMA: channels must be an int of at least 0, got {channels!r}")
        if channels not in (None, 1) and not spec.per_channel:
            raise ValueError(f"ErrorEMA: channels must be 1 without axis, got {channels}")
        self.spec = spec
        self.decay = float(decay)
        self.sync_ranks = True
        self._options = spec.options()
        # last_step as a number, with the count of compiled updates when it was seen; whether there
        # was an update: so that no device is asked in each step
        self._seen: tuple[int, int] | None = None
        self._started = False
        self.register_buffer("ema", None)
        self.register_buffer("ema_before", None)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_step", torch.full((), -1, dtype=torch.int64))
        if channels is not None:
            self.ema, self.ema_before = torch.zeros(5, channels), torch.zeros(5, channels)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | float | None = None,
        zero_point: Tensor | int | None = None,
        *,
        step: int | Tensor | None = None,
    ) -> ErrorStats:
        """In training mode `update`; in both modes -> the average, as `stats`."""
        if self.training:
            self.update(x, scale, zero_point, step=step)
        return self.stats

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        scale: Tensor | float | None = None,
        zero_point: Tensor | int | None = None,
        *,
        step: int | Tensor | None = None,
        again: bool = False,
    ) -> None:
        """Move the average by the errors of x, at most once a step.

        A forward that activation checkpointing repeats in the backward changes nothing.

        Args:
            x, scale, zero_point: as in `qkernels.error_stats`.
            step: the training step, at least 0; a call at the step of the latest update changes
                nothing (gradient accumulation). A 0-dim int64 tensor on x's device is compared
                there. None: each call is a step.
            again: move the average even so. `previous` stays that of before the step.

        Raises:
            TypeError, ValueError: as `qkernels.error_stats`; another number of channels, device or
                kind of step than this module takes.
        """
        compiling = torch.compiler.is_compiling()
        by_torch = compiling or _check_step(step)
        if not compiling and observe.recomputing():
            return
        if not (by_torch or again or step is None or step != self._known_step()):
            return
        op, args = stats_call(x, scale, zero_point, **self._options)
        ema, before = self._fit(x)
        sync = self.sync_ranks and observe.many_ranks()
        if by_torch or sync:
            state = (ema, before, self.updates, self.last_step)
            (move_op if compiling else move)(
                *state, *_count(op, args, ema), _on(x, step), self.decay, sync, again
            )
        elif x.numel() > 0:
            self._fused(ema, before, op, args, step)
        else:
            return
        if not compiling:
            self._note(step)

    @torch.no_grad()
    def record(self, stats: ErrorStats, count: int, *, step: int | None = None) -> None:
        """Move the average by statistics that are known, such as those of a whole calibration set.

        Args:
            stats: as `qkernels.error_stats` gives them, [] or [channels] each.
            count: elements per channel that they are of; the weight of this rank among the others.
            step: as in `update`.

        Raises:
            TypeError, ValueError: stats of another number of channels or on another device; a count
                below 1; a step that `update` would not take.
        """
        if isinstance(step, Tensor) or _check_step(step):
            raise TypeError("ErrorEMA: step must be an int or None for record, got a Tensor")
        if type(count) is not int or count < 1:
            raise ValueError(f"ErrorEMA: count must be an int of at least 1, got {count!r}")
        sound = all(isinstance(part, Tensor) for part in stats) and len(stats) == 4
        if not sound or len({part.numel() for part in stats}) != 1:
            raise TypeError(f"ErrorEMA: stats must be an ErrorStats of equal shapes, got {stats!r}")
        rows = torch.stack([part.reshape(-1) for part in stats])
        ema, before = self._fit_channels(rows.shape[1], rows)
        sync = self.sync_ranks and observe.many_ranks()
        state = (ema, before, self.updates, self.last_step)
        move(*state, rows.to(ema.dtype), count, _on(rows, step), self.decay, sync, False)
        self._note(step)

    def _fused(self, ema: Tensor, before: Tensor, op: str, args: Any, step: Any) -> None:
        """`move` with the average moved by the kernel that reads x."""
        fresh = step is None or step != self._known_step()
        if not self._started:
            self._started = bool(self.updates > 0)  # waits for the device, in the first update
        old = ema.clone()
        update_error_stats(ema, self.decay, "", op, *args)
        if fresh:
            before.copy_(old if self._started else ema)
        self._started = True
        self.updates.add_(1)
        self.last_step.fill_(-1 if step is None else step)

    def _note(self, step: int | Tensor | None) -> None:
        """Remember the latest step, where it is a number."""
        known = not isinstance(step, Tensor)
        self._seen = (compiled_moves(), -1 if step is None else int(step)) if known else None

    def _known_step(self) -> int:
        """last_step as a number; asks the device only after something else than `update` has set
        it: a checkpoint, or compiled code."""
        if self._seen is None or self._seen[0] != compiled_moves():
            self._seen = (compiled_moves(), int(self.last_step))
        return self._seen[1]

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(ema, ema_before), made or widened for x if need be."""
        return self._fit_channels(numeric.channel_count(x.shape, *self._layout(x)), x)

    def _fit_channels(self, channels: int, x: Tensor) -> tuple[Tensor, Tensor]:
        compute = numeric.compute_dtype(x.dtype)
        if self.ema is None or self.ema_before is None:
            self.ema = torch.zeros(5, channels, dtype=compute, device=x.device)
            self.ema_before = torch.zeros_like(self.ema)
            self.updates, self.last_step = self.updates.to(x.device), self.last_step.to(x.device)
        if self.ema.shape[1] != channels:
            raise ValueError(
                f"ErrorEMA: x must have {self.ema.shape[1]} channels as before, got {channels}"
            )
        if self.ema.device != x.device:
            raise ValueError(
                f"ErrorEMA: x must be on {self.ema.device} like the average, got {x.device}"
            )
        if self.ema.dtype is not compute:
            self.ema, self.ema_before = self.ema.to(compute), self.ema_before.to(compute)
        return self.ema, self.ema_before

    def _layout(self, x: Tensor) -> tuple[int | None, int | None]:
        axis = self.spec.axis
        return (axis if axis is None else axis % x.dim()), self.spec.group_size

    @property
    def stats(self) -> ErrorStats:
        """The average, [] or [channels] each; a copy. Zeros before the first update.

        Raises:
            RuntimeError: the number of channels is not known yet.
        """
        return self._named(self._require("stats", self.ema))

    @property
    def previous(self) -> ErrorStats:
        """What `stats` was before the latest step; after the first one, `stats` itself."""
        return self._named(self._require("previous", self.ema_before))

    def at(self, step: int | Tensor) -> tuple[ErrorStats, ErrorStats]:
        """(statistics at step, statistics at step - 1): what `differential_noise` takes.

        The latter is `previous` if the average moved at this step, else the former.
        """
        ema, before = self._require("stats", self.ema), self._require("previous", self.ema_before)
        stats = self._named(ema)
        if _check_step(step) or torch.compiler.is_compiling():
            return stats, self._named(torch.where(self.last_step == step, before, ema))
        return stats, (self._named(before) if step == self._known_step() else stats)

    def _named(self, rows: Tensor) -> ErrorStats:
        shape = (-1,) if self.spec.per_channel else ()
        return ErrorStats(*rows[:4].clone().reshape(4, *shape).unbind())

    def _require(self, what: str, rows: Tensor | None) -> Tensor:
        if rows is None:
            raise RuntimeError(
                f"ErrorEMA: {what} must be asked after the first call, got no number of channels "
                "(see channels=)"
            )
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ErrorEMA:
        """`to`, `half`, `cuda` and the like; the average is never narrowed below fp32."""

        def wide(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device, torch.float32) if out.dtype in NARROW else out

        return super()._apply(wide, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """The number of channels is the checkpoint's. One without this module's entries (of the
        model without recorders) is none of its business."""
        ema = state_dict.get(prefix + "ema")
        if not any(prefix + name in state_dict for name in self._buffers):
            return
        if ema is not None and self.ema is None:
            self.ema = torch.zeros_like(ema, device=self.updates.device)
            self.ema_before = torch.zeros_like(self.ema)
        self._seen, self._started = None, False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        spec = self.spec
        where = "per tensor" if spec.axis is None else f"axis={spec.axis}"
        if spec.group_size is not None:
            where = f"group_size={spec.group_size}"
        kind = "symmetric" if spec.symmetric else "affine"
        return f"{spec.bits} bits, {kind}, {where}, {spec.method}, decay={self.decay}"


def _check_step(step: Any) -> bool:
    """Whether a step is a tensor; raises if it is none of what it can be."""
    if isinstance(step, Tensor):
        if step.dtype is not torch.int64 or step.dim() != 0:
            raise TypeError(
                "ErrorEMA: step must be an int or a 0-dim int64 tensor, got "
                f"{step.dtype} of shape {tuple(step.shape)}"
            )
        return True
    if step is None:
        return False
    if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
        raise TypeError(f"ErrorEMA: step must be an int or a 0-dim int64 tensor, got {step!r}")
    if not 0 <= step <= numeric.LARGEST_SEED:
        raise ValueError(f"ErrorEMA: step must be in 0..{numeric.LARGEST_SEED}, got {step}")
    return False


def _on(x: Tensor, step: Any) -> Tensor | None:
    if step is None or isinstance(step, Tensor):
        return step
    return torch.full((), step, dtype=torch.int64, device=x.device)


def _count(op: str, args: tuple[Any, ...], ema: Tensor) -> tuple[Tensor, int]:
    """(statistics of this call [4, channels], elements per channel)."""
    x, channels = args[0], ema.shape[1]
    if x.numel() == 0:  # it has no range either
        return torch.zeros_like(ema[:4]), 0
    result = call(op, "", *args)
    stats = result if op == "error_stats" else result[0]
    return stats.reshape(4, -1), x.numel() // channels
