"""differential_noise, drop_in_noise and uniform_noise: noise named by (seed, step, index).

docs/noise.md says how each draw follows from its counter.
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops import _check
from qkernels.ops._noise import add_noise
from qkernels.ops.error_stats import ErrorStats

# an ErrorStats, or a pair (mean, std) of tensors or numbers
Stats = Union[ErrorStats, tuple[Union[Tensor, float], Union[Tensor, float]]]  # noqa: UP007


def as_param(op: str, name: str, x: Tensor, value: Any, shape: tuple[int, ...]) -> Tensor:
    """A mean, std or scale in the compute dtype, without gradient; a number goes for all."""
    compute = numeric.compute_dtype(x.dtype)
    if isinstance(value, Tensor):
        if value.dtype is compute and not value.requires_grad:
            return value.resolve_neg()
        if value.dtype not in numeric.FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be a floating tensor, got {value.dtype}")
        if value.dtype is torch.float64 and compute is not torch.float64:
            raise TypeError(f"{op}: {name} must be {compute} for {x.dtype} x, got {value.dtype}")
        return value.detach().resolve_neg().to(compute)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a Tensor or a number, got {type(value).__name__}")
    return torch.full(shape, float(value), dtype=compute, device=x.device)


def as_stats(
    op: str, name: str, x: Tensor, stats: Any, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """(mean, std) of an ErrorStats or a pair (mean, std)."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    prefix = "" if name == "stats" else "prev_"
    if isinstance(stats, ErrorStats):
        stats = (stats.mean, stats.std)
    if not isinstance(stats, (tuple, list)) or len(stats) != 2:
        raise TypeError(
            f"{op}: {name} must be an ErrorStats or a pair (mean, std), got {describe(stats)}"
        )
    return (
        as_param(op, f"{prefix}mean", x, stats[0], shape),
        as_param(op, f"{prefix}std", x, stats[1], shape),
    )


def describe(value: Any) -> str:
    """The type of a value, with the length of a sequence."""
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, (tuple, list)) else name


def as_counter(op: str, name: str, value: Any) -> tuple[int, Tensor | None]:
    """(number, None) or (0, tensor): where the kernels find a seed or a step."""
    if isinstance(value, Tensor):
        return 0, value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int or a 0-dim int64 tensor, got {value!r}")
    return value, None  # type: ignore[return-value]


def as_offset(op: str, offset: Any) -> int:
    """offset as it is, if it is an int."""
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"{op}: offset must be an int, got {offset!r}")
    return offset  # type: ignore[return-value]


def place(
    op: str, x: Any, seed: Any, step: Any, axis: Any, group_size: Any
) -> tuple[tuple[Any, ...], int | None]:
    """((seed, step, seed_at, step_at), axis) of a call, with the checks that all ops share."""
    _check.check_tensor(op, "x", x)
    axis = _check.normal_axis(op, x, axis, group_size)
    seed_value, seed_at = as_counter(op, "seed", seed)
    step_value, step_at = as_counter(op, "step", step)
    return (seed_value, step_value, seed_at, step_at), axis


def differential_args(
    w: Tensor,
    stats: Stats,
    prev_stats: Stats | None = None,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    ramp: float = 1.0,
    offset: int = 0,
    axis: int | None = 0,
    group_size: int | None = None,
) -> tuple[Any, ...]:
    """The schema's arguments for the arguments of `differential_noise`."""
    op = "differential_noise"
    counter, axis = place(op, w, seed, step, axis, group_size)
    mean, std = as_stats(op, "stats", w, stats, axis, group_size)
    previous: tuple[Tensor | None, Tensor | None] = (None, None)
    if prev_stats is not None:
        previous = as_stats(op, "prev_stats", w, prev_stats, axis, group_size)
    _check.check_number(op, "ramp", ramp)
    offset = as_offset(op, offset)
    return w, mean, std, *previous, *counter, float(ramp), offset, axis, group_size


def drop_in_args(
    x: Tensor,
    stats: Stats,
    *,
    p: float,
    seed: int | Tensor,
    step: int | Tensor,
    ramp: float = 1.0,
    offset: int = 0,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Any, ...]:
    """The schema's arguments for the arguments of `drop_in_noise`."""
    op = "drop_in_noise"
    counter, axis = place(op, x, seed, step, axis, group_size)
    mean, std = as_stats(op, "stats", x, stats, axis, group_size)
    _check.check_number(op, "p", p)
    _check.check_number(op, "ramp", ramp)
    offset = as_offset(op, offset)
    return x, mean, std, p, *counter, float(ramp), offset, axis, group_size


def uniform_args(
    x: Tensor,
    scale: Tensor | float,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    p: float = 1.0,
    offset: int = 0,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Any, ...]:
    """The schema's arguments for the arguments of `uniform_noise`."""
    op = "uniform_noise"
    counter, axis = place(op, x, seed, step, axis, group_size)
    shape = numeric.params_shape(x.shape, axis, group_size)
    scale = as_param(op, "scale", x, scale, shape)
    _check.check_number(op, "p", p)
    return x, scale, p, *counter, as_offset(op, offset), axis, group_size


def differential_noise(
    w: Tensor,
    stats: Stats,
    prev_stats: Stats | None = None,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    ramp: float = 1.0,
    offset: int = 0,
    axis: int | None = 0,
    group_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add the change of a Gaussian perturbation from one step to the next (DNQ).

    y = w + ramp * (delta_t - delta_{t-1}),  delta_t = mean + std * eps_t,  eps_t ~ N(0, 1)

    of Xia et al., arXiv 2511.01462. Whatever the mean, the noise has mean 0, variance 2 std^2 and
    correlation -1/2 from one step to the next, and its sum over the steps 1 .. T is
    delta_T - delta_0. delta_{t-1} is drawn again from its counter, not stored. The gradient of w is
    the identity; nothing is saved for it.

    Args:
        w: any shape and strides; float32, float64, float16 or bfloat16. Computed in fp32 (fp64 for
            fp64), in one pass.
        stats: an `ErrorStats`, or a pair (mean, std) of numbers or of tensors that are 0-dim per
            tensor, 1-D with one entry per channel or group; std finite and at least 0.
        prev_stats: the statistics at step - 1, for delta_{t-1}; None: the present ones.
        seed: 0 .. 2^63 - 1; a 0-dim int64 tensor on w's device is read by the kernel, so that a
            captured CUDA graph can change it.
        step: likewise; t. The step before 0 is 2^63 - 1.
        ramp: factor of the noise.
        offset: index of w's first element in a larger tensor of which w is a piece (row-major): a
            tensor cut along its first axis gets the noise of the whole.
        axis, group_size: as in `fake_quant`; axis is 0 here unless given.
        inplace: write to w and return it.
        backend: "native", "triton" or "reference" for this call; None: the table's choice.

    Returns:
        A tensor of w's shape and dtype; w's strides if they are dense, else their dense order. The
        same bits for the same (seed, step, offset) and values on every backend (Triton: normals to
        4 ulp), thread count and memory layout.

    Raises:
        TypeError, ValueError: dtype of w or of the statistics, their size, device or sign (values
            are checked on the CPU; on CUDA such a channel is NaN, and QKERNELS_CHECK=1 checks
            there too), seed, step, ramp, offset, axis, group_size, backend. Nothing is written.
    """
    args = differential_args(
        w,
        stats,
        prev_stats,
        seed=seed,
        step=step,
        ramp=ramp,
        offset=offset,
        axis=axis,
        group_size=group_size,
    )
    row = _registry.check_backend(backend, "differential_noise: backend")
    return add_noise("differential_noise", row, inplace, *args)


def drop_in_noise(
    x: Tensor,
    stats: Stats,
    *,
    p: float,
    seed: int | Tensor,
    step: int | Tensor,
    ramp: float = 1.0,
    offset: int = 0,
    axis: int | None = None,
    group_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add Gaussian noise to a random share p of the elements (stochastic drop-in, DNQ).

    y = x + ramp * m * (mean + std * eps),  m ~ Bernoulli(p),  eps ~ N(0, 1)

    of Xia et al., arXiv 2511.01462. The gradient of x is the identity; nothing is saved for it.

    Args:
        p: probability that an element gets noise, in [0, 1] (rounded to a multiple of 2^-24).
        x, stats, seed, step, ramp, offset, axis, group_size, inplace, backend: as in
            `differential_noise`, but per tensor unless axis or group_size is given.

    Returns:
        A tensor like x; where m is 0, the very values of x.

    Raises:
        TypeError, ValueError: as `differential_noise`; p.
    """
    args = drop_in_args(
        x,
        stats,
        p=p,
        seed=seed,
        step=step,
        ramp=ramp,
        offset=offset,
        axis=axis,
        group_size=group_size,
    )
    row = _registry.check_backend(backend, "drop_in_noise: backend")
    return add_noise("drop_in_noise", row, inplace, *args)


def uniform_noise(
    x: Tensor,
    scale: Tensor | float,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    p: float = 1.0,
    offset: int = 0,
    axis: int | None = None,
    group_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add noise as wide as a quantization step (NoiseQuant of GHN-QAT; pseudo quantization noise).

    y = x + m * scale * u,  u ~ U(-1/2, 1/2),  m ~ Bernoulli(p)

    after Yun and Wong, arXiv 2309.13773. u has standard deviation 1 / sqrt(12). The gradient of x
    is the identity; nothing is saved for it, and scale gets none.

    Args:
        scale: a number or a tensor, 0-dim per tensor or 1-D with one entry per channel or group;
            finite and at least 0: the quantization step, as `quant_range` gives it.
        x, p, seed, step, offset, axis, group_size, inplace, backend: as in `drop_in_noise`.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: as `drop_in_noise`.
    """
    args = uniform_args(
        x,
        scale,
        seed=seed,
        step=step,
        p=p,
        offset=offset,
        axis=axis,
        group_size=group_size,
    )
    row = _registry.check_backend(backend, "uniform_noise: backend")
    return add_noise("uniform_noise", row, inplace, *args)
