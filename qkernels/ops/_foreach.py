"""What the functions of qkernels.foreach share: from lists of arguments to one call of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import _registry
from qkernels.ops._check import each_call, named
from qkernels.ops._library import any_traced, check

_PLURAL = {"scale": "scales", "zero_point": "zero_points"}


class Listed:
    """The arguments of one call of a list function.

    Args:
        op: the function's name in qkernels.foreach.
        xs: its list of tensors.
        values: its other arguments by the names of the function of one tensor, in any order; each
            one value for all tensors, or a list or tuple with one entry per tensor.
        backend: as given by the user.
        what: the user's name for xs.
        whole: names of arguments whose tuples are one value.

    Raises:
        TypeError, ValueError: no list, an empty one, one that mixes devices, an unknown backend, or
            values of another length.
    """

    def __init__(
        self,
        op: str,
        xs: Sequence[Tensor],
        values: dict[str, Any],
        backend: str | None,
        what: str = "xs",
        whole: tuple[str, ...] = (),
    ) -> None:
        _check_list(op, what, xs)
        self.op, self.xs = op, xs
        self.backend = _registry.check_backend(backend, f"foreach.{op}: backend")
        self.keywords = _spread(op, len(xs), values, whole)

    @property
    def apart(self) -> bool:
        """Whether the list must be taken apart into single ops, because one of them is traced."""
        return any_traced(x for x in self.xs if isinstance(x, Tensor))

    def each(self, function: Callable[..., Any]) -> list[Any]:
        """function(x, **the others) for every tensor; an error names the tensor."""
        with named(self.op):
            return each_call(function, zip(self.xs, strict=True), self.keywords)

    def each_prepared(self, prepare: Callable[..., Callable[[Tensor], Any]]) -> list[Any]:
        """prepare(**the others)(x) for every tensor, prepared once for the same others."""
        prepared: dict[int, Callable[[Tensor], Any]] = {}

        def one(x: Tensor, keywords: dict[str, Any]) -> Any:
            function = prepared.get(id(keywords))
            if function is None:
                function = prepared[id(keywords)] = prepare(**keywords)
            return function(x)

        with named(self.op):
            return each_call(one, zip(self.xs, self.keywords, strict=True))

    def singles(self, function: Callable[..., Any]) -> list[Any]:
        """The function of one tensor, for every tensor."""
        if torch.compiler.is_compiling():  # its graph holds no error to name
            return [
                function(x, **kw, backend=self.backend)
                for x, kw in zip(self.xs, self.keywords, strict=True)
            ]
        return self.each(lambda x, **kw: function(x, **kw, backend=self.backend))

    def calls(self, op: str, arguments: Callable[..., tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """arguments(x, **the others), those of the op's schema, checked, for every tensor."""

        def checked(x: Tensor, **kw: Any) -> tuple[Any, ...]:
            args = arguments(x, **kw)
            check(op, *args)
            return args

        return self.each(checked)

    def run(
        self, op: str, calls: list[tuple[Any, ...]], places: Sequence[int] | None = None
    ) -> list[Any]:
        """Run an op on checked arguments, at once. places: as in `_check.named`."""
        with named(self.op, places):
            return _registry.run_many(op, self.backend, calls)

    def run_by_op(
        self, calls: list[tuple[str, Any]], run: Callable[..., list[Any]] | None = None
    ) -> list[Any]:
        """Run (op, checked arguments) of every tensor, each op at once.

        Args:
            run: (op, calls, places) -> results; None: as `Listed.run`.
        """
        run = run or self.run
        results: list[Any] = [None] * len(calls)
        for op in dict.fromkeys(op for op, _ in calls):
            places = [i for i, (other, _) in enumerate(calls) if other == op]
            found = run(op, [calls[i][1] for i in places], places)
            for i, result in zip(places, found, strict=True):
                results[i] = result
        return results


def _check_list(op: str, what: str, xs: Any) -> None:
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"foreach.{op}: {what} must be a list of tensors, got {type(xs).__name__}")
    if not xs:
        raise ValueError(f"foreach.{op}: {what} must be a list of at least one tensor, got {xs}")
    device = None
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            continue  # its op says what is wrong with it
        device = device or x.device
        if x.device != device:
            raise ValueError(
                f"foreach.{op}: {what} must be on one device, got {device} and, for tensor {i}, "
                f"{x.device}"
            )


def _spread(
    op: str, count: int, values: dict[str, Any], whole: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The keyword arguments of each tensor: one and the same dict where they are the same."""
    shared, listed = {}, {}
    for name, value in values.items():
        if not isinstance(value, list) and (not isinstance(value, tuple) or name in whole):
            shared[name] = value
            continue
        if len(value) != count:
            raise ValueError(
                f"foreach.{op}: {_PLURAL.get(name, name)} must be one value or a list of {count}, "
                f"one per tensor, got a list of {len(value)}"
            )
        listed[name] = value
    if not listed:
        return [shared] * count
    made: dict[tuple[int, ...], dict[str, Any]] = {}
    keywords = []
    for values_of_one in zip(*listed.values(), strict=True):
        key = tuple(map(id, values_of_one))  # equal is not enough: 1 == True
        if key not in made:
            made[key] = {**shared, **dict(zip(listed, values_of_one, strict=True))}
        keywords.append(made[key])
    return keywords
