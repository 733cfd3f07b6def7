"""Options, the parameters of the sweep, the machine in the JSON, and one table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import peers, sweep, table, timing

import qkernels

THREADS = 2


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("qkernels benchmarks")
    group.addoption("--full", action="store_true", help="every size, dtype and granularity")
    group.addoption("--short", action="store_true", help="a short form, for a GPU machine")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.addoption("--rows", default="", help="rows to time, e.g. native,triton,reference")
    group.addoption("--budget", type=float, help="seconds per contender of a sweep")
    group.addoption(
        "--compile",
        default="some",
        choices=("none", "some", "all"),
        help="where torch.compile takes part in the sweep (a static shape costs it seconds)",
    )


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "sweep(op, large): runs at every point of the sweep")
    config.addinivalue_line("markers", "lists: runs on a list of weights, by row and dtype")
    config.addinivalue_line("markers", "bar: a bar of the CPU, 2.25 Mi elements or 1 Ki")
    config.option.benchmark_quiet = True  # the table at the end says more
    get = config.getoption
    if get("--full") and get("--short"):
        raise pytest.UsageError("benchmarks: --full and --short must not be given together")
    device = get("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("benchmarks: --device must be cpu, torch finds no CUDA device")
    rows = tuple(filter(None, get("--rows").split(",")))
    unknown = set(rows) - {"native", "triton", "reference"}
    if unknown:
        raise pytest.UsageError(
            f"benchmarks: --rows must name native, triton or reference, got {sorted(unknown)}"
        )
    level = "full" if get("--full") else "short" if get("--short") else "default"
    config.stash[sweep.OPTIONS] = sweep.Options(device, level, rows, get("--compile"))
    timing.set_budget(get("--budget") or {"short": 0.05, "default": 0.1, "full": 0.2}[level])


def pytest_report_header(config: Any) -> list[str]:
    options = config.stash[sweep.OPTIONS]
    head = f"benchmarks: {options.level} sweep on {options.device}, {THREADS} CPU threads"
    return [head, *sweep.left_out(options), *peers.absent()]


def pytest_generate_tests(metafunc: Any) -> None:
    mark = metafunc.definition.get_closest_marker("sweep")
    if mark is not None:
        found = sweep.spots(*mark.args, metafunc.config.stash[sweep.OPTIONS], **mark.kwargs)
        metafunc.parametrize("spot", found, ids=[s.id for s in found])
    if metafunc.definition.get_closest_marker("lists"):
        options = metafunc.config.stash[sweep.OPTIONS]
        dtypes = sweep.list_dtypes(options)
        metafunc.parametrize("row", sweep.rows("fake_quant", options))
        metafunc.parametrize("dtype", dtypes, ids=[str(d).removeprefix("torch.") for d in dtypes])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.stash[sweep.OPTIONS].device != "cpu":
        skip = pytest.mark.skip(reason="a bar of the CPU; --device cpu runs it")
        for item in items:
            if item.get_closest_marker("bar"):
                item.add_marker(skip)


@pytest.fixture
def options(request: Any) -> sweep.Options:
    """The command line."""
    return request.config.stash[sweep.OPTIONS]


@pytest.fixture(autouse=True)
def two_threads(request: Any) -> Iterator[None]:
    """The figures of README are for two threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    spot = getattr(request.node, "callspec", None) and request.node.callspec.params.get("spot")
    if spot is not None:  # pytest keeps its parameters: the tensors must not stay with them
        spot.__dict__.pop("x", None)
        spot.__dict__.pop("grad", None)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    info = qkernels.build_info()
    machine_info["qkernels"] = {k: v for k, v in info.items() if k != "rows"}


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    lines = table.lines(getattr(session, "benchmarks", []))
    if lines:
        terminalreporter.section("medians in turns: above 1x ours is faster; speed against a copy")
        for line in lines:
            terminalreporter.line(line)
