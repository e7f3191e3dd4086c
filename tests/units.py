"""Units of tensors, entry by entry: what a statement about operators lets through, by brute force.

Written against the words of `bnfold.channel_graph` alone, so that it can judge those who make
statements and those who use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from bnfold.channel_graph import Link, Operator, Product, Route, ShiftRule, Sign, Sum, Tie, ValueId

Ints = NDArray[np.int64]
Shape = tuple[int, ...]


def offsets(shape: Shape, axes: Iterable[int]) -> Ints:
    """Where the entries along ``axes`` lie in an array of ``shape``, flat, row-major."""
    places = np.arange(prod(shape)).reshape(shape)
    axes = tuple(axes)
    corner = places[tuple(slice(None) if k in axes else slice(0, 1) for k in range(len(shape)))]
    others = [k for k in range(len(shape)) if k not in axes]
    return corner.transpose([*axes, *others]).ravel()


def pairs(links: Iterable[Link], source: Shape, target: Shape) -> tuple[Ints, Ints]:
    """Entries of the source and the entries of the target that they are."""
    left, right = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for link in links:
        ours, theirs = offsets(source, link.source), offsets(target, link.target)
        ours = ours if link.source_index is None else ours[link.source_index]
        theirs = theirs if link.target_index is None else theirs[link.target_index]
        assert ours.size == theirs.size, "a link joins different numbers of entries"
        left = (left[:, None] + ours).ravel()
        right = (right[:, None] + theirs).ravel()
    return left, right


def links_of(route: Route, rank: int) -> tuple[Link, ...]:
    """The links of a route; by default every axis is the same axis."""
    return tuple(Link((k,), (k,)) for k in range(rank)) if route.links is None else route.links


class Units:
    """Which entries of which values have to have the same scale; class 0 is in true units.

    Args:
        operators: The statements.
        shapes: The shapes of all values as they are when the model runs.
        gates: For each product, by name, which of its factors is in true units.
    """

    def __init__(
        self,
        operators: Iterable[Operator],
        shapes: Mapping[ValueId, Shape],
        gates: Mapping[str, int] | None = None,
    ) -> None:
        self.shapes, self._gates = shapes, gates or {}
        self._start: dict[ValueId, int] = {}
        count = 1
        for value, shape in shapes.items():
            self._start[value] = count
            count += prod(shape)
        self._labels = np.arange(count)
        self._joined: list[tuple[Ints, Ints]] = []
        self._positive: list[Ints] = []
        self._no_shift: list[Ints] = []
        for operator in operators:
            self._state(operator)
        self._settle()

    def entries(self, value: ValueId) -> Ints:
        """The numbers of all entries of a value, flat."""
        return np.arange(prod(self.shapes[value])) + self._start[value]

    def classes(self, value: ValueId) -> Ints:
        """The class of each entry, in the shape of the value."""
        return self._labels[self.entries(value)].reshape(self.shapes[value])

    @property
    def positive(self) -> set[int]:
        """Classes whose scale has to be positive."""
        return {int(k) for ids in self._positive for k in self._labels[ids]}

    @property
    def no_shift(self) -> set[int]:
        """Classes that have no shift."""
        return {int(k) for ids in self._no_shift for k in self._labels[ids]} | {0}

    # ---- statements ----

    def _state(self, operator: Operator) -> None:
        assert isinstance(operator, Tie | Sum | Product)
        paths = operator.routes if isinstance(operator, Product) else operator.paths
        gate = None
        if isinstance(operator, Product):
            gate = operator.routes[self._gates[operator.name]].source
            self._join(self.entries(gate), 0)
        carried = [route for route in paths if route.source != gate]
        reached = {route.target: np.zeros(prod(self.shapes[route.target]), bool) for route in paths}
        for route in carried:
            reached[route.target] |= self._route(route)
            self._rules(operator, route)
        for value, mask in reached.items():
            self._join(self.entries(value)[~mask], 0)
        on_routes = {v for route in paths for v in (route.source, route.target)}
        for value in (*operator.inputs, *operator.outputs):
            if value not in on_routes:
                self._join(self.entries(value), 0)

    def _rules(self, operator: Operator, route: Route) -> None:
        both = np.concatenate([self.entries(route.source), self.entries(route.target)])
        if isinstance(operator, Tie) and operator.sign is Sign.POSITIVE:
            self._positive.append(both)
        if isinstance(operator, Product) or (
            isinstance(operator, Tie) and operator.shift is ShiftRule.ZERO
        ):
            self._no_shift.append(both)

    def _route(self, route: Route) -> NDArray[np.bool_]:
        source, target = self.shapes[route.source], self.shapes[route.target]
        links = links_of(route, len(source))
        left, right = pairs(links, source, target)
        self._join(self.entries(route.source)[left], self.entries(route.target)[right])
        linked = [a for link in links for a in link.source], [a for k in links for a in k.target]
        for value, axes in zip((route.source, route.target), linked, strict=True):
            self._join(self.entries(value), self.entries(value)[self._first(value, axes)])
        mask = np.zeros(prod(target), bool)
        mask[right] = True
        return mask[self._first(route.target, linked[1])]

    def _first(self, value: ValueId, axes: list[int]) -> Ints:
        """For each entry the one that is first along all axes other than ``axes``."""
        shape = self.shapes[value]
        places = np.arange(prod(shape)).reshape(shape)
        for axis in set(range(len(shape))) - set(axes):
            places = np.broadcast_to(places.take([0], axis=axis), shape)
        return places.ravel()

    def _join(self, left: Ints, right: Ints | int) -> None:
        self._joined.append((left, np.broadcast_to(np.asarray(right), left.shape)))

    def _settle(self) -> None:
        left = np.concatenate([pair[0] for pair in self._joined])
        right = np.concatenate([pair[1] for pair in self._joined])
        before = None
        while before is None or (before != self._labels).any():
            before = self._labels.copy()
            least = np.minimum(before[left], before[right])
            np.minimum.at(self._labels, left, least)
            np.minimum.at(self._labels, right, least)
