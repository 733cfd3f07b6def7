"""How an op is declared to torch and how it is called.

Every op is a `torch.ops.qkernels.<op>` with a fake kernel, so that torch.compile and torch.export
see it. An eager call on plain tensors skips torch's dispatcher, which would cost more than the
kernel of a small tensor (about 6 us in Python), and asks the registry at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qkernels import _registry
from qkernels.ops._check import each_call, named

LIBRARY = torch.library.Library("qkernels", "DEF")
_checks: dict[str, Callable[..., None]] = {}
_ops: dict[str, Any] = {}
_PLAIN = (Tensor, torch.nn.Parameter)

# bound once: these are asked in every eager call
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


def define(op: str, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
    """Declare an op. `check` gets the schema's positional arguments and raises on bad ones; it runs
    in the real kernel and in the fake one, so that no mode skips it."""

    # other keyword arguments are for the op's autograd formula alone
    def kernel(*args: Any, backend: str = "", **_: Any) -> Any:
        check(*args)
        return _registry.run(op, _registry.check_backend(backend, f"{op}: backend"), *args)

    def fake_kernel(*args: Any, **_: Any) -> Any:
        check(*args)
        return fake(*args)

    _checks[op] = check
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(f"{op}{schema}", tags=tags)
    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{op}", fake_kernel, lib=LIBRARY)
    _ops[op] = getattr(torch.ops.qkernels, op).default


def traced(x: Tensor) -> bool:
    """Whether a call on x must go through torch's dispatcher: it is compiled, exported, traced,
    transformed or watched by a dispatch mode, or x has no memory that holds its values."""
    return (
        _is_compiling()
        or type(x) not in _PLAIN
        or _dispatch_modes() > 0
        or x.is_meta
        or x.is_neg()
        or x._is_zerotensor()
        or _tracing_state() is not None
        or _functorch_level() is not None
    )


def any_traced(xs: Iterable[Tensor]) -> bool:
    """Whether any of xs is traced; what is not about a tensor is asked once."""
    watched = _is_compiling() or _dispatch_modes() > 0
    if watched or _tracing_state() is not None or _functorch_level() is not None:
        return True
    return any(type(x) not in _PLAIN or x.is_meta or x.is_neg() or x._is_zerotensor() for x in xs)


def call(op: str, backend: str, *args: Any, **autograd: Any) -> Any:
    """Run an op: by the dispatcher if traced, else by the registry."""
    if traced(args[0]):
        return _ops[op](*args, backend=backend, **autograd)
    _checks[op](*args)
    return _registry.run(op, backend, *args)


def check(op: str, *args: Any) -> None:
    """Raise on arguments that no row could run."""
    _checks[op](*args)


def call_list(op: str, backend: str, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run an op on a list of calls by the registry; none of them may be traced."""
    with named(op):
        each_call(_checks[op], calls)
        return _registry.run_many(op, backend, calls)


def run_checked(op: str, backend: str, *args: Any) -> Any:
    """Run an op past the dispatcher, with arguments that its schema does not have."""
    _checks[op](*args)
    return _registry.run(op, backend, *args)
