"""Genotypes: what the cells of a network compute, as drawn and as written to a file.

A cell (Zoph et al. 2018; DARTS, Liu et al. 2019) has two inputs, states 0 and 1: the outputs of the
cell before the last and of the last one. Each of its sum nodes adds two operations on two different
earlier states, and is itself a state; the output concatenates sum nodes along the channels. A
network repeats a normal cell, and twice a reducing one, which halves the image.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..recipe import require as require_setting
from ..seeds import stream_seed

T = TypeVar("T")
require = partial(require_setting, op="ghn-space")

WEIGHTLESS = ("skip", "max_pool_3x3", "avg_pool_3x3")
TRAINABLE = (
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_1x1",
    "conv_3x3",
    "inverted_3x3",
)
OPERATIONS = WEIGHTLESS + TRAINABLE
NONE = "none"


class Draw:
    """Choices from one stream. Built on ``random.Random.random``, the only part of it whose numbers
    Python promises to keep."""

    def __init__(self, seed: int, step: int, stream: str) -> None:
        self._numbers = random.Random(stream_seed(seed, step, stream))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._numbers.random() * len(options))]

    def between(self, least: int, most: int) -> int:
        return self.pick(range(least, most + 1))

    def chance(self, share: float) -> bool:
        return self._numbers.random() < share


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        sums: for each sum node the operations that it adds, one or two (operation, state) pairs
            sorted by state. An operation "none" is left out.
        concat: states that the output concatenates, ascending.

    Raises:
        ValueError: an unknown operation, a state that is not there yet, a sum node that nothing
            reads, or a first sum node that does not read state 1.
    """

    sums: tuple[tuple[tuple[str, int], ...], ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        states = [state for terms in self.sums for _, state in terms]
        whole = all(type(state) is int for state in (*states, *self.concat))
        require(whole, "states", "whole numbers", (self.sums, self.concat))
        for number, terms in enumerate(self.sums):
            states = [state for _, state in terms]
            earlier = range(number + 2)
            good = 1 <= len(terms) <= 2 and states == sorted(set(states))
            require(good and set(states) <= set(earlier), "sum node", "of earlier states", terms)
            known = all(op in OPERATIONS for op, _ in terms)
            require(known, "operation", f"one of {', '.join(OPERATIONS)}", terms)
        good = bool(self.sums) and 1 in (state for _, state in self.sums[0])
        require(good, "the first sum node", "of state 1, or the last cell is lost", self.sums)
        own = range(2, len(self.sums) + 2)
        good = self.concat == tuple(sorted(set(self.concat))) and set(self.concat) <= set(own)
        require(good, "concat", f"of states 2 .. {own[-1]}, ascending", self.concat)
        lost = set(own) - set(self.concat) - self.read()
        require(not lost, "concat", f"with the sum nodes that nothing reads, {lost}", self.concat)

    def read(self) -> set[int]:
        """The states that the sum nodes read."""
        return {state for terms in self.sums for _, state in terms}

    def operations(self) -> list[str]:
        return [op for terms in self.sums for op, _ in terms]

    def to_json(self) -> dict[str, Any]:
        return {
            "sums": [[list(term) for term in terms] for terms in self.sums],
            "concat": list(self.concat),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cell:
        sums = tuple(tuple((op, state) for op, state in terms) for terms in value["sums"])
        return Cell(sums, tuple(value["concat"]))


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network."""

    normal: Cell
    reduce: Cell

    def to_json(self) -> dict[str, Any]:
        return {"normal": self.normal.to_json(), "reduce": self.reduce.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Genotype:
        return Genotype(Cell.from_json(value["normal"]), Cell.from_json(value["reduce"]))


def digest(genotype: Any) -> str:
    """16 hex digits of the JSON of a genotype: equal for equal ones, in every process."""
    text = json.dumps(genotype, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def draw_genotype(draw: Draw, sums: int) -> Genotype:
    """A normal and a reducing cell of ``sums`` sum nodes each.

    Every operation of every state is as likely as the others, within what keeps the network whole,
    so that no draw has to be thrown away (our choice; the public generator of DeepNets-1M draws
    again):

    - a sum node may have one "none", and the first one not on the last cell's output;
    - only cells of two sum nodes and more have "none";
    - the normal cell has a trainable operation: if none was drawn, its last one is drawn from them;
    - half of the reducing cells have no trainable operation at all;
    - half of the cells concatenate all sum nodes, the others those that nothing reads and each of
      the rest with probability 1/2.
    """
    normal = _draw_cell(draw, sums, OPERATIONS)
    if not set(normal.operations()) & set(TRAINABLE):
        *before, (*terms, (_, state)) = normal.sums
        changed = (*before, (*terms, (draw.pick(TRAINABLE), state)))
        normal = Cell(changed, normal.concat)
    return Genotype(normal, _draw_cell(draw, sums, draw.pick((OPERATIONS, WEIGHTLESS))))


def _draw_cell(draw: Draw, sums: int, operations: tuple[str, ...]) -> Cell:
    nodes: list[tuple[tuple[str, int], ...]] = []
    for number in range(sums):
        states = list(range(number + 2))
        # the one that may have "none": of the first sum node the cell before the last
        weak = states.pop(0) if number == 0 else states.pop(draw.between(0, len(states) - 1))
        terms = [(draw.pick(operations), draw.pick(states))]
        op = draw.pick((*operations, NONE) if sums > 1 else operations)
        if op != NONE:
            terms.append((op, weak))
        nodes.append(tuple(sorted(terms, key=lambda term: term[1])))
    read = {state for terms in nodes for _, state in terms}
    every = draw.chance(0.5)
    own = range(2, sums + 2)
    concat = [state for state in own if state not in read or every or draw.chance(0.5)]
    return Cell(tuple(nodes), tuple(concat))
