"""sum of f_i t_i = 0, one equation a channel of a sum: do they all have a solution together?

An equation with an unknown that no other equation and nothing else binds is always solvable: a
branch that ends in a convolution supplies whatever shift is asked of it. Those are set aside, again
and again. Of the rest, an equation with one or two unknowns fixes or joins them; what then still
has three or more is solved as a small linear system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.passes.constraints import Sums
from bnfold.passes.potentials import F64, TOLERANCE, Edges, Ids, Mask, Potentials

_LARGEST = 1 << 25  # numbers in the linear systems solved at once; beyond, the answer is no


@dataclass(frozen=True, slots=True, eq=False)
class SetAside:
    """Equations that were set aside together, each with the unknown that will satisfy it."""

    rows: Ids
    unknown: Ids


@dataclass(frozen=True, slots=True, eq=False)
class SolvedSums:
    """Shifts that satisfy all equations once those set aside are solved, last first."""

    shift: Potentials
    aside: tuple[SetAside, ...]


def sums_hold(sums: Sums, shift: Potentials) -> bool:
    """Whether shifts exist that satisfy all of ``sums``."""
    return not sums.owner.size or solve_sums(sums, shift) is not None


def solve_sums(sums: Sums, shift: Potentials, last: Mask | None = None) -> SolvedSums | None:
    """Solve ``sums``; None where they contradict each other.

    Args:
        sums: The equations.
        shift: What is known of the shifts.
        last: By number: unknowns that should stay free if another one can satisfy an equation.
    """
    rows = np.arange(sums.owner.size)
    aside: list[SetAside] = []
    while rows.size:
        system = _Rows.of(sums, shift, rows)
        while (found := system.free_unknowns(shift.root.size, last)) is not None:
            aside.append(SetAside(system.rows[found >= 0], found[found >= 0]))
            system = system.only(found < 0)
        if not system.rows.size:
            break
        if system.contradict():
            return None
        system = system.only(system.count() > 0)
        edges = system.joins()
        if edges is None:
            edges = _dense(system)
            if edges is None:
                return None
        joined, _ = shift.joined(edges)
        if joined is None:
            return None
        shift = joined
        rows = system.rows
    return SolvedSums(shift, tuple(aside))


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Equations over roots: ``sum of factors * x[unknowns] + constant = 0``; unknown 0 is none."""

    rows: Ids
    unknowns: Ids
    factors: F64
    constant: F64
    size: F64

    @classmethod
    def of(cls, sums: Sums, shift: Potentials, rows: Ids) -> _Rows:
        numbers, given = sums.numbers[rows], sums.factors[rows]
        there = numbers >= 0
        safe = np.where(there, numbers, 0)
        given = np.where(there, given, 0.0)
        unknowns, factors = shift.root[safe], given * shift.slope[safe]
        terms = np.column_stack([given * shift.offset[safe], sums.constant[rows]])
        for k in range(unknowns.shape[1]):  # an unknown that is in one equation twice
            for j in range(k):
                twice = (unknowns[:, j] == unknowns[:, k]) & (unknowns[:, k] > 0)
                total = factors[:, j] + factors[:, k]
                gone = np.abs(total) <= TOLERANCE * np.abs(factors[:, k])
                factors[:, j] = np.where(twice, np.where(gone, 0.0, total), factors[:, j])
                factors[:, k] = np.where(twice, 0.0, factors[:, k])
        unknowns = np.where(factors != 0, unknowns, 0)
        factors = np.where(unknowns > 0, factors, 0.0)
        return cls(rows, unknowns, factors, terms.sum(axis=1), np.abs(terms).sum(axis=1))

    def only(self, chosen: Mask) -> _Rows:
        return _Rows(*(getattr(self, name)[chosen] for name in self.__slots__))

    def count(self) -> Ids:
        """How many unknowns each equation has."""
        result: Ids = (self.unknowns > 0).sum(axis=1)
        return result

    def free_unknowns(self, total: int, last: Mask | None) -> Ids | None:
        """For each equation an unknown that only it has, or -1; None when none has one."""
        if not self.rows.size:
            return None
        uses = np.bincount(self.unknowns.ravel(), minlength=total)
        own = (uses[self.unknowns] == 1) & (self.unknowns > 0)
        if not own.any():
            return None
        rank = own.astype(np.int64)
        if last is not None:
            rank += own & ~last[self.unknowns]
        best = rank.argmax(axis=1)
        at = np.arange(self.rows.size)
        return np.where(own.any(axis=1), self.unknowns[at, best], -1)

    def contradict(self) -> bool:
        """Whether an equation without unknowns is wrong."""
        wrong = np.abs(self.constant) > 64 * TOLERANCE * self.size
        return bool((wrong & (self.count() == 0)).any())

    def joins(self) -> Edges | None:
        """What equations with one or two unknowns say of them; None when there are none."""
        count = self.count()
        (few,) = np.nonzero(count <= 2)
        if not few.size:
            return None
        order = np.argsort(self.unknowns[few] == 0, axis=1, kind="stable")[:, :2]
        pair = np.take_along_axis(self.unknowns[few], order, axis=1)
        factor = np.take_along_axis(self.factors[few], order, axis=1)
        alone = count[few] == 1
        # f0 x0 + f1 x1 + c = 0; with one unknown, x1 is unknown 0, which is 0.
        source = np.where(alone, 0, pair[:, -1])
        slope = np.where(alone, 1.0, -factor[:, -1] / factor[:, 0])
        return Edges.of(source, pair[:, 0], slope, -self.constant[few] / factor[:, 0])


def _dense(system: _Rows) -> Edges | None:
    """All remaining equations as linear systems, one a channel: values of the unknowns, or None."""
    unknowns, local = np.unique(system.unknowns, return_inverse=True)
    local = _shaped(local, system.unknowns)
    values = np.zeros(unknowns.size)
    if system.constant.any():
        part, row, column = _parts(local, unknowns)
        parts, height, width = (int(ids.max()) + 1 for ids in (part, row, column))
        if parts * height * width > _LARGEST:
            return None
        matrix: NDArray[Any] = np.zeros((parts, height, width))
        right: NDArray[Any] = np.zeros((parts, height, 1))
        right[part, row, 0] = -system.constant
        for k in range(local.shape[1]):
            there = system.unknowns[:, k] > 0
            at = (part[there], row[there], column[local[there, k]])
            np.add.at(matrix, at, system.factors[there, k])
        solved: NDArray[Any] = np.matmul(np.linalg.pinv(matrix), right)
        owner = np.zeros(unknowns.size, np.int64)
        owner[local.ravel()] = np.repeat(part, local.shape[1])
        values = solved[owner, column, 0]
    values[unknowns == 0] = 0
    terms = system.factors * values[local]
    off = np.abs(terms.sum(axis=1) + system.constant)
    if (off > 64 * TOLERANCE * (np.abs(terms).sum(axis=1) + system.size)).any():
        return None
    there = unknowns > 0
    roots = unknowns[there]
    return Edges.of(np.zeros_like(roots), roots, 1.0, values[there])


def _shaped(ids: Ids, like: Ids) -> Ids:
    return ids.reshape(like.shape)


def _parts(local: Ids, unknowns: Ids) -> tuple[Ids, Ids, Ids]:
    """For each equation its part and its place there; for each unknown its place in its part."""
    first = np.take_along_axis(local, (unknowns[local] > 0).argmax(axis=1)[:, None], axis=1)
    real = unknowns[local] > 0
    edges = Edges.of(np.broadcast_to(first, local.shape)[real] + 1, local[real] + 1)
    joined = Potentials.settled(unknowns.size + 1, 0.0, edges)
    labels = joined.root[1:]
    _, part = np.unique(labels[first[:, 0]], return_inverse=True)
    return part, _places(part), _places(labels)


def _places(labels: Ids) -> Ids:
    """Of each entry, how many before it have its label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
    lengths = np.diff(np.r_[starts, labels.size])
    places = np.empty_like(order)
    places[order] = np.arange(labels.size) - np.repeat(starts, lengths)
    return places
