"""What only a GPU shows: more than 2^31 elements, and capture in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

import qkernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
backend_of = pytest.mark.parametrize("backend", ("native", "triton"))


@backend_of
def test_more_than_2_31_elements(backend: str) -> None:
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip(f"needs {8 * n / 2**30:.0f} GiB of GPU memory")
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    y = qkernels.fake_quant(x, 0.3, bits=3, symmetric=True, backend=backend)
    y.backward(torch.ones_like(y))
    for part in (slice(0, 4096), slice(2**31 - 4096, 2**31 + 4096), slice(n - 4099, n)):
        small = x.detach()[part].clone().requires_grad_()
        want = qkernels.fake_quant(small, 0.3, bits=3, symmetric=True, backend="reference")
        want.backward(torch.ones_like(want))
        assert_same(y.detach()[part], want.detach())
        assert_same(x.grad[part], small.grad)
    bounds = qkernels.observe_range(x, bits=8, backend=backend)[2]
    assert_same(bounds, torch.stack(torch.aminmax(x.detach())).float())


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

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    got = (captured, x.grad, scale.grad)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    kept = [t.detach().clone() for t in got]
    want = step()
    for a, b in zip(kept, (want.detach(), x.grad, scale.grad), strict=True):
        assert_same(a, b)
