"""Range, scale and zero point of a tensor, per channel.

    minmax      lo = min x, hi = max x
    percentile  lo, hi = the (100 - P)-th and P-th percentile, as torch.quantile (linear)
    mse         the min-max range shrunk by k %, k = 0 .. 79, whose fake quantization has the least
                squared error (the first of equals)
    lsq         scale = 2 mean|x| / sqrt(Qp), Esser et al. 2019; lo, hi = min x, max x

From a range to (scale, zero point), n = qmax - qmin:

    affine      lo = min(lo, 0), hi = max(hi, 0); scale = (hi - lo) / n;
                zp = clamp(qmin - rint(lo / scale), qmin, qmax)
    symmetric   scale = max(-lo, hi) / (n / 2); zp = 0

A scale is never below the smallest normal number, so that an all-zero channel stays zero. NaN in a
channel makes its scale NaN. Reductions are in fp64, so that only the rounding of the result counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference.common import to_channels
from qkernels.backends.reference.fake_quant import quantized


def moved_range(running: Tensor, observed: Tensor, weight: float) -> Tensor:
    """running + weight (observed - running), both [2, ...].

    A running range that is still [0, 0] takes the observed one as it is, so that the average has
    no bias towards 0 at the start. A bound observed as NaN or infinite (an overflow under fp16)
    leaves the running one alone.
    """
    delta = (observed - running).nan_to_num(0.0, 0.0, 0.0)
    one = torch.ones_like(running[0])
    by = torch.where((running != 0).any(0), one * weight, one)
    return running + by * delta


def qparams(
    range: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    running: Tensor | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """range [2, ...] -> (scale, zero point as int32), each of shape [...].

    A running range moves by it, in place, and takes its place.
    """
    if running is not None:
        range = running.copy_(moved_range(running, range, weight))
    lo, hi = range[0], range[1]
    tiny = numeric.smallest_scale(range.dtype)
    # a tensor: torch may turn the division by a number into a multiplication on a GPU
    steps = torch.full_like(lo, (qmax - qmin) / 2 if symmetric else qmax - qmin)
    if symmetric:
        scale = torch.maximum(-lo, hi) / steps
        # NaN must win over the smallest scale, hence clamp and not fmax
        return scale.clamp(min=tiny), torch.zeros_like(scale, dtype=torch.int32)
    zero = torch.zeros_like(lo)
    lo, hi = torch.minimum(lo, zero), torch.maximum(hi, zero)
    scale = ((hi - lo) / steps).clamp(min=tiny)
    zp = (qmin - (lo / scale).round()).clamp(qmin, qmax)
    zp = torch.where(zp.isnan(), float(qmin), zp)
    return scale, zp.to(torch.int32)


def quant_range(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (scale, zero point as int32, range [2, ...]), an entry per channel (0-dim per tensor)."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    rows = to_channels(x, axis, group_size).transpose(0, 1).flatten(1)  # [channels, elements]
    if rows.shape[1] == 0:  # nothing to look at: as for zeros
        rows = rows.new_zeros(rows.shape[0], 1)
    bounds = percentile_range(rows, percentile) if method == "percentile" else minmax(rows)
    if method == "mse":
        bounds = mse_range(rows, bounds, qmin, qmax, symmetric)
    scale, zp = qparams(bounds, qmin, qmax, symmetric)
    if method == "lsq":
        scale = lsq_scale(rows, zp, qmin, qmax, symmetric)
    return scale.reshape(shape), zp.reshape(shape), bounds.reshape(2, *shape)


def minmax(rows: Tensor) -> Tensor:
    """[channels, elements] -> [2, channels]; NaN wins."""
    return torch.stack((rows.amin(1), rows.amax(1)))


def percentile_range(rows: Tensor, percentile: float) -> Tensor:
    """[channels, elements] -> [2, channels]; a channel with a NaN is NaN."""
    ordered = rows.sort(dim=1).values  # NaN sorts last
    has_nan = ordered[:, -1].isnan()
    bounds = []
    for k, w in numeric.percentile_ranks(percentile, rows.shape[1]):
        value = ordered[:, k]
        if w > 0.0:
            value = value + w * (ordered[:, k + 1] - value)
        bounds.append(torch.where(has_nan, torch.nan, value))
    return torch.stack(bounds)


def mse_range(rows: Tensor, bounds: Tensor, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    """The candidate range with the least squared error; all rows of one candidate at a time."""
    best = bounds.clone()
    least = torch.full_like(bounds[0], torch.inf, dtype=torch.float64)
    for k in range(numeric.MSE_CANDIDATES):
        candidate = bounds * (1.0 - numeric.MSE_STEP * k)
        scale, zp = qparams(candidate, qmin, qmax, symmetric)
        v = quantized(rows[None], scale, zp, qmin, qmax, "code")
        error = (v.q * v.scale - rows).to(torch.float64).square().sum(dim=(0, 2))
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, candidate, best)
    return best


def lsq_scale(rows: Tensor, zp: Tensor, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    """2 mean|x| / sqrt(Qp), Qp the codes on the larger side of zero (qmax when symmetric)."""
    qp = torch.full_like(zp, max(qmax, 1)) if symmetric else torch.maximum(qmax - zp, zp - qmin)
    mean = rows.abs().to(torch.float64).mean(1)
    scale = 2.0 * mean / numeric.exact_sqrt(qp.to(torch.float64))
    return scale.to(rows.dtype).clamp(min=numeric.smallest_scale(rows.dtype))
