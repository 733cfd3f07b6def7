"""The contenders of benchmarks/bench_step.py, as far as they can be looked at without timing."""

from __future__ import annotations

import pytest
import torch
from qtrain.blocks import split
from step.check import assert_backends_agree
from step.nets import NETS, ResNet18
from step.race import saved_bytes
from step.rows import BWRF, DNQ, FULL_ROWS, PLAIN_QAT, ROWS, make_step, why_not

BUILDS = {r: build for r, build in (ROWS | FULL_ROWS).items() if why_not(r) is None}


@pytest.mark.parametrize("row", [row for row in BUILDS if "compiled" not in row])
@pytest.mark.parametrize("net", NETS)
def test_all_state_is_on_the_device_of_the_net(net: str, row: str) -> None:
    """What is left on the CPU would end the benchmark on a GPU."""
    model = BUILDS[row](NETS[net]().to("meta"))
    state = dict([*model.named_parameters(), *model.named_buffers()])
    assert state and [name for name, t in state.items() if t.device.type != "meta"] == []


@pytest.mark.skipif(why_not(DNQ) is not None, reason=str(why_not(DNQ)))
def test_the_step_of_dnq_runs_under_noise() -> None:
    """Its loss is not the float step's, differs from step to step, and equals the reference's."""
    torch.manual_seed(0)
    model, x = ResNet18(width=4), torch.randn(4, 3, 32, 32)
    labels = torch.arange(4)
    assert_backends_agree(DNQ, model, x, labels)
    plain, noisy = make_step("float", model, x, labels), make_step(DNQ, model, x, labels)
    float_loss, first, again = plain(), noisy(), make_step(DNQ, model, x, labels)()
    assert torch.equal(first, again) and not torch.equal(first, float_loss)
    assert noisy.number == 1
    with noisy.around(1):
        second = noisy.loss()
    with noisy.around(2):
        third = noisy.loss()
    assert not torch.equal(second, third)


@pytest.mark.parametrize("row", BWRF)
def test_the_step_of_bwrf_is_that_of_plain_qat_and_more(row: str) -> None:
    torch.manual_seed(0)
    model, x = ResNet18(width=4), torch.randn(4, 3, 32, 32)
    labels = torch.arange(4)
    assert_backends_agree(row, model, x, labels)
    plain, step = (make_step(name, model, x, labels) for name in (PLAIN_QAT, row))
    more = step.loss().item() - plain.loss().item()
    assert more > 0
    # the frozen partner is state: it is neither trained nor counted as saved for the backward
    (teacher,) = step.beside
    before = [p.clone() for p in teacher.parameters()]
    assert saved_bytes(step) > saved_bytes(plain)
    step()
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))


@pytest.mark.parametrize(("net", "count"), [("resnet18", 8), ("mobilenet", 7)])
def test_blocks_of_the_nets(net: str, count: int) -> None:
    model = NETS[net]()
    names = model.block_names
    assert len(names) == len(split(model, names)) == count
    assert names[-1] == f"blocks.{len(model.blocks) - 1}"
