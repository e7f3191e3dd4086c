"""Channels that no choice can set apart, taken together: what a search over steps works on.

Everything that the constraints make equal is one class, numbered from 0; class 0 is what is known.
A part of the classes can be cut out and searched by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bnfold.passes.constraints import Candidate, Constraints, Sums
from bnfold.passes.number_types import NUMBER_TYPES, number_type
from bnfold.passes.potentials import F64, Edges, Ids, Mask, Potentials


@dataclass(frozen=True, slots=True, eq=False)
class Bond:
    """A step as equations between classes, on the channels that can be solved for either side.

    ``at`` are those channels. ``x`` and ``y`` are the scale classes of the awkward channels before
    and after the step, ``x_shift`` and ``y_shift`` the shift classes.
    """

    candidate: Candidate
    at: Ids
    scale: Edges
    shift: Edges
    awkward: Ids
    x: Ids
    y: Ids
    x_shift: Ids
    y_shift: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """All classes of a graph, or some of them.

    Attributes:
        bonds: The steps that may vanish.
        scales: How many classes of scales there are.
        shifts: How many classes of shifts.
        sums: The equations between shift classes.
        tied: By equation, a number that all those have in common that depend on each other; sorted.
        summed: By shift class, that number where it is in an equation, else -1.
        sign: By scale class: 1 where it has to be positive.
        limit: How far, in powers of 2, scales that join it may lie apart.
        leaf_x: Whether one step alone reads it, and it is otherwise free.
        leaf_y: Whether one step alone writes it, and it is otherwise free.
    """

    bonds: tuple[Bond, ...]
    scales: int
    shifts: int
    sums: Sums
    tied: Ids
    summed: Ids
    sign: F64
    limit: F64
    leaf_x: Mask
    leaf_y: Mask

    def part(self, bonds: Sequence[Bond]) -> Classes:
        """The classes that ``bonds`` touch, and the sums that these are in."""
        scale = _touched([b.scale for b in bonds], [b.x for b in bonds], [b.y for b in bonds])
        shift = _touched(
            [b.shift for b in bonds], [b.x_shift for b in bonds], [b.y_shift for b in bonds]
        )
        rows = self._rows(np.unique(self.summed[shift]))
        shift = np.union1d(shift, self.sums.numbers[rows])
        shift = shift[shift >= 0]
        cut = tuple(
            replace(
                b, scale=_renumbered(b.scale, scale), shift=_renumbered(b.shift, shift),
                x=np.searchsorted(scale, b.x), y=np.searchsorted(scale, b.y),
                x_shift=np.searchsorted(shift, b.x_shift),
                y_shift=np.searchsorted(shift, b.y_shift),
            ) for b in bonds
        )  # fmt: skip
        numbers = self.sums.numbers[rows]
        numbers = np.where(numbers >= 0, np.searchsorted(shift, numbers), -1)
        sums = Sums(
            numbers, self.sums.factors[rows], self.sums.constant[rows], self.sums.owner[rows]
        )
        return Classes(
            cut, scale.size, shift.size, sums, self.tied[rows], self.summed[shift],
            self.sign[scale], self.limit[scale], self.leaf_x[scale], self.leaf_y[scale],
        )  # fmt: skip

    def _rows(self, ties: Ids) -> Ids:
        """The equations that have one of the numbers ``ties``."""
        starts, ends = (np.searchsorted(self.tied, ties, side=side) for side in ("left", "right"))
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        return np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in spans if a < b)])


def _touched(edges: Sequence[Edges], *others: Sequence[Ids]) -> Ids:
    ends = [side for e in edges for side in (e.source, e.target)]
    every = [np.zeros(1, np.int64), *ends, *(ids for group in others for ids in group)]
    return np.unique(np.concatenate(every))


def _renumbered(edges: Edges, kept: Ids) -> Edges:
    source, target = (np.searchsorted(kept, ids) for ids in (edges.source, edges.target))
    return replace(edges, source=source, target=target)


def summed(sums: Sums) -> Edges:
    """Shift classes that are in one equation, class 0 left out."""
    numbers = np.maximum(sums.numbers, 0)
    first = np.take_along_axis(numbers, (numbers != 0).argmax(axis=1)[:, None], axis=1)
    joined = (numbers != 0) & (first != 0)
    return Edges.of(np.broadcast_to(first, numbers.shape)[joined], numbers[joined])


def _by_tie(sums: Sums, shifts: int) -> tuple[Sums, Ids, Ids]:
    """``sums`` sorted by what joins them, that number, and the number of each shift class."""
    found = Potentials.settled(shifts, 0.0, summed(sums))
    numbers = np.maximum(sums.numbers, 0)
    tied: Ids = found.root[numbers].max(axis=1, initial=0)
    member = np.full(shifts, -1)
    member[numbers] = found.root[numbers]
    member[0] = -1
    order = np.argsort(tied, kind="stable")
    ordered = Sums(
        sums.numbers[order], sums.factors[order], sums.constant[order], sums.owner[order]
    )
    return ordered, tied[order], member


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """In which class each channel is, and where in it: what leads from classes back to channels.

    The scale of a channel is that of its class; its shift is ``slope`` times the shift of its
    class plus ``offset``.
    """

    constraints: Constraints
    scale: Ids
    shift: Ids
    slope: F64
    offset: F64

    @classmethod
    def of(cls, constraints: Constraints) -> Channels:
        """The classes that ``constraints`` make."""
        count = constraints.numbering.count
        scale = Potentials.settled(count, 1.0, constraints.scale)
        shift = Potentials.settled(count, 0.0, constraints.shift)
        return cls(
            constraints, np.unique(scale.root, return_inverse=True)[1],
            np.unique(shift.root, return_inverse=True)[1], shift.slope, shift.offset,
        )  # fmt: skip

    def classes(self) -> Classes:
        """All classes."""
        constraints = self.constraints
        scales, shifts = int(self.scale.max()) + 1, int(self.shift.max()) + 1
        sign = np.zeros(scales)
        sign[0] = 1
        for numbers, _ in constraints.positive:
            sign[self.scale[numbers]] = 1
        leaf_x, leaf_y = self._leaves(scales)
        bonds = tuple(self._bond(candidate) for candidate in constraints.candidates)
        sums, tied, member = _by_tie(self._sums(constraints.sums), shifts)
        return Classes(
            bonds, scales, shifts, sums, tied, member, sign, self._limits(scales), leaf_x, leaf_y
        )

    def _bond(self, step: Candidate) -> Bond:
        (at,), (awkward,) = np.nonzero(~step.awkward), np.nonzero(step.awkward)
        x, y, a, b = step.x[at], step.y[at], step.a[at], step.b[at]
        # slope_y t_ry + offset_y = a (slope_x t_rx + offset_x) + b
        slope = a * self.slope[x] / self.slope[y]
        offset = (a * self.offset[x] + b - self.offset[y]) / self.slope[y]
        return Bond(
            step, at, Edges.of(self.scale[x], self.scale[y], a, 0.0, step.step),
            Edges.of(self.shift[x], self.shift[y], slope, offset, step.step), awkward,
            self.scale[step.x[awkward]], self.scale[step.y[awkward]],
            self.shift[step.x[awkward]], self.shift[step.y[awkward]],
        )  # fmt: skip

    def _sums(self, sums: Sums) -> Sums:
        there = sums.numbers >= 0
        safe = np.where(there, sums.numbers, 0)
        numbers = np.where(there, self.shift[safe], -1)
        offsets = np.where(there, sums.factors * self.offset[safe], 0.0)
        constant = sums.constant + offsets.sum(axis=1)
        return Sums(numbers, sums.factors * self.slope[safe], constant, sums.owner)

    def _leaves(self, count: int) -> tuple[Mask, Mask]:
        """Classes that only one step reads, and classes that only one step writes."""
        reads, writes = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for table, sides in (
            (reads, self.constraints.reads), (writes, self.constraints.writes),
        ):  # fmt: skip
            for numbers in sides.values():
                np.add.at(table, self.scale[numbers], 1)
        stiff = np.zeros(count, bool)
        stiff[0] = True
        stiff[self.scale[self.constraints.stiff]] = True
        # A step that is only a scale or only a shift can neither write nor read what is neither.
        written, read = stiff.copy(), stiff.copy()
        for index in self.constraints.narrow:
            written[self.scale[self.constraints.writes[index]]] = True
            read[self.scale[self.constraints.reads[index]]] = True
        return (reads == 1) & ~written, (writes == 1) & ~read

    def _limits(self, count: int) -> F64:
        limit = np.full(count, NUMBER_TYPES["DOUBLE"].spread)
        numbering = self.constraints.numbering
        for value in numbering.values:
            most = number_type(self.constraints.draft.values[value].dtype).spread
            if most < NUMBER_TYPES["DOUBLE"].spread:
                np.minimum.at(limit, self.scale[numbering.of(value).ravel()], most)
        return limit
