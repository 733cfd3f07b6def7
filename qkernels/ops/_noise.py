"""What the noise ops declare to torch, and how they run; the public side is ops/noise.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops import _check
from qkernels.ops._inplace import ToBeWritten, check_writable, written
from qkernels.ops._library import call, check, define, run_checked, traced

_COUNTER = "SymInt seed, SymInt step, Tensor? seed_at, Tensor? step_at, "
_PLACE = "SymInt offset, int? axis, int? group_size, *, str backend='') -> Tensor"


def check_differential_noise(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    prev_mean: Tensor | None,
    prev_std: Tensor | None,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    ramp: float,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> None:
    """Raise on arguments that no row could run."""
    op = "differential_noise"
    params = {"mean": mean, "std": std, "prev_mean": prev_mean, "prev_std": prev_std}
    if (prev_mean is None) != (prev_std is None):
        raise ValueError(f"{op}: prev_mean and prev_std must be given together, got one of them")
    check_noise(op, x, params, axis, group_size)
    check_counter(op, x, seed, step, seed_at, step_at, offset)


def check_drop_in_noise(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    p: float,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    ramp: float,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> None:
    """Raise on arguments that no row could run."""
    op = "drop_in_noise"
    check_noise(op, x, {"mean": mean, "std": std}, axis, group_size)
    check_counter(op, x, seed, step, seed_at, step_at, offset)
    _check.check_probability(op, "p", p)


def check_uniform_noise(
    x: Tensor,
    scale: Tensor,
    p: float,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    offset: int,
    axis: int | None,
    group_size: int | None,
    inplace: bool = False,
) -> None:
    """Raise on arguments that no row could run."""
    op = "uniform_noise"
    check_noise(op, x, {"scale": scale}, axis, group_size)
    check_counter(op, x, seed, step, seed_at, step_at, offset)
    _check.check_probability(op, "p", p)


def check_noise(
    op: str,
    x: Tensor,
    params: dict[str, Tensor | None],
    axis: int | None,
    group_size: int | None,
) -> None:
    """x, its granularity, and parameters with one entry per channel."""
    _check.check_tensor(op, "x", x)
    _check.check_granularity(op, x.shape, axis, group_size)
    channels = numeric.channel_count(x.shape, axis, group_size)
    compute = numeric.compute_dtype(x.dtype)
    for name, p in params.items():
        if p is None:
            continue
        if p.dtype is not compute:
            raise TypeError(f"{op}: {name} must be {compute} for {x.dtype} x, got {p.dtype}")
        _check.check_param(op, name, p, x, channels)


def check_counter(
    op: str,
    x: Tensor,
    seed: int,
    step: int,
    seed_at: Tensor | None,
    step_at: Tensor | None,
    offset: int,
) -> None:
    """seed and step in 0 .. 2^63 - 1, or 0-dim int64 tensors on x's device; offset likewise."""
    most = numeric.LARGEST_SEED
    for name, value, limit in (
        ("seed", seed, most),
        ("step", step, most),
        ("offset", offset, most - x.numel()),
    ):
        if not 0 <= value <= limit:
            raise ValueError(f"{op}: {name} must be in 0..{limit}, got {value}")
    for name, at in (("seed", seed_at), ("step", step_at)):
        if at is None:
            continue
        if at.dtype is not torch.int64 or at.dim() != 0:
            raise TypeError(
                f"{op}: {name} must be an int or a 0-dim int64 tensor, got {at.dtype} of shape "
                f"{tuple(at.shape)}"
            )
        if at.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {at.device}")


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


define(
    "differential_noise",
    "(Tensor x, Tensor mean, Tensor std, Tensor? prev_mean, Tensor? prev_std, "
    + _COUNTER
    + "float ramp, "
    + _PLACE,
    check_differential_noise,
    _fake,
)
define(
    "drop_in_noise",
    "(Tensor x, Tensor mean, Tensor std, float p, " + _COUNTER + "float ramp, " + _PLACE,
    check_drop_in_noise,
    _fake,
)
define(
    "uniform_noise",
    "(Tensor x, Tensor scale, float p, " + _COUNTER + _PLACE,
    check_uniform_noise,
    _fake,
)

OPS = ("differential_noise", "drop_in_noise", "uniform_noise")


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.others = (None,) * (len(inputs) - 1)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *ctx.others


for _op in OPS:
    torch.library.register_autograd(f"qkernels::{_op}", _backward, setup_context=_setup_context)


class AddNoise(torch.autograd.Function):
    """The eager carrier of the gradient, which is that of x + constant. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, backend: str, rest: tuple[Any, ...]) -> Tensor:
        return run_checked(op, backend, x, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


def check_statistics(op: str, x: Tensor, *rest: Any) -> None:
    """Raise on statistics that are not finite or negative, as the rows do; see `check_stats`."""
    if op == "uniform_noise":
        _check.check_stats(op, None, rest[0])
        return
    _check.check_stats(op, rest[0], rest[1])
    if op == "differential_noise" and rest[3] is not None:
        _check.check_stats(op, rest[2], rest[3], "prev_")


def add_noise(op: str, backend: str, inplace: bool, x: Tensor, *rest: Any) -> Tensor:
    """Run a noise op on checked types; `rest` are the schema's arguments after x."""
    if traced(x):
        y = call(op, backend, x, *rest)
        return x.copy_(y) if inplace else y
    if inplace:
        check_writable(op, x)
    if torch.is_grad_enabled() and x.requires_grad:
        if not inplace:
            return AddNoise.apply(x, op, backend, rest)
        check(op, x, *rest)
        check_statistics(op, x, *rest)  # a refusal leaves autograd's state alone too
        ToBeWritten.apply(x)
        _registry.run(op, backend, x.detach(), *rest, True)
        return x
    y = run_checked(op, backend, x, *rest, inplace)
    return written(x) if inplace else y
