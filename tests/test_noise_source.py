"""Noise: streams by name, steps, resuming, and the step on a device."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_nn_graph import NoReadBack
from torch import Tensor

import qkernels
from qkernels import Noise

LARGEST = 2**63 - 1
NAMES = ["", "a", "b", "a.weight", "a.weight|", "layer1.0.conv1.weight", "größe"]


def draw(noise: Noise, name: str = "w", **options: Any) -> Tensor:
    return qkernels.drop_in_noise(torch.zeros(32), (0.0, 1.0), p=1.0, **noise.at(name, **options))


def test_streams_are_those_of_the_sha256_command() -> None:
    # printf '0|all|noise|a.weight' | sha256sum
    assert Noise(0).at("a.weight")["seed"] == 0xF94941953060FBD8 % 2**63
    # printf '5|3|drop_in|conv1.input' | sha256sum
    found = Noise(5).at("conv1.input", kind="drop_in", per_rank=True, rank=3)
    assert found == {"seed": 0x1744144160F27064 % 2**63, "step": 0}


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_the_hash_of_what_names_it(name: str) -> None:
    for seed in (0, 7, LARGEST):
        for rank in (None, 0, 1):
            text = f"{seed}|{'all' if rank is None else rank}|noise|{name}"
            expected = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 2**63
            found = Noise(seed).at(name, per_rank=rank is not None, rank=rank)
            assert found["seed"] == expected
            assert 0 <= found["seed"] <= LARGEST


def test_every_name_kind_rank_and_seed_has_its_own_stream() -> None:
    seen = [
        Noise(seed).at(name, kind=kind, per_rank=rank is not None, rank=rank)["seed"]
        for seed in (0, 1, 10)
        for name in NAMES
        for kind in ("", "noise", "drop_in")
        for rank in (None, 0, 1, 10)
    ]
    assert len(set(seen)) == len(seen)


def test_order_does_not_matter() -> None:
    one, other = Noise(3), Noise(3)
    forth = {name: one.at(name) for name in NAMES}
    back = {name: other.at(name) for name in reversed(NAMES)}
    assert forth == back


def test_ranks_share_weights_and_not_activations() -> None:
    noise = Noise(0)
    assert noise.at("w") == noise.at("w", per_rank=False)
    ranks = [draw(noise, per_rank=True, rank=rank) for rank in range(3)]
    assert not torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[1], ranks[2])
    # without torch.distributed this process is rank 0
    assert torch.equal(draw(noise, per_rank=True), ranks[0])
    assert not torch.equal(draw(noise), ranks[0])


def test_advance_moves_the_step_only() -> None:
    noise = Noise(seed=4, step=9)
    first = noise.at("w")
    noise.advance()
    assert noise.at("w") == {"seed": first["seed"], "step": 10}
    assert noise.step == 10 and noise.seed == 4
    noise.step = 3
    assert noise.at("w")["step"] == 3
    assert repr(noise) == "Noise(seed=4, step=3)"


@pytest.mark.parametrize("device", [None, "cpu"])
def test_after_the_last_step_comes_the_first(device: str | None) -> None:
    noise = Noise(0, step=LARGEST, device=device)
    draw(noise)
    noise.advance()
    assert int(noise.step) == 0
    assert torch.equal(draw(noise), draw(Noise(0)))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_resumed_run_has_the_same_noise(device: str | None) -> None:
    noise = Noise(11, device=device)
    for _ in range(5):
        noise.advance()
    state = pickle.loads(pickle.dumps(noise.state_dict()))
    assert state == {"seed": 11, "step": 5}
    resumed = Noise(0, device=device)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(draw(resumed), draw(noise))
        noise.advance()
        resumed.advance()


@pytest.mark.parametrize("device", [None, "cpu"])
def test_copies_go_their_own_way(device: str | None) -> None:
    noise = Noise(2, step=3, device=device)
    for other in (copy.deepcopy(noise), pickle.loads(pickle.dumps(noise))):
        assert torch.equal(draw(other), draw(noise))
        other.advance()
        assert int(other.step) == 4 and int(noise.step) == 3


def test_a_step_on_a_device_stays_the_same_tensor() -> None:
    noise, plain = Noise(1, device="cpu"), Noise(1)
    step = noise.at("w")["step"]
    assert step.dtype is torch.int64 and step.dim() == 0
    with NoReadBack():
        for _ in range(4):
            noise.advance()
            noise.at("w", device="cpu")
    assert noise.at("w")["step"] is step and int(step) == 4
    noise.load_state_dict({"seed": 1, "step": 7})
    noise.step += 1
    assert noise.at("w")["step"] is step and int(step) == 8
    plain.step = 8
    assert torch.equal(draw(noise), draw(plain))
    assert repr(noise) == "Noise(seed=1, step=8, device='cpu')"


def test_turns_tell_steps_apart() -> None:
    noise = Noise(0, device="cpu")
    seen = [noise.turn]
    for change in (noise.advance, lambda: noise.load_state_dict({"seed": 0, "step": 0})):
        change()
        seen.append(noise.turn)
    assert len(set(seen)) == 3 and noise.turn == seen[-1]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_compiled_once_for_all_steps(device: str | None) -> None:
    noise = Noise(6, device=device)

    def step(w: Tensor) -> Tensor:
        at = noise.at("w", per_rank=True)
        return qkernels.differential_noise(w, (0.5, 2.0), **at) * 2

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    w = torch.randn(4, 8)
    for _ in range(3):
        assert torch.equal(compiled(w), step(w))
        noise.advance()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_captured_graph_advances() -> None:
    noise, plain = Noise(6, device="cuda"), Noise(6)
    w = torch.zeros(64, device="cuda")
    qkernels.drop_in_noise(w, (0.0, 1.0), p=0.5, **noise.at("w"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qkernels.drop_in_noise(w, (0.0, 1.0), p=0.5, **noise.at("w"))
        noise.advance()
    for step in range(3):
        graph.replay()
        expected = qkernels.drop_in_noise(w, (0.0, 1.0), p=0.5, **plain.at("w"))
        assert torch.equal(y, expected), step
        plain.advance()
    assert noise.state_dict() == {"seed": 6, "step": 3}


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Noise(0.5), TypeError, r"^Noise: seed must be an int, got 0\.5$"),  # type: ignore[arg-type]
    (lambda: Noise(True), TypeError, r"^Noise: seed must be an int, got True$"),
    (lambda: Noise(-1), ValueError, r"^Noise: seed must be in 0\.\.9223372036854775807, got -1$"),
    (lambda: Noise(2**63), ValueError, r"^Noise: seed must be in 0\.\."),
    (lambda: Noise(0, step=-1), ValueError, r"^Noise: step must be in 0\.\."),
    (lambda: Noise(0, step="1"), TypeError, r"^Noise: step must be an int, got '1'$"),  # type: ignore[arg-type]
    (lambda: setattr(Noise(0), "step", 2**63), ValueError, r"^Noise: step must be in 0\.\."),
    (lambda: Noise(0).at(3), TypeError, r"^Noise\.at: name must be a str, got 3$"),  # type: ignore[arg-type]
    (lambda: Noise(0).at("a", kind=None), TypeError, r"^Noise\.at: kind must be a str, got None$"),  # type: ignore[arg-type]
    (lambda: Noise(0).at("a", kind="x|y"), ValueError, r"^Noise\.at: kind must be without '\|'"),
    (lambda: Noise(0).at("a", rank=1), ValueError, r"^Noise\.at: rank must be None unless per_r"),
    (lambda: Noise(0).at("a", per_rank=True, rank=-1), ValueError, r"rank must be at least 0"),
    (lambda: Noise(0).at("a", per_rank=True, rank=1.0), TypeError, r"rank must be an int or None"),  # type: ignore[arg-type]
    (lambda: Noise(0).load_state_dict({"seed": 1}), ValueError, r"must have the keys seed and st"),
    (lambda: Noise(0).load_state_dict(None), ValueError, r"must have the keys seed and step"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_bad_state_changes_nothing() -> None:
    noise = Noise(3, step=4)
    with pytest.raises(ValueError, match="step must be in"):
        noise.load_state_dict({"seed": 1, "step": -1})
    assert noise.state_dict() == {"seed": 3, "step": 4}
