"""What quant_range means, against torch's own functions and by hand."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, assert_values

import qkernels

backend_of = pytest.mark.parametrize("backend", ("native", "reference"))
INF, NAN = float("inf"), float("nan")


@backend_of
@pytest.mark.parametrize("percentile", (50.1, 90.0, 99.0, 99.9, 100.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_percentile_is_torch_quantile(backend: str, percentile: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for rows in (
        torch.randn(7, 1001),
        torch.rand(3, 2),
        torch.randint(-3, 4, (4, 999)),
        torch.ones(2, 9),
    ):
        x = rows.to(dtype)
        _, _, (lo, hi) = qkernels.observe_range(
            x, bits=8, axis=0, method="percentile", percentile=percentile, backend=backend
        )
        q = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64)
        want = torch.quantile(x.double(), q, dim=1)
        assert_values(lo, want[0].to(dtype), "lower")
        assert_values(hi, want[1].to(dtype), "upper")


def test_percentile_has_no_size_limit() -> None:
    x = torch.arange(17_000_000, dtype=torch.float32)  # torch.quantile long refused 16 M
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    _, _, (lo, hi) = qkernels.observe_range(x, bits=8, method="percentile", percentile=99.0)
    n = x.numel() - 1
    torch.testing.assert_close(hi, torch.tensor(0.99 * n), rtol=1e-7, atol=0)
    torch.testing.assert_close(lo, torch.tensor(0.01 * n), rtol=1e-6, atol=0)


@backend_of
def test_adversarial_percentiles(backend: str) -> None:
    many = torch.zeros(70_000)
    many[:5] = torch.tensor([1.0, -1.0, 1e-45, -1e-45, 3e38])
    for x in (many, torch.full((70_000,), -2.5), torch.cat((many, many * 0 + 1e-30))):
        _, _, (lo, hi) = qkernels.observe_range(
            x, bits=8, method="percentile", percentile=99.99, backend=backend
        )
        ordered = x.double().sort().values
        rank = 0.9999 * (x.numel() - 1)
        k, w = int(rank), rank - int(rank)
        want = ordered[k] + w * (ordered[k + 1] - ordered[k])
        torch.testing.assert_close(hi.double(), want, rtol=1e-6, atol=1e-45)
        assert lo <= hi


@backend_of
def test_mse_finds_the_best_candidate(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 400)
    x[:, 0] = 30.0  # an outlier that min-max would follow
    scale, zp = qkernels.quant_range(
        x, bits=4, axis=0, symmetric=True, method="mse", backend=backend
    )
    for c in range(3):
        errors = []
        for k in range(80):
            s, z = qkernels.quant_range(x[c] * (1 - 0.01 * k), bits=4, symmetric=True)
            y = qkernels.fake_quant(x[c], s, z, bits=4, symmetric=True)
            errors.append(float((y - x[c]).double().square().sum()))
        y = qkernels.fake_quant(x[c], scale[c], zp[c], bits=4, symmetric=True)
        found = float((y - x[c]).double().square().sum())
        assert found <= min(errors) * (1 + 1e-5)
    assert bool((scale < x.abs().amax(1) / 7.5).all())


@backend_of
def test_lsq_scale_is_the_papers(backend: str) -> None:
    x = torch.randn(6, 500)
    scale, zp = qkernels.quant_range(
        x, bits=4, axis=0, symmetric=True, method="lsq", backend=backend
    )
    assert_values(scale, 2 * x.abs().mean(1) / 7**0.5, "signed")
    assert not zp.any()
    x = x.relu()
    scale, zp = qkernels.quant_range(x, bits=2, method="lsq", backend=backend)
    assert_values(scale, 2 * x.mean() / 3**0.5, "unsigned")
    assert not zp.any()


@backend_of
def test_affine_range_by_hand(backend: str) -> None:
    x = torch.tensor([[-1.0, 0.5, 3.0], [1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
    scale, zp = qkernels.quant_range(x, bits=2, axis=0, backend=backend)
    tiny = torch.finfo(torch.float32).tiny
    assert_same(scale, torch.tensor([4.0, 3.0, 3.0, tiny * 3]) / 3)
    assert zp.tolist() == [1, 0, 3, 0] and zp.dtype is torch.int32
    y = qkernels.fake_quant(x, bits=2, axis=0, backend=backend)
    assert_same(y[3], torch.zeros(3))  # zeros stay zeros


@backend_of
@pytest.mark.parametrize("method", ("minmax", "percentile", "mse", "lsq"))
def test_nan_and_infinity_in_x(backend: str, method: str) -> None:
    x = torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, 3.0], [-INF, 1.0, INF]])
    y, scale, _ = qkernels.fake_quant_dynamic(x, bits=8, axis=0, method=method, backend=backend)
    assert y[0].isnan().all() and not y[1].isnan().any() and y[2].isnan().all()
    assert scale[1] > 0 and not (scale[0] > 0 and scale[0] < INF)
