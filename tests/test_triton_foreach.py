"""The list forms of the Triton rows: the bits of single calls, in few launches, graphs included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import channels_last
from compare import assert_same
from fences import fenced
from lists import ARGUMENTS, Sample, assert_all_same, flat, samples
from rows import HAS_GPU, NO_GPU, Runner, params, run, run_list
from torch import Tensor

from qkernels import _registry, foreach
from qkernels.backends.triton import launch
from qkernels.ops._inplace import is_writable

table = pytest.importorskip("qkernels.backends.triton.table", reason="triton is not installed")

DEVICE = "cuda" if HAS_GPU else "cpu"
OFFSETS = (0, 1, 4, 2**40, 7)
GATES = (0.4, 1.0, 0.0)


def counter_of(s: Sample) -> tuple[Any, ...]:
    """(seed, step, seed_at, step_at): numbers, or numbers in memory."""
    if s.i % 2:
        return (s.i + 2**40, 3, None, None)
    at = [torch.tensor(n, dtype=torch.int64, device=s.x.device) for n in (2**63 - 1 - s.i, 5)]
    return (0, 0, *at)


def differential(s: Sample) -> tuple[Any, ...]:
    previous = (-s.scale, s.scale * 0.5) if s.i % 3 else (None, None)
    rest = (0.25 * s.i, OFFSETS[s.i % 5], *s.place)
    return s.x, s.scale * 0.1, s.scale, *previous, *counter_of(s), *rest


def statistics(s: Sample) -> tuple[Any, ...]:
    call = (s.x, s.scale, s.zp, *s.range, *s.place, s.clip)
    if s.i % 2 == 0:
        return call
    ema = torch.linspace(0.1, 0.9, 5 * s.scale.numel()).to(s.scale).reshape(5, -1)
    return *call, ema, 0.75


# op -> a fresh call of a row for a sample
CALLS: dict[str, Callable[[Sample], tuple[Any, ...]]] = {
    **{op: ARGUMENTS[op] for op in ("fake_quant", "fake_quant_bwd", "lsq_bwd")},
    "error_stats": statistics,
    "differential_noise": differential,
    "drop_in_noise": lambda s: (
        *(s.x, s.scale * 0.1, s.scale, GATES[s.i % 3], *counter_of(s), 0.5),
        *(OFFSETS[s.i % 5], *s.place),
    ),
    "uniform_noise": lambda s: (
        *(s.x, s.scale, GATES[s.i % 3], *counter_of(s), OFFSETS[s.i % 5], *s.place),
    ),
}
IN_PLACE = ("fake_quant", "differential_noise", "drop_in_noise", "uniform_noise")


def triton_rows(*ops: str) -> list[Any]:
    return [
        pytest.param(*row.values, op, id=f"{op}-{row.id}", marks=row.marks)
        for op in ops
        for row in params(op)
        if row.values[0].row.backend == "triton"
    ]


@pytest.mark.parametrize("aligned", (True, False), ids=("aligned", "unaligned"))
@pytest.mark.parametrize(("runner", "op"), triton_rows(*CALLS))
def test_a_list_gives_the_bits_of_single_calls(runner: Runner, op: str, aligned: bool) -> None:
    # the interpreter knows nothing of alignment
    chosen = samples(99 if aligned or not runner.slow else 6, device=runner.device)
    if not runner.slow:
        chosen += samples(99, large=True, device=runner.device)[-5:]
    singles, listed = ([CALLS[op](s) for s in chosen] for _ in range(2))
    with fenced(aligned):
        want = [run(runner, *call) for call in singles]
    with fenced(aligned):
        got = run_list(runner, listed)
    assert_all_same(got, want, op)
    for single, call in zip(singles, listed, strict=True):  # averages are written to
        assert_all_same(*([t for t in c if isinstance(t, Tensor)] for c in (call, single)))


@pytest.mark.parametrize(("runner", "op"), triton_rows(*IN_PLACE))
def test_in_place(runner: Runner, op: str) -> None:
    chosen = samples(12 if runner.slow else 99, device=runner.device)
    # views that overlap, and those of which fake_quant takes a copy, are not written to
    chosen = [s for s in chosen if is_writable(s.x, s.case.group_size)]
    assert len(chosen) > 7
    want = [run(runner, *CALLS[op](s)) for s in chosen]
    got = run_list(runner, [(*CALLS[op](s), True) for s in chosen])
    assert_all_same(got, want, op)
    for s, result in zip(chosen, got, strict=True):
        assert flat(result)[0] is s.x


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched."""
    names: list[str] = []
    real = launch.run

    def spy(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        if programs:
            names.append(kernel.__name__)
        real(kernel, programs, *args, **constants)

    monkeypatch.setattr(launch, "run", spy)
    return names


def weights() -> list[Tensor]:
    """Of a small network: four shapes of tile for sums, and two dtypes."""
    shapes = ((8, 3, 4, 4), (12, 8, 2, 2), (10, 48), (16, 5, 2, 4)) * 3
    xs = [torch.randn(shape, device=DEVICE) for shape in shapes]
    return [*xs, *(x.bfloat16() for x in xs[:4])]


def scales_of(xs: list[Tensor]) -> list[Tensor]:
    return [torch.full((x.shape[0],), 0.3, device=DEVICE) for x in xs]


def test_a_network_takes_one_launch_for_each_kind(launched: list[str]) -> None:
    xs = weights()
    scales = scales_of(xs)
    kw: dict[str, Any] = {"axis": 0, "backend": "triton"}
    leaves = [x.requires_grad_() for x in xs]
    ys = foreach.fake_quant(leaves, scales, bits=4, symmetric=True, **kw)
    assert launched == ["fake_quant_list_kernel"] * 2
    launched.clear()
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert launched == ["fake_quant_bwd_list_kernel"] * 2
    launched.clear()
    xs = [x.detach() for x in xs]
    foreach.error_stats(xs, scales, bits=4, symmetric=True, **kw)
    assert launched == ["error_stats_list_kernel"] * 8
    launched.clear()
    foreach.uniform_noise(xs, scales, seed=1, step=2, **kw)
    assert launched == ["noise_list_kernel"] * 2


def test_sums_in_parts_take_one_more_launch(launched: list[str]) -> None:
    xs = [torch.randn(3, 3000, device=DEVICE, requires_grad=True) for _ in range(3)]
    scales = [s.requires_grad_() for s in scales_of(xs)]
    ys = foreach.fake_quant(xs, scales, bits=4, axis=0, symmetric=True, backend="triton")
    launched.clear()
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert launched == ["lsq_bwd_list_kernel", "lsq_finish_list_kernel"]
    launched.clear()
    foreach.error_stats([x.detach() for x in xs], 0.3, bits=4, backend="triton")
    assert launched == ["error_stats_list_kernel", "error_stats_finish_list_kernel"]


def fake_quant_calls(xs: list[Tensor]) -> list[tuple[Any, ...]]:
    return [
        (x, torch.tensor(0.3, device=DEVICE), None, -8, 7, None, None, "code", True) for x in xs
    ]


def noise_calls(xs: list[Tensor], p: float = 1.0) -> list[tuple[Any, ...]]:
    scale = torch.tensor(0.3, device=DEVICE)
    return [(x, scale, p, 1, 2, None, None, 0, None, None) for x in xs]


def test_what_goes_one_by_one(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    many = _registry.run_many
    xs = [torch.randn(40, device=DEVICE) for _ in range(3)]
    many("fake_quant", "triton", fake_quant_calls(xs[:1]))
    assert launched == ["fake_quant_kernel"], "a list of one"
    launched.clear()
    image = channels_last(torch.randn(2, 3, 4, 5, device=DEVICE))
    got = many("uniform_noise", "triton", noise_calls([*xs, image]))
    assert sorted(launched) == ["noise_kernel", "noise_list_kernel"], "a walk of its own"
    assert_same(got[3], _registry.run("uniform_noise", "triton", *noise_calls([image])[0]))
    launched.clear()
    assert_all_same(many("uniform_noise", "triton", noise_calls(xs, p=0.0)), xs)
    assert launched == [], "nothing is added"
    monkeypatch.setattr(launch, "WIDE_FROM", 41)
    xs.append(torch.randn(41, device=DEVICE))
    want = [_registry.run("fake_quant", "triton", *c) for c in fake_quant_calls(xs)]
    launched.clear()
    assert_all_same(many("fake_quant", "triton", fake_quant_calls(xs)), want)
    assert sorted(launched) == ["fake_quant_kernel", "fake_quant_list_kernel"], "64-bit offsets"


def test_a_shared_average_follows_one_tensor_after_the_other(launched: list[str]) -> None:
    xs = [torch.randn(50, device=DEVICE) for _ in range(2)]
    results = []
    for listed in (True, False):
        ema = torch.zeros(5, 1, device=DEVICE)
        rest = (torch.tensor(0.3, device=DEVICE), None, -8, 7, None, None, "code", ema, 0.5)
        calls = [(x, *rest) for x in xs]
        if listed:
            _registry.run_many("error_stats", "triton", calls)
        else:
            for call in calls:
                _registry.run("error_stats", "triton", *call)
        results.append(ema)
    assert_same(*results)
    assert set(launched) == {"error_stats_kernel"}


def test_a_captured_list_needs_memory_of_its_own(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph reads a table anew at each replay."""
    fresh = table.Reserve()
    monkeypatch.setattr(table, "reserve", fresh)
    monkeypatch.setattr(table, "capturing", lambda device: True)
    monkeypatch.setattr(table, "RESERVED", 100)
    xs = [torch.randn(40, device=DEVICE) for _ in range(4)]
    want = [_registry.run("fake_quant", "triton", *c) for c in fake_quant_calls(xs)]
    launched.clear()
    for memory, kernels in (
        (None, ["fake_quant_kernel"] * 4),  # no list ran before the capture
        (torch.zeros(100, dtype=torch.int64), ["fake_quant_list_kernel"]),
        (None, ["fake_quant_list_kernel"]),
        (None, ["fake_quant_kernel"] * 4),  # 88 of 100 words are used up
    ):
        if memory is not None:
            fresh._memory = memory
        assert_all_same(_registry.run_many("fake_quant", "triton", fake_quant_calls(xs)), want)
        assert launched == kernels
        launched.clear()
    assert fresh._memory is not None and not bool((fresh._memory[:88] == 0).all())
    a, b = fresh.take([1, 2, 3]), fresh.take([4, 5])
    assert (a.tolist(), b.tolist()) == ([1, 2, 3], [4, 5])
    assert not fresh.holds(8) and fresh.holds(7)
    with pytest.raises(RuntimeError, match="no pinned memory is left"):
        fresh.take([0] * 8)


def test_a_refused_list_leaves_all_as_it_was() -> None:
    xs = weights()[:3]
    before = [x.clone() for x in xs]
    scales = scales_of(xs)
    scales[2][1] = -1.0
    if DEVICE == "cuda":
        pytest.skip("values on a GPU are not looked at")
    with pytest.raises(ValueError, match="tensor 2: uniform_noise: scale must be finite and at"):
        foreach.uniform_noise(xs, scales, seed=1, step=2, axis=0, inplace=True, backend="triton")
    assert_all_same(xs, before)
    with pytest.raises(ValueError, match="tensor 2: fake_quant: scale must be positive"):
        foreach.fake_quant(xs, scales, bits=4, axis=0, backend="triton")


@pytest.mark.skipif(not HAS_GPU, reason=NO_GPU)
def test_a_captured_list_can_be_replayed() -> None:
    xs = [torch.randn(40 * (i + 1), device="cuda") for i in range(5)]
    scales = [torch.tensor(0.3, device="cuda") for _ in xs]
    kw: dict[str, Any] = {"bits": 4, "symmetric": True, "backend": "triton"}

    def step() -> list[Tensor]:
        ys = foreach.fake_quant(xs, scales, **kw)
        return [*ys, *(s.var for s in foreach.error_stats(xs, scales, **kw))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in range(3):
        torch.manual_seed(seed)
        for x in xs:
            x.copy_(torch.randn_like(x))
        foreach.fake_quant(xs[::-1], scales, **kw)  # tables of other calls do no harm
        graph.replay()
        assert_all_same(got, step(), f"replay {seed}")
