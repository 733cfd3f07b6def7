"""Statistics of the quantization error e = Q(x) - x of each channel.

    mean         sum e / n
    var          sum (e - mean)^2 / n       the variance of these n elements, not an estimate
    mean_square  sum e^2 / n = mean^2 + var
    clip_rate    share of the elements where the straight-through gradient does not pass

Q as in reference/fake_quant.py; e is rounded to the compute dtype, its statistics are in fp64 and
rounded at the end. A channel without elements has 0 everywhere. NaN and infinities in x show in
the mean and the variance of their channel.

With `ema` [5, channels], an exponential moving average takes part: rows 0 to 3 follow the
statistics, row 4 is the weight that they have gathered, so that the average is never biased
towards its start:

    weight <- weight + (1 - decay) (1 - weight)
    ema    <- ema + (1 - decay) / weight (new - ema)

A channel whose statistics are not all finite is passed over: they would stay in it for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference.common import to_channels
from qkernels.backends.reference.fake_quant import quantized
from qkernels.backends.reference.quant_range import quant_range
from qkernels.ops._check import check_values


def error_stats(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> Tensor:
    """-> [4] or [4, channels]: mean, var, mean_square, clip_rate."""
    check_values("error_stats", scale, zero_point)
    return error_stats_unchecked(
        x, scale, zero_point, qmin, qmax, axis, group_size, clip, ema, decay
    )


def error_stats_unchecked(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None,
    decay: float,
) -> Tensor:
    """error_stats with a scale that is not the user's: an invalid channel is NaN, and no error."""
    rows = to_channels(x, axis, group_size)
    v = quantized(rows, scale, zero_point, qmin, qmax, clip)
    e = (v.q * v.scale - rows).to(torch.float64)
    n = max(rows.shape[0] * rows.shape[2], 1)
    mean = e.sum(dim=(0, 2)) / n
    var = (e - mean.reshape(-1, 1)).square().sum(dim=(0, 2)) / n
    mean_square = mean.square() + var
    clip_rate = (~v.inside).to(torch.float64).sum(dim=(0, 2)) / n
    stats = torch.stack((mean, var, mean_square, clip_rate)).to(rows.dtype)
    if ema is not None:
        move_average(ema, stats, decay)
    return stats.reshape(4, *numeric.params_shape(x.shape, axis, group_size))


def move_average(ema: Tensor, stats: Tensor, decay: float) -> None:
    """One step of the moving average, in place. ema: [5, channels], stats: [4, channels]."""
    rate = 1.0 - decay
    weight = ema[4] + (1.0 - ema[4]) * rate
    values = ema[:4] + (stats - ema[:4]) * (torch.full_like(weight, rate) / weight)
    new = torch.cat((values, weight[None]))
    ema.copy_(torch.where(stats.isfinite().all(0), new, ema))


def error_stats_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (statistics, scale, zero point as int32): those of x's own range."""
    scale, zp, _ = quant_range(x, qmin, qmax, axis, group_size, symmetric, method, percentile)
    args = (x, scale, zp, qmin, qmax, axis, group_size, clip, ema, decay)
    return error_stats_unchecked(*args), scale, zp
