"""The contenders of benchmarks/bench_step.py, as far as they can be looked at without timing."""

from __future__ import annotations

import pytest
from step.nets import NETS
from step.rows import FULL_ROWS, ROWS, why_not

BUILDS = {r: build for r, build in (ROWS | FULL_ROWS).items() if why_not(r) is None}


@pytest.mark.parametrize("row", [row for row in BUILDS if "compiled" not in row])
@pytest.mark.parametrize("net", NETS)
def test_all_state_is_on_the_device_of_the_net(net: str, row: str) -> None:
    """What is left on the CPU would end the benchmark on a GPU."""
    model = BUILDS[row](NETS[net]().to("meta"))
    state = dict([*model.named_parameters(), *model.named_buffers()])
    assert state and [name for name, t in state.items() if t.device.type != "meta"] == []
