"""Nothing on the training path is read back, so that a whole step can be a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qkernels import Noise
from qkernels.nn import QConfig, prepare

CONFIGS = {
    "minmax": QConfig.minmax(4, 4),
    "lsq": QConfig.lsq(4, 4),
    "lsq+": QConfig.lsq_plus(4, 4),
    "pact": QConfig.pact(4, 4),
    "dorefa": QConfig.dorefa(4, 4, first_last_bits=None),
    "quant-noise": QConfig.quant_noise(4, 4),
    "qdrop": QConfig.qdrop(4, 4),
}
# QDrop draws anew in each call of a step, and the steps below are all one to its Noise
CAPTURED = {name: config for name, config in CONFIGS.items() if name != "qdrop"}

# the ops that wait for the device to give Python a number, a bool or a shape
READ_BACK = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


class NoReadBack(TorchDispatchMode):
    """Fails on an op that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READ_BACK:
            raise AssertionError(f"{name} reads back from the device")
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        # the RNG state could not be kept during a capture
        return self.b(checkpoint(self.a, x, use_reentrant=False, preserve_rng_state=False))


def prepared(config: QConfig) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Net(), config, noise=Noise(0))


def test_the_watch_sees_a_read() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense reads back"), NoReadBack():
        torch.ones(()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_reads_nothing_back(config: QConfig) -> None:
    model = prepared(config)
    for seed in range(3):  # the first step sets first values
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        with NoReadBack():
            model(x).square().mean().backward()
    model.eval()
    with torch.no_grad(), NoReadBack():
        model(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("config", CAPTURED.values(), ids=CAPTURED)
def test_a_captured_step_is_the_eager_one(config: QConfig) -> None:
    eager = prepared(config).cuda()
    xs = [torch.randn(5, 6, device="cuda") * (i + 1) for i in range(6)]
    static = xs[0].clone()

    def step(model: nn.Module, x: Tensor) -> None:
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(eager, static)
    torch.cuda.current_stream().wait_stream(side)
    captured = copy.deepcopy(eager)
    step(captured, static)
    step(eager, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, static)
    for x in xs:
        static.copy_(x)
        graph.replay()
        step(eager, x)
        for (name, a), b in zip(
            captured.state_dict().items(), eager.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
