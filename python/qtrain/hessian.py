"""The Hessian of a model's loss: products with it, its trace, its largest eigenvalue.

The loss is the mean over all examples of all batches, the model stands in eval mode (BatchNorm by
its running statistics, no dropout), and the Hessian H is that of the parameters that require grad,
in their order, as one vector of n entries. ReLU counts as piecewise linear: what its kinks would
add to H is not seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkernels.nn import QuantLayer

from .progress import Track
from .seeds import generator

# a group of eigenvalues just below the top one has a small residual long before the top is found
LEAST_ITERATIONS = 8

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> the mean over the batch's examples


def require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"flatness: {name} must be {rule}, got {value}")


def require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"flatness: {name} must be finite, got {value}")


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy of a batch (x, y): a loss that has an accuracy.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        holds = 0 <= self.label_smoothing < 1
        require(holds, "label_smoothing", "in [0, 1)", self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return self.of(model(x), y)

    def of(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


cross_entropy = CrossEntropy()


@dataclass(frozen=True)
class Trace:
    """The mean of ``values``, one per probe, and its standard error (None for a single probe)."""

    mean: float
    standard_error: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue: with its sign, not the largest in size.

    Attributes:
        residual: |H v - value v| for the unit vector v that was found; H has an eigenvalue no
            farther from ``value`` than this.
        converged: the residual is within the tolerance. This proves that ``value`` is near an
            eigenvalue, not that it is the largest: a start vector with almost nothing of the top
            eigenvector in it can settle on the next one.
        iterations: of Lanczos.
        smallest: the smallest value that came up, coarser than ``value`` and never below the
            smallest eigenvalue; if it is clearly negative, the model is not at a minimum of this
            loss.
    """

    value: float
    residual: float
    converged: bool
    iterations: int
    smallest: float


class Objective:
    """A model's mean loss over a list of batches.

    Args:
        model: on one device, in one dtype.
        batches: each a tensor, or a tuple, list or mapping whose first entry has one row per
            example; of any sizes.
        loss: twice differentiable where H is asked for, as is the model.
        track: advanced by 1 for each batch and each product, or each forward without one.

    Raises:
        ValueError: no batch, or an empty one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = cross_entropy,
        track: Track | None = None,
    ) -> None:
        self.model, self.loss, self.batches = model, loss, list(batches)
        sizes = [_examples(batch) for batch in self.batches]
        rule = "a list of at least one batch, each of at least one example"
        require(bool(sizes) and min(sizes) > 0, "batches", rule, f"sizes {sizes}")
        self.track = track if track is not None else Track(0, "", quiet=True)
        self.examples = sum(sizes)
        self.shares = [size / self.examples for size in sizes]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.params)

    def require_hessian(self) -> None:
        """Raises: ValueError if the model has fake quantizers (whose derivatives are made up) or no
        parameter that requires grad."""
        quantized = any(isinstance(module, QuantLayer) for module in self.model.modules())
        require(not quantized, "model", "a float model", "one with fake quantizers")
        require(self.size > 0, "model", "one with a parameter that requires grad", "none")

    def place(self, vector: Tensor) -> Tensor:
        return vector.to(self.params[0])

    def products(self) -> Iterator[tuple[float, Callable[[Tensor], Tensor]]]:
        """(share, v -> H v of the batch) for each batch: one graph serves many v."""
        # a parameter that the loss does not see has gradient 0
        how: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        for share, batch in zip(self.shares, self.batches, strict=True):
            value = self.loss(self.model, batch)
            grads = _grad(value, self.params, create_graph=True, **how)

            def product(vector: Tensor, grads: Sequence[Tensor] = grads) -> Tensor:
                parts = vector.split([p.numel() for p in self.params])
                pairs = [(g, v.view_as(g)) for g, v in zip(grads, parts, strict=True)]
                # a constant gradient has no part in H, and nothing to differentiate
                pairs = [pair for pair in pairs if pair[0].requires_grad]
                if not pairs:
                    return torch.zeros_like(vector)
                outputs, inner = zip(*pairs, strict=True)
                found = _grad(outputs, self.params, inner, retain_graph=True, **how)
                return torch.cat([part.flatten() for part in found])

            yield share, product

    def product(self, vector: Tensor) -> Tensor:
        """H v."""
        total = torch.zeros_like(vector)
        for share, product in self.products():
            total.add_(product(vector), alpha=share)
            self.track.advance()
        return total

    @torch.no_grad()
    def scores(self) -> tuple[float, float | None]:
        """Loss (it need not be finite), and accuracy if it is a `CrossEntropy` of classes."""
        loss, correct, count = 0.0, 0, 0
        for share, batch in zip(self.shares, self.batches, strict=True):
            if isinstance(self.loss, CrossEntropy):
                logits, y = self.model(batch[0]), batch[1]
                value = self.loss.of(logits, y)
                if not y.is_floating_point():
                    correct += int((logits.argmax(1) == y).sum())
                    count += y.numel()
            else:
                value = self.loss(self.model, batch)
            loss += share * float(value)
            self.track.advance()
        return loss, correct / count if count else None


@contextmanager
def standing_still(model: nn.Module) -> Iterator[None]:
    """Eval mode, and kernels that can be differentiated twice and give the same in every run; each
    module's own mode is put back. TF32 is left as the caller has it: on a GPU that has it switched
    on, figures have its precision."""
    training = [(module, module.training) for module in model.modules()]
    # not cudnn.flags(): it reads allow_tf32, which fails where TF32 was set by fp32_precision
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        model.eval()
        cudnn.benchmark, cudnn.deterministic = False, True
        # the fused kernels of scaled_dot_product_attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        for module, mode in training:
            module.training = mode


def hessian_vector_product(
    model: nn.Module, vector: Tensor, batches: Iterable[Any], *, loss: Loss = cross_entropy
) -> Tensor:
    """H v by double backward (Pearlmutter, Fast exact multiplication by the Hessian, 1994).

    Args:
        vector: [n], over the parameters that require grad.
        model, batches, loss: as in `Objective`; the model is left as it was.

    Returns:
        [n], in the dtype of the parameters.
    """
    objective = Objective(model, batches, loss)
    objective.require_hessian()
    shape = (objective.size,)
    require(vector.shape == shape, "vector", f"of shape {shape}", tuple(vector.shape))
    with standing_still(model), torch.enable_grad():
        return objective.product(objective.place(vector))


def hessian_trace(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    probes: int = 32,
    seed: int = 0,
    track: Track | None = None,
) -> Trace:
    """The trace of H as the mean of z^T H z over random vectors z of entries +1 and -1.

    E[z z^T] = I gives E[z^T H z] = tr H, with variance 2 (|H|_F^2 - sum_i H_ii^2): a diagonal H has
    its trace exactly. Hutchinson, A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines, 1990; for networks as in Yao et al., PyHessian, arXiv 1912.07145.

    Args:
        probes: how many z. Probe i is a function of (seed, i) and n: equal models, equal probes.
        model, batches, loss, track: as in `Objective`; the model is left as it was.

    Raises:
        ValueError: as `Objective.require_hessian`; probes.
        NotImplementedError: an operation of the model has no second derivative.
        FloatingPointError: the result is not finite.
    """
    require(probes >= 1, "probes", "at least 1", probes)
    objective = Objective(model, batches, loss, track)
    objective.require_hessian()
    values = [0.0] * probes
    with standing_still(model), torch.enable_grad():
        for share, product in objective.products():
            for i in range(probes):
                stream = generator(seed, i, "flatness probe")
                signs = torch.randint(0, 2, (objective.size,), generator=stream) * 2 - 1
                z = objective.place(signs)
                values[i] += share * _dot(z, product(z))
                objective.track.advance()
    mean, spread = mean_and_std(values)
    require_finite("trace", mean)
    return Trace(mean, None if spread is None else spread / math.sqrt(probes), tuple(values))


def top_eigenvalue(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    iterations: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
    track: Track | None = None,
) -> TopEigenvalue:
    """The largest eigenvalue of H by Lanczos iteration with full reorthogonalization.

    (Golub and Van Loan, Matrix Computations, chapter 10.) The value is a Rayleigh quotient: but for
    rounding never above the true one. Negative eigenvalues keep their sign, so the result is the
    largest algebraic one; it is negative only where no direction of positive curvature was found.
    A small residual proves an eigenpair, not the top one.

    Args:
        iterations: products with H at most, and one more for the residual. Memory: 4 n bytes an
            iteration (for fp32), so 160 n for the default.
        tolerance: stop where the residual is this times the eigenvalue, after at least
            ``LEAST_ITERATIONS`` unless the residual is mere rounding.
        seed: of the start vector.
        model, batches, loss, track: as in `Objective`; the model is left as it was. track is moved
            on by iterations + 1 products however many were needed.

    Raises:
        ValueError: as `Objective.require_hessian`; iterations, tolerance.
        NotImplementedError: an operation of the model has no second derivative.
        FloatingPointError: the result is not finite.
    """
    require(iterations >= 1, "iterations", "at least 1", iterations)
    require(tolerance > 0, "tolerance", "positive", tolerance)
    objective = Objective(model, batches, loss, track)
    objective.require_hessian()
    start = torch.randn(objective.size, generator=generator(seed, 0, "flatness start"))
    with standing_still(model), torch.enable_grad():
        v, used, smallest, rounding = _lanczos(objective, start, iterations, tolerance)
        product = objective.product(v)
    objective.track.advance((iterations - used) * len(objective.batches))
    value = _dot(v, product)
    rest = product - value * v
    residual = math.sqrt(_dot(rest, rest))
    enough = used >= min(LEAST_ITERATIONS, objective.size)
    converged = residual <= (max(tolerance * abs(value), rounding) if enough else rounding)
    return TopEigenvalue(value, residual, converged, used, min(smallest, value))


def _lanczos(
    objective: Objective, start: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, int, float, float]:
    """(unit vector, products, smallest Ritz value, a residual that is but rounding)."""
    # not power iteration: it finds the largest in size, be it negative, and needs many times the
    # products, for the top eigenvalues of a classifier are a group, about one per class
    most = min(iterations, objective.size)
    w = _unit(objective.place(start))
    # not touched, an empty row takes no memory of the machine's
    basis = w.new_empty(most, len(w))
    diagonal: list[float] = []
    beside: list[float] = []
    for used in range(1, most + 1):
        basis[used - 1] = w
        seen = basis[:used]
        w = objective.product(seen[-1])
        diagonal.append(_dot(w, seen[-1]))
        require_finite("curvature", diagonal[-1])
        for _ in range(2):  # once leaves rounding errors of the size of what it takes away
            w -= seen.T @ (seen @ w)
        beside.append(math.sqrt(_dot(w, w)))
        low, high, weights = _ritz(diagonal, beside[:-1])
        rounding = 16 * torch.finfo(w.dtype).eps * max(abs(low), abs(high))
        residual = beside[-1] * abs(float(weights[-1]))
        settled = used >= LEAST_ITERATIONS and residual <= tolerance * abs(high)
        if settled or residual <= rounding:
            break
        w /= beside[-1]
    return _unit(seen.T @ weights.to(w)), used, low, rounding


def _ritz(diagonal: list[float], beside: list[float]) -> tuple[float, float, Tensor]:
    """Least and greatest eigenvalue of a symmetric tridiagonal matrix, and the latter's vector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    values, vectors = torch.linalg.eigh(matrix + off + off.T)
    return float(values[0]), float(values[-1]), vectors[:, -1]


def _grad(*args: Any, **how: Any) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(*args, **how)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        raise NotImplementedError(
            f"flatness: model must be twice differentiable, got {text}"
        ) from error


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1; None for one value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def _examples(batch: Any) -> int:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return len(batch if isinstance(batch, Tensor) else batch[0])


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(_dot(vector, vector))
