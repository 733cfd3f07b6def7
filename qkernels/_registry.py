"""Picks the row of the table that runs a call, and tells why."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from qkernels._table import BACKENDS, ROWS, STEMS, Row
from qkernels.ops._check import each_call

log = logging.getLogger("qkernels")


class Candidate(NamedTuple):
    """A row that can run on this machine; its function is imported when it is first chosen."""

    row: Row
    refuses: Callable[..., str | None] | None


_imported: dict[str, Callable[..., Any]] = {}
_candidates: dict[tuple[str, str, str], list[Candidate]] = {}
_always: dict[tuple[str, str, str], Callable[..., Any]] = {}
_logged: set[tuple[str, str, str]] = set()


def check_backend(name: str | None, where: str) -> str:
    """The backend's name, "" for the automatic choice."""
    if name is None or name in ("", "auto"):
        return ""
    if name not in BACKENDS:
        raise ValueError(f"{where} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = check_backend(os.environ.get("QKERNELS_BACKEND"), "QKERNELS_BACKEND")


def resolve(target: str) -> Callable[..., Any]:
    """Import "module:function", once."""
    if target not in _imported:
        module, _, name = target.partition(":")
        _imported[target] = getattr(importlib.import_module(module), name)
    return _imported[target]


def rows(op: str, device: str, backend: str = "") -> list[Row]:
    """Rows of an op on a device type in the order in which they are tried."""
    found = [r for r in ROWS if r.op == op and r.device == device]
    return [r for r in found if r.backend == backend] if backend else found


def unavailable(row: Row) -> str | None:
    """Why this row can never run on this machine, or None."""
    return resolve(row.available)(row.device) if row.available else None


def candidates(op: str, device: str, backend: str = "") -> list[Candidate]:
    """The rows that can run here (cached)."""
    key = (op, device, backend)
    if key not in _candidates:
        found = []
        for row in rows(op, device, backend):
            why = unavailable(row)
            if why is None:
                found.append(Candidate(row, resolve(row.refuses) if row.refuses else None))
            elif not backend:
                log_once(row, why)
        _candidates[key] = found
        if found and found[0].refuses is None:
            _always[key] = resolve(found[0].row.target)
    return _candidates[key]


def log_once(row: Row, why: str) -> None:
    """Say once per row and reason that the automatic choice passed it over."""
    key = (row.op, row.backend, why)
    if key not in _logged:
        _logged.add(key)
        log.info("%s: the %s row does not run: %s", row.op, row.backend, why)


def run(op: str, backend: str, *args: Any) -> Any:
    """Run an op with the first row that takes the call; the tensor args[0] names the device."""
    return run_call(op, backend, args)


def run_call(op: str, backend: str, args: tuple[Any, ...]) -> Any:
    """run, of arguments that are a tuple already."""
    x = args[0]
    device = "cpu" if x.is_cpu else x.device.type  # the latter takes longer
    key = (op, device, backend or _backend)
    function = _always.get(key)
    if function is not None:
        return function(*args)
    for candidate in candidates(*key):
        why = candidate.refuses(*args) if candidate.refuses else None
        if why is None:
            return resolve(candidate.row.target)(*args)
        if not key[2]:
            log_once(candidate.row, why)
    raise refusal(op, device, key[2], args)


def run_many(op: str, backend: str, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run an op on a list of calls, all on the device of the first, with the first row that takes
    every one of them: in one call of the row if it has a list form, else one by one.

    Raises:
        ListError: the TypeError or ValueError of one of the calls.
    """
    x = calls[0][0]
    device = "cpu" if x.is_cpu else x.device.type
    key = (op, device, backend or _backend)
    refused = calls[0]
    for candidate in candidates(*key):
        found = _first_refused(candidate, calls)
        if found is None:
            row = candidate.row
            if row.foreach:
                return resolve(row.foreach)(calls)
            return each_call(resolve(row.target), calls)
        refused, why = found
        if not key[2]:
            log_once(candidate.row, why)
    raise refusal(op, device, key[2], refused)


def takes_lists(op: str, backend: str, x: Tensor) -> bool:
    """Whether the first row for x's device runs a list in one call."""
    found = candidates(op, x.device.type, backend or _backend)
    return bool(found) and found[0].row.foreach is not None


def _first_refused(
    candidate: Candidate, calls: list[tuple[Any, ...]]
) -> tuple[tuple[Any, ...], str] | None:
    """The first call that a row does not take, and why."""
    if candidate.refuses is None:
        return None
    found = ((args, candidate.refuses(*args)) for args in calls)
    return next(((args, why) for args, why in found if why is not None), None)


def refusal(op: str, device: str, backend: str, args: tuple[Any, ...]) -> Exception:
    """The error for a call that no row takes, with every row's reason."""
    asked = rows(op, device, backend)
    if not asked:
        text = f"{op}: device must be one of cpu, cuda, got {device}"
        return NotImplementedError(text)
    reasons = "; ".join(f"{r.backend}: {reason(r, args)}" for r in asked)
    text = f"{op}: no row runs this call on {device} ({reasons})"
    if backend and unavailable(asked[0]) is not None:
        return ImportError(text)
    return NotImplementedError(text)


def reason(row: Row, args: tuple[Any, ...]) -> str | None:
    """Why the row does not run a call with these arguments, or None."""
    why = unavailable(row)
    if why is None and row.refuses:
        why = resolve(row.refuses)(*args)
    return why


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every op inside the `with` block on one backend: `with use_backend("reference"): ...`.

    Args:
        name: "native", "triton", "reference", or "auto" for the order of the table.

    The setting is global to the process and not meant for several threads at once: autograd runs
    the backward of CUDA tensors on a thread of its own, which must follow it too (if the backward
    runs inside the block). A call that the backend cannot run raises with the reason; nothing
    falls back. The environment variable QKERNELS_BACKEND sets the same for a whole process, and the
    argument `backend=` of each op for one call.

    Raises:
        ValueError: unknown name.
    """
    return _backend_set_to(check_backend(name, "use_backend: name"))


@contextmanager
def _backend_set_to(name: str) -> Iterator[None]:
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def explain(op: str, *args: Any, backend: str | None = None) -> str:
    """Which row would run a call, and why the others would not.

    Args:
        op: name of an op of the table, for example "fake_quant".
        args: the call's arguments in the order of `torch.ops.qkernels.<op>`; a first tensor is
            enough to see the choice for a device. Without any, the device is "cpu".
        backend: as in the op itself.

    Returns:
        One line per row: "-> native", "native: <why not>", or "native: not needed".
    """
    if op not in STEMS:
        raise ValueError(f"explain: op must be one of {', '.join(STEMS)}, got {op!r}")
    if args and not isinstance(args[0], Tensor):
        raise TypeError(f"explain: args[0] must be a Tensor, got {type(args[0]).__name__}")
    device = args[0].device.type if args else "cpu"
    asked = check_backend(backend, "explain: backend") or _backend
    lines = [f"{op} on {device}" + (f", backend={asked}" if asked else "")]
    chosen = False
    for row in rows(op, device):
        if asked and row.backend != asked:
            lines.append(f"   {row.backend}: not asked for")
            continue
        why = reason(row, args) if len(args) > 1 or not row.refuses else unavailable(row)
        if why is not None:
            lines.append(f"   {row.backend}: {why}")
        elif chosen:
            lines.append(f"   {row.backend}: not needed")
        else:
            lines.append(f"-> {row.backend}")
            chosen = True
    return "\n".join(lines)
