"""Nets of a few torch operations, and the judge of what is stated about them.

A row is captured in four forms: by torch.export, the same decomposed, traced by fx with the
shapes of a run, and traced without any. In each form units are drawn that the statements let
through; the graph is run on true and on stored tensors in float64, and every tensor in it has to
be the true one in the units that the statements predict. ``free`` counts the classes of entries of
inputs and outputs whose scale can be chosen: a link that is missing makes it smaller, a wrong one
makes the values disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bnfold.channel_graph import Norm, Opaque, Operator, Sum, Tie
from bnfold.torch_calls import Call
from bnfold.torch_constants import Constants
from bnfold.torch_facts import Facts, type_name
from bnfold.torch_ties import find_tie
from bnfold.torch_walk import parts, walk
from tests.torch_forms import (
    BARE,
    DECOMPOSED,
    EXPORTED,
    FORMS,
    FX,
    IMAGE,
    ONE,
    TRACED,
    TWO,
    A,
    Captured,
    E,
    P,
    Row,
    Z,
    capture,
    feeds,
    random,
    tensors_in,
    together,
)
from tests.units import Units, links_of, pairs

__all__ = [
    "BARE", "DECOMPOSED", "EXPORTED", "FORMS", "FX", "IMAGE", "ONE", "TRACED", "TWO", "A", "E", "P",
    "Row", "Z", "agrees", "calls", "feeds", "holds", "is_unstated", "only", "random", "stated",
    "together", "unknown",
]  # fmt: skip

Array = NDArray[np.float64]


# ---- statements ----


@dataclass(frozen=True, slots=True)
class Stated:
    """What is stated about a graph, the number of each tensor, and what is in it."""

    operators: list[Operator]
    numbers: dict[fx.Node, int]
    captured: Captured
    values: dict[fx.Node, Any]

    @property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """The shapes of all tensors."""
        return {number: np.shape(self.values[n]) for n, number in self.numbers.items()}


def stated(row: Row, form: str) -> Stated:
    """All statements about ``row``; what is unknown is Opaque."""
    captured = capture(row, form)
    values = captured.values(feeds(row))
    walked = walk(captured.graph_module, captured.held)
    tensors = {n: v for n, v in values.items() if isinstance(v, Tensor)}
    known = tensors if form == TRACED else {}
    facts = Facts(
        captured.graph_module, walked, Constants(walked, captured.held, captured.tensors),
        {n: tuple(v.shape) for n, v in known.items()},
        {n: type_name(v.dtype) for n, v in known.items()},
    )  # fmt: skip
    numbers: dict[fx.Node, int] = {}
    for node in captured.inputs:
        numbers[node] = len(numbers)

    def number(node: fx.Node) -> int:
        return numbers.setdefault(node, len(numbers))

    operators = [
        _statement(facts, call, results, values, number)
        for call, results in _asked_calls(facts, values)
    ]
    used = {v for operator in operators for v in (*operator.inputs, *operator.outputs)}
    kept = {n: k for n, k in numbers.items() if k in used or n in captured.inputs}
    return Stated(operators, kept, captured, values)


def calls(row: Row, form: str) -> list[Call]:
    """All operations of a row."""
    captured = capture(row, form)
    return walk(captured.graph_module, captured.held).calls


def _statement(
    facts: Facts,
    call: Call,
    results: Mapping[int, fx.Node] | None,
    values: Mapping[fx.Node, Any],
    number: Callable[[fx.Node], int],
) -> Operator:
    if results is not None:
        found = find_tie(facts, call, number, lambda value: (str(value),), results)
        if found is not None:
            return found
    live = [n for n in call.nodes if not facts.constants.is_constant(n)]
    touched = [*live, *(results or {0: call.node}).values()]
    inside = tuple(number(n) for n in touched if isinstance(values[n], Tensor))
    return Opaque(name=facts.label(call), op_type=call.op, inputs=inside, outputs=())


def _asked_calls(
    facts: Facts, values: Mapping[fx.Node, Any]
) -> Iterator[tuple[Call, Mapping[int, fx.Node] | None]]:
    """The operations that read or make floats, each with its results; None: they are one."""
    taken: set[fx.Node] = set()
    for call in facts.walk.calls:
        if call.node in taken or facts.constants.is_constant(call.node):
            continue
        several = parts(call)
        taken |= set((several or {}).values())
        made = list(tensors_in(values[call.node]))
        read = [v for n in call.nodes for v in tensors_in(values[n])]
        if not made or not any(v.is_floating_point() for v in (*made, *read)):
            continue  # arithmetic on sizes and indices
        one = isinstance(values[call.node], Tensor)
        yield call, several if several is not None else ({0: call.node} if one else None)


# ---- units ----


class ScaleUnits(Units):
    """Which entries have to have one scale; around what is unknown all is in true units."""

    def _state(self, operator: Operator) -> None:
        if isinstance(operator, Opaque | Norm):
            for value in (*operator.inputs, *operator.outputs):
                self._join(self.entries(value), 0)
        else:
            super()._state(operator)

    def _settle(self) -> None:
        self._join(np.zeros(1, np.int64), 0)  # there may be no statement
        super()._settle()


class ShiftUnits(ScaleUnits):
    """Which entries have to have one shift; a sum binds its shifts by equations instead."""

    def __init__(self, stated: Stated, gates: Mapping[str, int]) -> None:
        self._sums: list[Sum] = [op for op in stated.operators if isinstance(op, Sum)]
        super().__init__(stated.operators, stated.shapes, gates)

    def _state(self, operator: Operator) -> None:
        if not isinstance(operator, Sum):
            super()._state(operator)
            return
        for route in operator.paths:
            links = links_of(route, len(self.shapes[route.source]))
            ends = ([a for k in links for a in k.source], [a for k in links for a in k.target])
            for value, axes in zip((route.source, route.target), ends, strict=True):
                self._join(self.entries(value), self.entries(value)[self._first(value, axes)])

    def solution(self, random: Array) -> Array:
        """Shifts by class, as near to ``random`` as the equations allow."""
        pinned = list(self.no_shift)
        random[pinned] = 0
        rows = [row for total in self._sums for row in self._equations(total, random.size)]
        if not rows:
            return random
        matrix = np.unique(np.array(rows), axis=0)
        matrix[:, pinned] = 0
        return random - _least(matrix, matrix @ random)

    def _equations(self, total: Sum, count: int) -> Array:
        made = total.outputs[0]
        matrix = np.zeros((int(np.prod(self.shapes[made])), count))
        np.add.at(matrix, (np.arange(len(matrix)), self.classes(made).ravel()), -1)
        for sign, route in zip(total.signs, total.paths, strict=True):
            source, target = self.shapes[route.source], self.shapes[route.target]
            links = links_of(route, len(source))
            left, right = pairs(links, source, target)
            of = np.zeros(len(matrix), np.int64)
            of[right] = self._labels[self.entries(route.source)[left]]
            of = of[self._first(route.target, [a for k in links for a in k.target])]
            np.add.at(matrix, (np.arange(len(matrix)), of), sign)
        return matrix


def _least(matrix: Array, right: Array) -> Array:
    """The smallest x with ``matrix x = right``, by conjugate gradients: rows are much alike."""
    x = np.zeros(matrix.shape[1])
    along = gradient = matrix.T @ right
    enough = 1e-24 * (right @ right)
    for _ in range(200):
        if right @ right <= enough:
            return x
        step = matrix @ along
        size = (gradient @ gradient) / (step @ step)
        x, right = x + size * along, right - size * step
        after = matrix.T @ right
        along = after + (after @ after) / (gradient @ gradient) * along
        gradient = after
    raise AssertionError("the equations of the sums have no solution")


@dataclass(frozen=True, slots=True)
class Drawn:
    """Units of every tensor, entry by entry."""

    scale: dict[fx.Node, Tensor]
    shift: dict[fx.Node, Tensor]

    def stored(self, node: fx.Node, value: Tensor) -> Tensor:
        """What is stored where ``value`` is meant."""
        return (value - self.shift[node]) / self.scale[node] if node in self.scale else value

    def true(self, node: fx.Node, value: Tensor) -> Tensor:
        """What is meant where ``value`` is stored."""
        return value.double() * self.scale[node] + self.shift[node]


def draw(found: Stated, scales: ScaleUnits, shifts: ShiftUnits) -> Drawn:
    """Random units that the statements let through: negative and tiny scales where they may be."""
    rng = np.random.default_rng(2)
    count = len(scales._labels)
    scale = rng.uniform(0.5, 2, count) * rng.choice([1, 1, 1e-3], count)
    signs = rng.choice([-1, 1], count)
    signs[list(scales.positive)] = 1
    scale *= signs
    scale[0] = 1
    shift = shifts.solution(rng.normal(0, 1, count))
    drawn = Drawn({}, {})
    for node, value in found.numbers.items():
        classes = scales.classes(value)
        inside = found.values[node]
        if not isinstance(inside, Tensor) or not inside.is_floating_point():
            assert not classes.any(), "what is no float is in other units"
            continue
        drawn.scale[node] = torch.from_numpy(np.asarray(scale[classes]))
        drawn.shift[node] = torch.from_numpy(np.asarray(shift[shifts.classes(value)]))
    return drawn


# ---- verdicts ----


def agrees(row: Row, form: str, gate: int = 0) -> int:
    """Run ``row`` in true and in other units; how many scales could be chosen."""
    return _agrees(row, stated(row, form), gate)


def _agrees(row: Row, found: Stated, gate: int = 0) -> int:
    gates = {operator.name: gate for operator in found.operators}
    scales = ScaleUnits(found.operators, found.shapes, gates)
    drawn = draw(found, scales, ShiftUnits(found, gates))
    captured = found.captured
    _same_as_eager(row, found)
    given = [drawn.stored(n, v) for n, v in zip(captured.inputs, feeds(row), strict=True)]
    for node, value in captured.values(given).items():
        if node in drawn.scale:
            np.testing.assert_allclose(
                drawn.true(node, value), found.values[node].double(), rtol=row.tolerance,
                atol=row.tolerance, err_msg=node.name,
            )  # fmt: skip
    ends = (*captured.inputs, *captured.graph_module.graph.output_node().all_input_nodes)
    every = {k for n in ends if n in drawn.scale for k in scales.classes(found.numbers[n]).flat}
    return len({int(k) for k in every} - {0})


def _same_as_eager(row: Row, found: Stated) -> None:
    """The graph that is judged computes what the row says."""
    with torch.no_grad():
        expected = list(tensors_in(row.run(*(value.clone() for value in feeds(row)))))
    node = found.captured.graph_module.graph.output_node()
    for value, true in zip(tensors_in(found.values[node]), expected, strict=True):
        np.testing.assert_allclose(value, true, rtol=1e-6, atol=1e-9)


def unknown(found: Stated) -> list[str]:
    """The operations of which nothing is stated."""
    return [operator.op_type for operator in found.operators if isinstance(operator, Opaque)]


def holds(row: Row, form: str) -> None:
    """What is stated of a row is true; unless the form loses it, it is all that the row says."""
    if form in row.skips:
        return
    found = stated(row, form)
    count = _agrees(row, found)
    if form == BARE or form in row.loses:
        return
    assert not unknown(found)
    ties = [operator for operator in found.operators if isinstance(operator, Tie)]
    assert all(isinstance(operator, Tie | Sum) for operator in found.operators)
    if ties:
        assert (P if P in {tie.sign for tie in ties} else A) is row.sign
        assert (Z if Z in {tie.shift for tie in ties} else E) is row.shift
    assert count == row.free


def is_unstated(row: Row, form: str) -> None:
    """Nothing is stated of the operations of a row."""
    if form in row.skips:
        return
    found = stated(row, form)
    known = [op.op_type for op in found.operators if not isinstance(op, Opaque)]
    assert unknown(found)
    assert not known


def only(row: Row, form: str = EXPORTED) -> Operator:
    """The one statement about ``row``."""
    (operator,) = stated(row, form).operators
    return operator
