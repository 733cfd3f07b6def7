"""Ranges and first scales agree on all ranks: two gloo processes on the CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

WORLD = 2
STEPS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.b, self.a(x).relu(), use_reentrant=False)
        return self.c(y)


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(5, 4, generator=generator) * (1 + rank)


def configs() -> dict[str, Any]:
    from qkernels.nn import QConfig, QuantSpec

    weight = QuantSpec(4, axis=0, symmetric=True)
    mean = QuantSpec(4, ema=0.9, method="percentile", percentile=90.0)
    return {
        "minmax": QConfig.minmax(4, 4, first_last_bits=None),
        "percentile": QConfig(weight, mean, first_last_bits=None),
        "lsq": QConfig.lsq(4, 4, first_last_bits=None),
        "lsq+": QConfig.lsq_plus(4, 4, first_last_bits=None),
        "pact": QConfig.pact(4, 4, first_last_bits=None),
        "dorefa": QConfig.dorefa(4, 4, first_last_bits=None),
        "quant-noise": QConfig.quant_noise(4, 4, first_last_bits=None),
        "qdrop": QConfig.qdrop(4, 4, first_last_bits=None),
    }


def first_specs() -> dict[str, Any]:
    from qkernels.nn import QuantSpec

    return {
        "lsq": QuantSpec(4, learned=True, method="lsq"),
        "lsq+": QuantSpec(4, learned=True, learned_zero_point=True, method="mse"),
        "pact": QuantSpec(4, kind="pact", learned=True),
        "dorefa": QuantSpec(4, kind="dorefa_activation"),
    }


def work(rank: int, folder: str) -> None:
    """One process: train each config under DDP, and save what came."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    from qkernels import Noise
    from qkernels.nn import QuantSpec, fake_quantizer, prepare

    store = f"file://{folder}/store"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store, limit, rank=rank, world_size=WORLD)
    found = {}
    for name, config in configs().items():
        torch.manual_seed(rank)  # DDP sends the parameters of rank 0
        model = prepare(Net(), config, noise=Noise(0))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
        history = []
        for step in range(STEPS):
            optimizer.zero_grad()
            ddp(batch(rank, step)).square().mean().backward()
            history.append({key: t.clone() for key, t in model.state_dict().items()})
            optimizer.step()
        found[name] = history
    alone = prepare(Net(), configs()["minmax"])
    alone.a.input_fake_quant.sync_ranks = False
    alone.a(batch(rank, 0))
    found["alone"] = alone.a.input_fake_quant.range
    for kind, layer in (("quant-noise", "weight"), ("qdrop", "input")):
        model = prepare(Net(), configs()[kind], noise=Noise(0))
        quantizer: Any = model.get_submodule(f"a.{layer}_fake_quant")
        found[f"{layer} mask"] = quantizer.mask(torch.zeros(6, 4))
    clipped = fake_quantizer(QuantSpec(4, kind="dorefa_activation"))
    clipped(batch(rank, 0).relu() - rank)  # below 0 on rank 1 alone
    found["clipped"] = clipped.range
    for name, spec in first_specs().items():
        late = fake_quantizer(spec)
        late(batch(rank, 0)[: 5 * rank])  # rank 0 has nothing
        late(batch(rank, 1))
        found[f"late {name}"] = late.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder: Path = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(
    "name", ["minmax", "percentile", "lsq", "lsq+", "pact", "dorefa", "quant-noise", "qdrop"]
)
def test_ranks_agree_to_the_bit(results: list[dict[str, Any]], name: str) -> None:
    first, second = (r[name] for r in results)
    for step in range(STEPS):
        for key, tensor in first[step].items():
            assert torch.equal(tensor, second[step][key]), (step, key)


def test_the_running_range_is_that_of_all_ranks(results: list[dict[str, Any]]) -> None:
    expected = None
    for step in range(STEPS):
        both = torch.cat([batch(rank, step) for rank in range(WORLD)])
        union = torch.stack(both.aminmax())
        expected = union if expected is None else 0.9 * expected + 0.1 * union
        found = results[0]["minmax"][step]["a.input_fake_quant.range"]
        torch.testing.assert_close(found, expected)


def test_other_methods_take_the_mean_of_the_ranks(results: list[dict[str, Any]]) -> None:
    import qkernels

    options: dict[str, Any] = {"bits": 4, "method": "percentile", "percentile": 90.0}
    each = [qkernels.observe_range(batch(rank, 0), **options)[2] for rank in range(WORLD)]
    found = results[0]["percentile"][0]["a.input_fake_quant.range"]
    torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_first_scales_are_the_mean_of_the_ranks(results: list[dict[str, Any]]) -> None:
    import qkernels

    each = [qkernels.quant_range(batch(r, 0), bits=4, method="lsq").scale for r in range(WORLD)]
    found = results[0]["lsq"][0]["a.input_fake_quant.scale"]
    torch.testing.assert_close(found[0], torch.stack(each).mean())
    moved = results[0]["lsq"][-1]["a.input_fake_quant.scale"]
    assert not torch.equal(found, moved)


def test_a_rank_can_keep_to_itself(results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        assert torch.equal(found["alone"], torch.stack(batch(rank, 0).aminmax()))


def test_ranks_share_the_mask_of_a_weight_and_not_that_of_an_input(
    results: list[dict[str, Any]],
) -> None:
    first, second = results
    assert torch.equal(first["weight mask"], second["weight mask"])
    assert not torch.equal(first["input mask"], second["input mask"])


def test_one_rank_below_zero_is_enough_for_dorefa(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["clipped"].tolist() == [-1, 1]


@pytest.mark.parametrize("name", ["lsq", "lsq+", "pact", "dorefa"])
def test_a_rank_without_elements_leaves_the_first_value_to_the_others(
    results: list[dict[str, Any]], name: str
) -> None:
    from qkernels.nn import fake_quantizer

    alone = fake_quantizer(first_specs()[name])
    alone(batch(1, 0))
    for found in results:
        for key, value in alone.state_dict().items():
            assert torch.equal(found[f"late {name}"][key], value), key
