"""Statistics and noise with several ranks: two gloo processes on the CPU."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_nn_error_ema import assert_average, assert_same, batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qkernels
from qkernels import ErrorStats
from qkernels.nn import ErrorEMA, QuantSpec, attach_noise

WORLD = 2
STEPS = 3


def rank_batch(rank: int, step: int) -> Tensor:
    """Ranks differ in size too; in step 2, rank 1 has nothing."""
    count = 0 if (rank, step) == (1, 2) else 4 + 3 * rank
    return batch(10 * rank + step, max(count, 1), 6)[:count]


def joint_scale() -> Tensor:
    return torch.linspace(0.5, 3.0, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def train(rank: int, compiled: bool) -> list[dict[str, Any]]:
    """A few steps of a model with noise under DDP, every rank on the same batch."""
    torch.manual_seed(rank)  # DDP sends the parameters of rank 0
    model = Net()
    handle = attach_noise(model, noise=qkernels.Noise(7), weights=3, activations=3)
    seen: dict[str, Tensor] = {}
    ddp: Any = DistributedDataParallel(model)
    if not compiled:
        model.a.register_forward_hook(lambda m, args, y: seen.update(input=args[0].detach()))
    else:
        ddp = torch.compile(ddp, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    history = []
    for step in range(STEPS):
        x = batch(rank + step, 5, 6) if compiled else batch(step, 5, 6)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        weight = model.a.weight.detach().clone()
        optimizer.step()
        handle.noise.advance()
        history.append({**copy.deepcopy(model.state_dict()), "noisy": weight, **seen})
    return history


def work(rank: int, folder: str) -> None:
    """One process: averages with one scale for all, and some that keep to themselves."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", limit, rank=rank, world_size=WORLD)
    found: dict[str, Any] = {"number": [], "tensor": []}
    for kind, history in found.items():
        ema = ErrorEMA(QuantSpec(3, axis=1, symmetric=True))
        for step in range(4):
            at = torch.tensor(step) if kind == "tensor" else step
            ema(rank_batch(rank, step), joint_scale(), step=at)
            ema(rank_batch(rank, step), joint_scale(), step=at)
            history.append(copy.deepcopy(ema.state_dict()))
    alone = ErrorEMA(QuantSpec(3, axis=1, symmetric=True))
    alone.sync_ranks = False
    found["alone"] = alone(rank_batch(rank, 0), joint_scale())
    own = ErrorEMA(QuantSpec(3))
    found["own range"] = own(rank_batch(rank, 0))
    recorded = ErrorEMA(QuantSpec(3, axis=1, symmetric=True))
    x = rank_batch(rank, 0)
    own_stats = qkernels.error_stats(x, joint_scale(), bits=3, axis=1, symmetric=True)
    recorded.record(own_stats, x.shape[0])
    found["recorded"] = recorded.state_dict()
    found["noise"] = train(rank, compiled=False)
    found["compiled"] = train(rank, compiled=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder: Path = tmp_path_factory.mktemp("ema")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_all_ranks_have_the_average_of_the_joint_batch(ranks: list[Any], kind: str) -> None:
    seen = []
    for step in range(4):
        joint = torch.cat([rank_batch(rank, step) for rank in range(WORLD)])
        seen.append(qkernels.error_stats(joint, joint_scale(), bits=3, axis=1, symmetric=True))
        first, second = (r[kind][step] for r in ranks)
        for key in first:
            assert torch.equal(first[key], second[key]), (step, key)
        # one rounding to fp32 of each rank's statistics and of theirs together
        assert_average(ErrorStats(*first["ema"][:4]), seen, 0.9, rtol=3e-6)
        assert int(first["updates"]) == step + 1


def test_recorded_statistics_are_joined(ranks: list[Any]) -> None:
    for found in ranks:
        first = found["number"][0]
        assert_same(list(found["recorded"]["ema"]), list(first["ema"]))


def test_a_rank_can_keep_to_itself(ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        x = rank_batch(rank, 0)
        expected = qkernels.error_stats(x, joint_scale(), bits=3, axis=1, symmetric=True)
        torch.testing.assert_close(found["alone"], expected)


def test_ranks_agree_though_each_has_its_own_range(ranks: list[Any]) -> None:
    first, second = (found["own range"] for found in ranks)
    assert_same(list(first), list(second))
    parts = [qkernels.error_stats(rank_batch(rank, 0), bits=3) for rank in range(WORLD)]
    sizes = [rank_batch(rank, 0).numel() for rank in range(WORLD)]
    mean = sum(float(p.mean) * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(float(first.mean), mean, rtol=1e-5, atol=1e-8)


def test_ranks_train_one_model_with_noise_of_their_own(ranks: list[Any]) -> None:
    """All ranks had the same batch: only the noise of the inputs tells them apart."""
    first, second = (found["noise"] for found in ranks)
    for step in range(STEPS):
        for key in first[step]:
            same = torch.equal(first[step][key], second[step][key])
            assert same is (key != "input"), (step, key)
        x = batch(step, 5, 6)
        stats = first[step]["a.input_noise.errors.ema"]
        for rank, found in enumerate((first, second)):
            noise = qkernels.Noise(7, step=step)
            at = noise.at("a.input", kind="drop_in", per_rank=True, rank=rank)
            mean, std = stats[0, 0], stats[1, 0].sqrt()
            expected = qkernels.drop_in_noise(x, (mean, std), p=0.5, **at)
            assert torch.equal(found[step]["input"], expected)
        assert not torch.equal(first[step]["noisy"], first[step]["a.weight"])


def test_compiled_ranks_agree(ranks: list[Any]) -> None:
    first, second = (found["compiled"] for found in ranks)
    for step in range(STEPS):
        for key in first[step]:
            assert torch.equal(first[step][key], second[step][key]), (step, key)
    assert int(first[-1]["a.input_noise.errors.updates"]) == STEPS
    joint = torch.cat([batch(rank, 5, 6) for rank in range(WORLD)])
    parts = [qkernels.error_stats(part, bits=3) for part in joint.chunk(WORLD)]
    mean = torch.stack([part.mean for part in parts]).mean()
    torch.testing.assert_close(first[0]["a.input_noise.errors.ema"][0, 0], mean)
