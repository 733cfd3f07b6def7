"""What only a GPU shows: more than 2^31 elements, and a whole training step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from torch import Tensor, nn

import qkernels
from qkernels import Noise, foreach, numeric
from qkernels.nn import FakeQuantize, QuantSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
backend_of = pytest.mark.parametrize("backend", ("native", "triton"))

MANY = 2**31 + 4099
SCALE, BITS = 0.3, 3  # symmetric codes -4 .. 3
QMAX = 3
# where a 32-bit offset is right, where it is not, and the end of the tensor
PARTS = (slice(0, 4096), slice(2**31 - 4096, 2**31 + 4096), slice(MANY - 4099, MANY))
PLACES = (0, 1000, 2**31 - 1, 2**31, 2**31 + 77, MANY - 1)


def need(elements: int, bytes_each: int) -> None:
    """Skip unless the GPU has the memory."""
    torch.cuda.empty_cache()
    wanted = elements * bytes_each
    free = torch.cuda.mem_get_info()[0]
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def many(fill: Callable[[Tensor], Tensor]) -> Tensor:
    """A bf16 tensor of more than 2^31 elements."""
    return fill(torch.empty(MANY, dtype=torch.bfloat16, device="cuda"))


def with_outliers() -> Tensor:
    """Zeros, and 100 at PLACES: what all elements together give is known exactly."""
    x = many(Tensor.zero_)
    for place in PLACES:
        x[place] = 100.0
    return x


@backend_of
def test_more_than_2_31_elements(backend: str) -> None:
    need(MANY, 10)
    x = many(Tensor.normal_).requires_grad_()
    y = qkernels.fake_quant(x, SCALE, bits=BITS, symmetric=True, backend=backend)
    y.backward(torch.ones_like(y))
    for part in PARTS:
        small = x.detach()[part].clone().requires_grad_()
        want = qkernels.fake_quant(small, SCALE, bits=BITS, symmetric=True, backend="reference")
        want.backward(torch.ones_like(want))
        assert_same(y.detach()[part], want.detach())
        assert_same(x.grad[part], small.grad)
    bounds = qkernels.observe_range(x, bits=8, backend=backend)[2]
    assert_same(bounds, torch.stack(torch.aminmax(x.detach())).float())


@backend_of
@pytest.mark.parametrize("axis", (0, 1, 2))
def test_channels_of_more_than_2_31_elements(backend: str, axis: int) -> None:
    """Rows, a middle axis, and columns; the last elements of all channels are looked at."""
    shape = {0: (3, 1, 2**31 // 3 + 1001), 1: (2, 3, 2**31 // 6 + 1001), 2: (2**31 // 6 + 99, 1, 6)}
    x = torch.empty(shape[axis], dtype=torch.bfloat16, device="cuda")
    need(x.numel(), 8)
    x.normal_()
    scale = torch.linspace(0.2, 0.5, x.shape[axis], device="cuda")
    args = dict(bits=BITS, symmetric=True, axis=axis)
    y = qkernels.fake_quant(x, scale, **args, backend=backend)
    long = max(range(3), key=lambda d: x.shape[d])
    for start in (0, x.shape[long] // 2, x.shape[long] - 1000):
        small = x.narrow(long, start, 1000).contiguous()
        want = qkernels.fake_quant(small, scale, **args, backend="reference")
        assert_same(y.narrow(long, start, 1000).contiguous(), want, f"from {start}")
    found = qkernels.observe_range(x, **args, backend=backend)[2]
    others = tuple(d for d in range(3) if d != axis)
    assert_same(found, torch.stack((x.amin(others), x.amax(others))).float(), "range")


@backend_of
def test_lsq_gradients_of_more_than_2_31_elements(backend: str) -> None:
    need(MANY, 10)
    x, scale = with_outliers().requires_grad_(), torch.tensor(SCALE, device="cuda")
    scale.requires_grad_()
    y = qkernels.fake_quant(x, scale, bits=BITS, symmetric=True, grad_scale=1.0, backend=backend)
    y.backward(torch.ones_like(y))
    # zeros contribute nothing, an element above the range its largest code
    assert float(scale.grad) == QMAX * len(PLACES)
    wanted = torch.ones_like(y)
    for place in PLACES:
        wanted[place] = 0.0
    assert bool((x.grad == wanted).all())


@backend_of
def test_error_stats_of_more_than_2_31_elements(backend: str) -> None:
    need(MANY, 4)
    stats = qkernels.error_stats(with_outliers(), SCALE, bits=BITS, symmetric=True, backend=backend)
    share = len(PLACES) / MANY
    error = QMAX * float(torch.tensor(SCALE)) - 100.0
    mean = share * error
    want = (mean, share * error**2 - mean**2, share * error**2, share)
    for name, got, value in zip(stats._fields, stats, want, strict=True):
        assert float(got) == pytest.approx(value, rel=1e-6), name


@backend_of
@pytest.mark.parametrize("method", ("percentile", "lsq", "mse"))
def test_ranges_of_more_than_2_31_elements(backend: str, method: str) -> None:
    if (backend, method) == ("triton", "mse"):
        pytest.skip("eighty candidates an element last long here: the native row is tried")
    need(MANY, 6)
    values = torch.arange(256, dtype=torch.bfloat16, device="cuda") - 100.0  # exact in bf16
    x = values.repeat(MANY // 256 + 1)[:MANY]
    scale, _, bounds = qkernels.observe_range(x, bits=8, method=method, backend=backend)
    whole, rest = divmod(MANY, 256)
    counts = torch.full((256,), whole, dtype=torch.float64)
    counts[:rest] += 1
    spots = values.double().cpu()
    if method == "percentile":
        ends = counts.cumsum(0)
        for got, (rank, _) in zip(bounds, numeric.percentile_ranks(99.0, MANY), strict=True):
            # far from the next value, so that nothing is interpolated
            assert float(got) == float(spots[torch.searchsorted(ends, rank, right=True)])
    elif method == "lsq":
        mean = float((spots.abs() * counts).sum() / MANY)
        zero = 100  # of 0 .. 255 for this range: codes 155 above, 100 below
        assert float(scale) == pytest.approx(2 * mean / (255 - zero) ** 0.5, rel=1e-6)
    else:  # steps of 1 have no error at all: no smaller range is better
        assert bounds.tolist() == [-100.0, 155.0] and float(scale) == 1.0


@backend_of
@pytest.mark.parametrize("op", ("differential_noise", "drop_in_noise", "uniform_noise"))
def test_noise_on_more_than_2_31_elements(backend: str, op: str) -> None:
    need(MANY, 6)
    given = {
        "differential_noise": dict(stats=(0.25, 1.0), axis=None),
        "drop_in_noise": dict(stats=(0.25, 1.0), p=0.5),
        "uniform_noise": dict(scale=1.0, p=0.5),
    }[op]
    at = dict(seed=3, step=5)
    x = many(Tensor.zero_)
    y = getattr(qkernels, op)(x, **given, **at, backend=backend)
    for part in PARTS:
        small = x[part]
        want = getattr(qkernels, op)(small, **given, **at, offset=part.start, backend="reference")
        if backend == "native" or op == "uniform_noise":
            assert_same(y[part], want, f"{part}")
        else:  # 4 units of fp32 are at most one of bf16
            torch.testing.assert_close(y[part], want, rtol=2.0**-7, atol=1e-6)


@backend_of
@pytest.mark.parametrize("bits, packed", ((8, False), (4, True)))
def test_codes_of_more_than_2_31_elements(backend: str, bits: int, packed: bool) -> None:
    need(MANY, 12)
    x = many(Tensor.normal_).view(1, -1)
    kw = dict(bits=bits, packed=packed)
    codes = qkernels.quantize(x, 0.05, 100 if bits == 8 else 7, **kw, backend=backend)
    back = qkernels.dequantize(
        codes, 0.05, 100 if bits == 8 else 7, **kw, size=MANY if packed else None,
        dtype=x.dtype, backend=backend,
    )  # fmt: skip
    for part in PARTS:
        want = qkernels.fake_quant(
            x[0, part], 0.05, 100 if bits == 8 else 7, bits=bits, backend="reference"
        )
        assert_same(back[0, part], want, f"{part}")


@backend_of
def test_a_list_with_more_than_2_31_elements(backend: str) -> None:
    need(MANY, 8)
    xs = [torch.randn(1000, device="cuda"), many(Tensor.normal_), torch.randn(5, device="cuda")]
    ys = foreach.fake_quant(xs, SCALE, bits=BITS, symmetric=True, backend=backend)
    for i, part in ((0, slice(None)), *((1, part) for part in PARTS), (2, slice(None))):
        want = qkernels.fake_quant(
            xs[i][part], SCALE, bits=BITS, symmetric=True, backend="reference"
        )
        assert_same(ys[i][part], want, f"tensor {i}, {part}")


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The step in a graph, after a few runs outside of it; and what it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@backend_of
def test_a_step_in_a_cuda_graph(backend: str) -> None:
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    scale = torch.full((64,), 0.2, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> torch.Tensor:
        x.grad = scale.grad = None
        y = qkernels.fake_quant(x, scale, bits=4, axis=0, symmetric=True, backend=backend)
        y = qkernels.fake_quant(y, bits=4, method="percentile", backend=backend)
        y.backward(grad)
        return y

    graph, result = captured(step)
    got = (result, x.grad, scale.grad)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    kept = [t.detach().clone() for t in got]
    want = step()
    for a, b in zip(kept, (want.detach(), x.grad, scale.grad), strict=True):
        assert_same(a, b)


class Layer(nn.Module):
    """A linear layer with both quantizers; its sums run in one order, graph or not."""

    def __init__(self, inputs: int, outputs: int, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        ema = None if learned else 0.9
        self.of_weight = FakeQuantize(
            QuantSpec(4, axis=0, symmetric=True, learned=learned), outputs
        )
        self.of_input = FakeQuantize(QuantSpec(4, learned=learned, ema=ema))

    def forward(self, x: Tensor) -> Tensor:
        x, w = self.of_input(x), self.of_weight(self.weight)
        return (x[:, None, :] * w).sum(2)


class Training(nn.Module):
    """A whole step: STE or LSQ quantizers, noise that the graph advances, lists, an optimizer."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Layer(12, 16, learned), Layer(16, 3, learned)
        shapes = ((8, 9), (4, 3, 3), (5,), (300, 7))
        self.listed = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.scales = nn.ParameterList(torch.full((shape[0],), 0.3) for shape in shapes)
        self.cuda()
        self.noise = Noise(7, device="cuda")
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        self.register_buffer("x", torch.randn(6, 12).cuda())

    def noisy_list(self) -> list[Tensor]:
        """Fake-quantized weights, and differential noise by the statistics of their errors."""
        scales = list(self.scales)
        ys = foreach.fake_quant(list(self.listed), scales, bits=4, axis=0, symmetric=True)
        with torch.no_grad():
            stats = foreach.error_stats(list(self.listed), bits=4, axis=0)
        at = [self.noise.at(f"listed.{i}") for i in range(len(ys))]
        seeds = [a["seed"] for a in at]
        return foreach.differential_noise(ys, stats, seed=seeds, step=at[0]["step"])

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        x = qkernels.uniform_noise(self.x, 0.1, p=0.5, **self.noise.at("x"))
        loss = self.last(self.first(x).relu()).square().mean()
        loss = loss + torch.stack([y.square().mean() for y in self.noisy_list()]).sum()
        loss.backward()
        self.optimizer.step()
        self.noise.advance()
        return loss.detach()


@backend_of
@pytest.mark.parametrize("learned", (False, True), ids=("ste", "lsq"))
def test_a_whole_training_step_in_a_cuda_graph(backend: str, learned: bool) -> None:
    with qkernels.use_backend(backend):
        eager, other = Training(learned), Training(learned)
        graph, loss = captured(other.step)
        for _ in range(3):  # as often as the other was run before its capture
            eager.step()
        start = [p.detach().clone() for p in eager.parameters()]
        for i in range(5):
            batch = torch.randn(6, 12).cuda() * (i + 1)
            eager.x.copy_(batch)
            other.x.copy_(batch)
            want = eager.step()
            graph.replay()
            assert_same(loss.clone(), want, f"loss of step {i}")
            states = (eager.state_dict(), other.state_dict())
            for name, value in states[0].items():
                assert_same(states[1][name], value, f"{name} after step {i}")
        assert eager.noise.state_dict() == other.noise.state_dict() == {"seed": 7, "step": 8}
        moved = [not torch.equal(a, b) for a, b in zip(start, eager.parameters(), strict=True)]
        assert all(moved), "a parameter that does not move shows nothing"
