"""The list forms: the bits of single calls for any list, row and number of threads; bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import assert_same
from fences import fenced
from lists import ARGUMENTS, METHODS, Sample, assert_all_same, codes_of, samples
from rows import Runner, params, run, run_list
from torch import Tensor

import qkernels
from qkernels import _native, _registry, foreach


@pytest.fixture(params=(1, 2, 7), ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ROWS = [
    pytest.param(*row.values, op, id=f"{op}-{row.id}", marks=row.marks)
    for op in ARGUMENTS
    for row in params(op)
    if row.values[0].row.foreach is not None  # the others are loops over single calls
]


@pytest.mark.parametrize(("runner", "op"), ROWS)
def test_a_row_gives_the_bits_of_single_calls(runner: Runner, op: str) -> None:
    calls = [ARGUMENTS[op](s) for s in samples(8 if runner.slow else 99, device=runner.device)]
    for aligned in (True, False):  # which decides on the order of sums on CUDA
        with fenced(aligned):
            want = [run(runner, *args) for args in calls]
        with fenced(aligned):
            got = run_list(runner, calls)
        assert_all_same(got, want, f"{op}, aligned={aligned}")
        with fenced(aligned):  # a write past its part of what a list shares may be mended later on
            got = run_list(runner, calls[::-1])[::-1]
        assert_all_same(got, want, f"{op} backwards, aligned={aligned}")
        with fenced(aligned):
            got = run_list(runner, calls[:1])
        assert_all_same(got, want[:1], f"{op}, list of one, aligned={aligned}")


@pytest.mark.parametrize("op", ARGUMENTS)
def test_thread_counts_give_the_same_bits(op: str, threads: int) -> None:
    calls = [ARGUMENTS[op](s) for s in samples(99, large=True)]
    got = _registry.run_many(op, "native", calls)
    torch.set_num_threads(1)
    assert_all_same(got, [_registry.run(op, "native", *args) for args in calls])


@pytest.mark.parametrize("method", METHODS)
def test_one_large_channel_among_small_ones(method: str, threads: int) -> None:
    """The large one is shared out, in several passes for percentiles; the small ones are not."""
    torch.manual_seed(0)
    size = 20_011 if method == "mse" else 2_000_003
    xs = [torch.randn(7), torch.randn(size), torch.randn(40, 700), torch.randn(600).double()]
    xs += [torch.full((size // 9,), 3.0), torch.randn(size // 5).half(), torch.randn(3, 700)]
    xs[5][17] = float("nan")
    axes = [None, None, 0, None, None, None, 0]
    got = foreach.observe_range(xs, bits=4, method=method, axis=axes)

    def single(i: int, backend: str) -> tuple[Tensor, ...]:
        kw = dict(bits=4, method=method, axis=axes[i], backend=backend)
        return qkernels.observe_range(xs[i], **kw)

    for i in range(len(xs)):
        if method in ("minmax", "percentile"):
            want = single(i, "reference")
            assert_all_same([t + 0 for t in got[i]], [t + 0 for t in want], f"{method} of {i}")
    torch.set_num_threads(1)
    assert_all_same(got, [single(i, "native") for i in range(len(xs))], method)


def public_values(chosen: list[Sample], *names: str) -> dict[str, list[Any]]:
    """Per-tensor lists of the public functions' keyword arguments."""
    values = {
        "bits": [s.bits for s in chosen],
        "axis": [s.case.axis for s in chosen],
        "group_size": [s.case.group_size for s in chosen],
        "symmetric": [s.symmetric for s in chosen],
        "narrow_range": [s.narrow for s in chosen],
        "method": [s.method for s in chosen],
        "percentile": [97.3 if s.method == "percentile" else None for s in chosen],
        "clip": [s.clip for s in chosen],
        "packed": [s.pack > 0 for s in chosen],
        "size": [s.x.shape[-1] if s.pack else None for s in chosen],
        "dtype": [s.x.dtype for s in chosen],
    }
    return {name: values[name] for name in names}


RANGE = ("bits", "axis", "group_size", "symmetric", "narrow_range", "method", "percentile")
PLACE = ("bits", "axis", "group_size", "symmetric")


def check_public(name: str, xs: list[Tensor], given: list[list], values: dict, **kw: Any) -> None:
    """foreach.<name> against a loop over qkernels.<name>."""
    got = getattr(foreach, name)(xs, *given, **values, **kw)
    want = [
        getattr(qkernels, name)(
            x, *(g[i] for g in given), **{k: v[i] for k, v in values.items()}, **kw
        )
        for i, x in enumerate(xs)
    ]
    assert isinstance(got, list) and [type(r) for r in got] == [type(r) for r in want]
    assert_all_same(got, want, name)


@pytest.mark.parametrize("backend", (None, "reference", "triton"))
def test_public_functions_equal_a_loop(backend: str | None) -> None:
    chosen = samples(5 if backend == "triton" else 99)
    if backend == "triton" and not _registry.candidates("fake_quant", "cpu", "triton"):
        pytest.skip("Triton's rows do not run on this CPU")
    chosen = [s for s in chosen if not (backend == "triton" and s.method == "mse")]
    xs = [s.x for s in chosen]
    params = [[s.scale for s in chosen], [s.zp for s in chosen]]
    codes = [codes_of(s) for s in chosen]
    ranges = [torch.stack((-s.scale, 3 * s.scale)) for s in chosen]
    for name, tensors, given, names in (
        ("fake_quant", xs, params, (*RANGE, "clip")),
        ("fake_quant", xs, [], (*RANGE, "clip")),
        ("fake_quant_dynamic", xs, [], (*RANGE, "clip")),
        ("quant_range", xs, [], RANGE),
        ("observe_range", xs, [], RANGE),
        ("qparams", ranges, [], ("bits", "symmetric", "narrow_range")),
        ("quantize", xs, params, (*PLACE, "narrow_range", "packed")),
        ("dequantize", codes, params, (*PLACE, "packed", "size", "dtype")),
    ):
        check_public(name, tensors, given, public_values(chosen, *names), backend=backend)


def test_one_value_serves_all_tensors() -> None:
    xs = (torch.randn(3, 4), torch.randn(5), torch.empty(0))
    scale, zp = torch.tensor(0.3), 2
    want = [qkernels.fake_quant(x, scale, zp, bits=4) for x in xs]
    assert_all_same(foreach.fake_quant(xs, scale, zp, bits=4), want)
    assert_all_same(foreach.fake_quant(xs, 0.3, (2, 2, 2), bits=4), want)
    some = foreach.fake_quant(xs, [0.3, None, None], [2, None, None], bits=4)
    assert_all_same(some, [want[0], *(qkernels.fake_quant(x, bits=4) for x in xs[1:])])


def test_the_number_of_calls_does_not_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    real, single = _registry.run_many, _registry.run
    for length in (1, 9):
        calls: list[str] = []
        spy = lambda op, *a, calls=calls: calls.append(op) or real(op, *a)  # noqa: E731
        monkeypatch.setattr(_registry, "run_many", spy)
        monkeypatch.setattr(_registry, "run", lambda *a, calls=calls: calls.append("single"))
        xs = [torch.randn(5, requires_grad=True) for _ in range(2 * length)]
        scales = [torch.tensor(0.2, requires_grad=True) for _ in range(length)]
        ys = foreach.fake_quant(xs, [*scales, *[0.2] * length], bits=4)
        ys += foreach.fake_quant(xs, bits=4)
        torch.autograd.backward(ys, [torch.ones(5)] * len(ys))
        for name in ("quant_range", "observe_range"):
            getattr(foreach, name)(xs, bits=4)
        foreach.dequantize(foreach.quantize(xs, 0.1, bits=4), 0.1, bits=4)
        forward = ["fake_quant", "fake_quant_dynamic", "quant_range", "quant_range"]
        forward += ["quantize", "dequantize"]
        backwards = ["fake_quant_bwd", "fake_quant_bwd", "lsq_bwd"]
        assert sorted(calls) == sorted(forward + backwards)
    monkeypatch.setattr(_registry, "run", single)


def test_a_row_must_take_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x: Tensor, *args: object) -> str | None:
        return "no threes" if x.numel() == 3 else None

    used = []
    key = ("fake_quant", "cpu", "")
    chain = _registry.candidates(*key)
    changed = [_registry.Candidate(chain[0].row, refuses), *chain[1:]]
    monkeypatch.setitem(_registry._candidates, key, changed)
    for row in (chain[0].row.foreach, chain[1].row.target):
        real = _registry.resolve(row)
        spy = lambda *a, real=real, row=row: used.append(row) or real(*a)  # noqa: E731
        monkeypatch.setitem(_registry._imported, row, spy)
    foreach.fake_quant([torch.ones(2), torch.ones(4)], 0.5, bits=4)
    ys = foreach.fake_quant([torch.ones(2), torch.ones(3)], 0.5, bits=4)
    native, ref = chain[0].row.foreach, chain[1].row.target
    assert used == [native, ref, ref]
    assert [y.tolist() for y in ys] == [[1.0, 1.0], [1.0, 1.0, 1.0]]
    monkeypatch.setitem(_registry._candidates, ("fake_quant", "cpu", "native"), changed[:1])
    with pytest.raises(NotImplementedError, match="fake_quant: no row runs this call on cpu"):
        foreach.fake_quant([torch.ones(2), torch.ones(3)], 0.5, bits=4, backend="native")


X = torch.ones(4, 6)
BAD_LISTS = [
    ([], ValueError, r"must be a list of at least one tensor, got \[\]$"),
    (X, TypeError, r"must be a list of tensors, got Tensor$"),
    (iter([X]), TypeError, r"must be a list of tensors, got list_iterator$"),
    ([X, X.to("meta")], ValueError, r"must be on one device, got cpu and, for tensor 1, meta$"),
]


@pytest.mark.parametrize(("xs", "error", "rule"), BAD_LISTS)
def test_no_list_of_tensors_on_one_device(xs: Any, error: type, rule: str) -> None:
    for op in ("fake_quant", "fake_quant_dynamic", "quant_range", "quantize"):
        scales = {"scales": 0.1} if op == "quantize" else {}
        with pytest.raises(error, match=rf"^foreach.{op}: xs {rule}"):
            getattr(foreach, op)(xs, bits=4, **scales)
    with pytest.raises(error, match=rf"^foreach.dequantize: codes {rule}"):
        foreach.dequantize(xs, 0.1, bits=4)
    with pytest.raises(error, match=rf"^foreach.qparams: ranges {rule}"):
        foreach.qparams(xs, bits=4)


BAD_ENTRIES = [
    (dict(bits=[4, 4]), ValueError, "foreach.fake_quant: bits must be one value or a list of 3"),
    (dict(scales=[0.1]), ValueError, "foreach.fake_quant: scales must be one value or a list"),
    (dict(backend="fast"), ValueError, "foreach.fake_quant: backend must be one of auto"),
    (dict(bits=[4, 4, 17]), ValueError, "tensor 2: fake_quant: bits must be in 1..16, got 17"),
    (dict(axis=[0, 2, 0]), ValueError, "tensor 1: fake_quant: axis must be in -2..1, got 2"),
    (dict(scales=[0.1, "a", 0.1]), TypeError, "tensor 1: fake_quant: scale must be a Tensor, a"),
    (dict(scales=[None, 0.1, 0.0]), ValueError, "tensor 2: fake_quant: scale must be positive"),
    (dict(zero_points=[None, 1, None]), ValueError, "tensor 1: fake_quant: zero_point must be N"),
    (dict(scales=0.1, clip=["code", "value", ""]), ValueError, "tensor 2: fake_quant: clip must"),
    (dict(method=["lsq", "max", "mse"]), ValueError, "tensor 1: fake_quant: method must be one of"),
    (dict(scales=0.1, grad_scale=["a", 1, 1]), TypeError, "tensor 0: fake_quant: grad_scale must"),
]


@pytest.mark.parametrize(("kw", "error", "text"), BAD_ENTRIES)
@pytest.mark.parametrize("backend", (None, "reference"))
def test_a_bad_entry_names_the_tensor(kw: dict, error: type, text: str, backend: str) -> None:
    xs = [torch.ones(4, 6, requires_grad=True) for _ in range(3)]
    text = text if text.startswith("foreach") else f"foreach.fake_quant: {text}"
    with pytest.raises(error, match=f"^{text}"):
        foreach.fake_quant(xs, **{"bits": 4, "backend": backend, **kw})


def test_a_bad_tensor_is_named_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "run_many", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(TypeError, match=r"^foreach.quantize: tensor 1: quantize: x must be float"):
        foreach.quantize([X, X.int()], 0.1, bits=4)
    with pytest.raises(TypeError, match=r"^foreach.quant_range: tensor 2: .* a Tensor, got NoneT"):
        foreach.quant_range([X, X, None], bits=4)
    with pytest.raises(TypeError, match=r"^foreach.dequantize: tensor 0: .* codes must be int8"):
        foreach.dequantize([X], 0.1, bits=4)


NO_CALLS = [(), (0,) * 4, (0,) * 6, 3, (0, 1, "a", 0, 0), (0, 1, 2**70, 0, 0), (0, 0.5, 0, 0, 0)]


@pytest.mark.parametrize("call", NO_CALLS)
def test_the_binding_refuses_what_is_no_call(call: Any) -> None:
    with pytest.raises((TypeError, OverflowError)):
        _native.C.fake_quant_bwd(-1, 1, [call])
    _native.C.fake_quant_bwd(-1, 1, [])
    _native.C.fake_quant_bwd(-1, 1, [(0, 0, 0, 0, 0)])


def network(xs: list[Tensor], scale: Tensor) -> Tensor:
    ys = foreach.fake_quant([xs[0] * 2, xs[1]], [scale, None], bits=[4, 8], axis=[1, None])
    codes = foreach.quantize([xs[1]], 0.1, bits=4)
    return ys[0].sum() + (ys[1] * foreach.dequantize(codes, 0.1, bits=4)[0]).sum()


def test_equal_settings_are_not_the_same_settings() -> None:
    with pytest.raises(TypeError, match=r"^foreach.fake_quant: tensor 1: fake_quant: bits must be"):
        foreach.fake_quant([torch.ones(3)] * 2, bits=[1, True])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rows", (1, 8, 13))
@pytest.mark.parametrize("length", (1, 7, 8, 16, 17, 40))
def test_short_rows(rows: int, length: int, dtype: torch.dtype) -> None:
    """Eight at a time, and the rest one by one; a NaN or infinity stays in its row."""
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[0, length // 2], x[rows // 2, 0], x[rows - 1, -1] = torch.nan, torch.inf, -torch.inf
    for symmetric in (True, False):
        args = (x, -8 if symmetric else 0, 7 if symmetric else 15, 0, None, symmetric)
        rest = ("minmax", 99.0, "code", True)
        native, reference = (
            _registry.run_many("fake_quant_dynamic", backend, [(*args, *rest)] * 2)
            for backend in ("native", "reference")
        )
        assert_all_same(native, reference)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_lists_come_apart_into_single_ops(backend: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    xs = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    scale = torch.tensor([0.2, 0.3, 0.4], requires_grad=True)
    wanted = (*xs, scale)
    want = torch.autograd.grad(network(xs, scale), wanted)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    assert_same(compiled(xs, scale).detach(), network(xs, scale).detach())
    assert_all_same(torch.autograd.grad(compiled(xs, scale), wanted), want)


def test_traced_lists_come_apart_into_single_ops() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    xs = [torch.randn(3), torch.randn(4)]
    graph = make_fx(lambda *xs: foreach.fake_quant(list(xs), 0.1, bits=4))(*xs).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("qkernels.fake_quant.default") == 2
    ys = foreach.fake_quant([x.to("meta") for x in xs], 0.1, bits=4)
    assert [y.shape for y in ys] == [x.shape for x in xs] and all(y.is_meta for y in ys)
    negated = [(torch.randn(3) * 1j).conj().imag, torch.randn(4)]
    assert negated[0].is_neg()
    want = [qkernels.fake_quant(x.resolve_neg(), 0.1, bits=4) for x in negated]
    assert_all_same(foreach.fake_quant(negated, 0.1, bits=4), want)
