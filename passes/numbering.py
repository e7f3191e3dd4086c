"""Which channels there are: every value near a step, entry by entry, under one numbering.

The units of a value vary along some of its axes, those on which steps that may vanish lie, carried
along the routes of the operators between them; along all other axes its units are the same. A value
whose units vary along axes of sizes m and n has m * n numbers, row-major; number 0 belongs to
nobody: its units are known.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np

from bnfold.channel_graph import Affine, Linear, Link, Norm, Route, Tie, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.potentials import Ids

_LARGEST = 1 << 17  # entries of one value; beyond, its units are taken to be one scalar

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which numbers a route makes equal.

    ``source[i]`` and ``target[i]`` are one channel on its two sides; ``left[i]`` and ``right[i]``
    lie along an axis of one value that is in no link, and have to have the same units.
    """

    source: Ids
    target: Ids
    left: Ids
    right: Ids


class Numbering:
    """The numbers of all values that steps which may vanish can reach.

    Args:
        draft: The graph, with what is decided so far.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.values: dict[ValueId, None] = {}
        self.operators: dict[int, None] = {}
        self._sizes: dict[tuple[ValueId, int], int] = {}
        self._wanted: dict[ValueId, set[int]] = {}
        self._flood()
        self._useful = self._met()
        self._spread()
        self.axes: dict[ValueId, Axes] = {}
        self.sizes: dict[ValueId, tuple[int, ...]] = {}
        self.start: dict[ValueId, int] = {}
        self.count = 1
        for value in self.values:
            self._number(value)

    # ---- which values ----

    def _flood(self) -> None:
        queue: list[ValueId] = []
        for index, step in self.draft.steps():
            queue.extend((self.draft.input(index), self.draft.output(index)))
            if step.axis is not None:
                self._seed(index, step)
        while queue:
            value = queue.pop()
            if value in self.values:
                continue
            self.values[value] = None
            for index in self.draft.touching(value):
                if index not in self.operators:
                    self.operators[index] = None
                    queue.extend(self._beyond(index))

    def _seed(self, index: int, step: Affine) -> None:
        taken = self.draft.step_map(index)
        if taken.channels > 1 and step.axis is not None:
            for value in (self.draft.input(index), self.draft.output(index)):
                self._wanted.setdefault(value, set()).add(step.axis)
                self._sizes[value, step.axis] = taken.channels

    def _beyond(self, index: int) -> Iterable[ValueId]:
        """The values whose units depend on each other through operator ``index``."""
        operator = self.draft.operator(index)
        if isinstance(operator, Affine):
            return (self.draft.input(index), self.draft.output(index))
        return chain.from_iterable((r.source, r.target) for r in self.draft.routes(index))

    # ---- which axes ----

    def _met(self) -> dict[tuple[ValueId, int], set[int]]:
        """The axes along which somebody could take over units, there (-1) or beyond an operator."""
        groups = (
            len(link.source) > 1 or len(link.target) > 1
            for index in self.operators for route in self.draft.routes(index)
            for link in route.links or ()
        )  # fmt: skip
        if not any(groups):
            return {}  # nobody will ask
        queue = [(*pair, -1) for index in self.operators for pair in self._taking(index)]
        found: dict[tuple[ValueId, int], set[int]] = {}
        while queue:
            value, axis, beyond = queue.pop()
            behind = found.setdefault((value, axis), set())
            if beyond in behind or len(behind) > 1:
                continue
            behind.add(beyond)
            for index in self.draft.touching(value):
                if index != beyond:
                    for route in self.draft.routes(index):
                        queue += [(*pair, index) for pair in _linked(route, value, axis)]
        return found

    def _taking(self, index: int) -> Iterator[tuple[ValueId, int]]:
        operator = self.draft.operator(index)
        if isinstance(operator, Linear):
            yield self.draft.input(index), operator.in_axis
            yield self.draft.output(index), operator.out_axis
        elif isinstance(operator, Norm):
            yield self.draft.output(index), operator.axis
        elif isinstance(operator, Affine) and operator.axis is not None:
            yield self.draft.input(index), operator.axis
            yield self.draft.output(index), operator.axis

    def _spread(self) -> None:
        """From the axes of steps, then, where no step needs one, from where values are cut."""
        self._follow([(value, axis) for value, axes in self._wanted.items() for axis in axes])
        needed = set(self._wanted)
        for index in self.operators:
            operator = self.draft.operator(index)
            filled = isinstance(operator, Tie) and operator.fill is not None
            for route in () if filled else self.draft.routes(index):
                if not needed.intersection((route.source, route.target)):
                    self._follow(list(self._pieces(route)), needed)

    def _pieces(self, route: Route) -> Iterator[tuple[ValueId, int]]:
        """Along an axis that is cut or joined each piece may have units of its own."""
        for link in route.links or ():
            if link.source_index is not None or link.target_index is not None:
                yield from ((route.source, axis) for axis in link.source)
                yield from ((route.target, axis) for axis in link.target)

    def _follow(
        self, queue: list[tuple[ValueId, int]], but: Container[ValueId] = frozenset()
    ) -> None:
        """Let the axes in ``queue`` vary, and all that vary with them."""
        for value, axis in queue:
            self._wanted.setdefault(value, set()).add(axis)
        while queue:
            value, axis = queue.pop()
            for index in self.draft.touching(value):
                for other, asked, size in self._carried(index, value, axis):
                    if size is not None:
                        self._sizes.setdefault((other, asked), size)
                    axes = self._wanted.setdefault(other, set())
                    if asked not in axes and other not in but:
                        axes.add(asked)
                        queue.append((other, asked))

    def _carried(
        self, index: int, value: ValueId, axis: int
    ) -> Iterable[tuple[ValueId, int, int | None]]:
        """Which axes of which values vary because ``axis`` of ``value`` does."""
        size = self.size(value, axis)
        if isinstance(self.draft.operator(index), Affine):
            for other in (self.draft.input(index), self.draft.output(index)):
                yield other, axis, size
        for route in self.draft.routes(index):
            if value in (route.source, route.target):
                yield from self._along(index, route, value, axis, size)

    def _along(
        self, index: int, route: Route, value: ValueId, axis: int, size: int | None
    ) -> Iterable[tuple[ValueId, int, int | None]]:
        forth = value == route.source
        other = route.target if forth else route.source
        if route.links is None:
            yield other, axis, size
            return
        for link in route.links:
            mine, theirs = (link.source, link.target) if forth else (link.target, link.source)
            if axis not in mine:
                continue
            if len(mine) == len(theirs) == 1:
                plain = link.source_index is None and link.target_index is None
                yield other, theirs[0], size if plain else None
            elif self._sized(value, mine) and self._worth(index, other, theirs):
                yield from ((value, a, None) for a in mine)
                yield from ((other, a, None) for a in theirs)

    def _sized(self, value: ValueId, axes: Axes) -> bool:
        return all(self.size(value, axis) is not None for axis in axes)

    def _worth(self, index: int, value: ValueId, axes: Axes) -> bool:
        """Whether a group of axes can be numbered, and somebody could use it there.

        Somebody on this side of operator ``index``: who is beyond it has been asked already.
        """
        long = [axis for axis in axes if self.size(value, axis) != 1]
        used = (self._useful.get((value, axis), set()) for axis in long)
        return self._sized(value, axes) and any(beyond - {index} for beyond in used)

    def size(self, value: ValueId, axis: int) -> int | None:
        """The size of ``value`` along ``axis``, if known."""
        shape = self.draft.values[value].shape
        if shape is not None and -len(shape) <= axis < len(shape):
            size = shape[axis]
            if isinstance(size, int):
                return size
        return self._sizes.get((value, axis))

    # ---- the numbers ----

    def _number(self, value: ValueId) -> None:
        sized = {axis: self.size(value, axis) for axis in sorted(self._wanted.get(value, ()))}
        known = {axis: size for axis, size in sized.items() if size is not None and size > 1}
        if prod(known.values()) > _LARGEST:
            known = {}
        self.axes[value], self.sizes[value] = tuple(known), tuple(known.values())
        self.start[value] = self.count
        self.count += prod(known.values())

    def of(self, value: ValueId) -> Ids:
        """The numbers of ``value``, in the shape of the axes that its units vary along."""
        start, sizes = self.start[value], self.sizes[value]
        return np.arange(start, start + prod(sizes)).reshape(sizes)

    def along(self, value: ValueId, axis: int) -> Ids:
        """The numbers along one axis, shape (C,), or (1,) where the units do not vary along it.

        Those along all other axes have to be tied to these.
        """
        axes = self.axes[value]
        numbers = self.of(value)
        if axis not in axes:
            return numbers.ravel()[:1]
        at = axes.index(axis)
        return np.moveaxis(numbers, at, 0).reshape(numbers.shape[at], -1)[:, 0]

    def beside(self, value: ValueId, axis: int | None) -> tuple[Ids, Ids]:
        """The numbers of ``value`` that have to equal those `along` ``axis``, and these."""
        axes, numbers = self.axes[value], self.of(value)
        other = tuple(k for k, a in enumerate(axes) if a != axis)
        return _collapsed(numbers, other)[1:]

    def pairs(self, route: Route) -> Pairs:
        """Which numbers ``route`` makes equal."""
        source, target = self.of(route.source), self.of(route.target)
        here, there = self.axes[route.source], self.axes[route.target]
        empty = np.zeros(0, np.int64)
        if route.links is None and here == there:
            return Pairs(source.ravel(), target.ravel(), empty, empty)
        links = [link for link in _links(route, here) if self._fits(route, link)]
        first = _arranged(source, here, [link.source for link in links])
        second = _arranged(target, there, [link.target for link in links])
        for at, link in enumerate(links):
            first = (_taken(first[0], link.source_index, at), *first[1:])
            second = (_taken(second[0], link.target_index, at), *second[1:])
        return Pairs(
            first[0].ravel(), second[0].ravel(),
            np.concatenate([first[1], second[1]]), np.concatenate([first[2], second[2]]),
        )  # fmt: skip

    def _fits(self, route: Route, link: Link) -> bool:
        """Whether units vary along all axes of the link on both sides, with equal sizes."""
        counts = []
        for value, axes, index in (
            (route.source, link.source, link.source_index),
            (route.target, link.target, link.target_index),
        ):
            sizes = dict(zip(self.axes[value], self.sizes[value], strict=True))
            if any(axis not in sizes and self.size(value, axis) != 1 for axis in axes):
                return False
            count = prod(sizes.get(axis, 1) for axis in axes)
            counts.append(count if index is None else index.size)
            if index is not None and index.size and int(index.max()) >= count:
                return False
        return counts[0] == counts[1]


def _links(route: Route, axes: Axes) -> list[Link]:
    if route.links is None:
        return [Link((axis,), (axis,)) for axis in axes]
    return list(route.links)


def _linked(route: Route, value: ValueId, axis: int) -> Iterator[tuple[ValueId, int]]:
    """The axes at the other end of ``route`` that ``axis`` of ``value`` is linked to."""
    for here, there in ((route.source, route.target), (route.target, route.source)):
        if here != value:
            continue
        if route.links is None:
            yield there, axis
        for link in route.links or ():
            pair = (
                (link.source, link.target) if here == route.source else (link.target, link.source)
            )
            if axis in pair[0]:
                yield from ((there, other) for other in pair[1])


def _collapsed(numbers: Ids, along: tuple[int, ...]) -> tuple[Ids, Ids, Ids]:
    """``numbers`` at entry 0 of the axes ``along``, and the pairs that this makes equal."""
    if not along:
        empty = np.zeros(0, np.int64)
        return numbers, empty, empty
    kept = numbers
    for axis in along:
        kept = kept.take([0], axis=axis)
    every = np.broadcast_to(kept, numbers.shape)
    others = every != numbers
    return kept, every[others], numbers[others]


def _arranged(numbers: Ids, axes: Axes, groups: list[Axes]) -> tuple[Ids, Ids, Ids]:
    """``numbers`` with one axis for each of ``groups``; all other axes collapsed."""
    linked = [axis for group in groups for axis in group if axis in axes]
    others = tuple(k for k, axis in enumerate(axes) if axis not in linked)
    kept, left, right = _collapsed(numbers, others)
    order = [axes.index(axis) for axis in linked]
    sizes = [prod(kept.shape[axes.index(a)] for a in group if a in axes) for group in groups]
    return kept.transpose([*order, *others]).reshape(sizes), left, right


def _taken(numbers: Ids, index: Ids | None, axis: int) -> Ids:
    return numbers if index is None else numbers.take(index, axis=axis)
