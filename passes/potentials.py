"""x_q = a x_p + b over many pairs at once: unknowns that are known up to one free value a class.

    x_e = slope_e x_root(e) + offset_e

A weighted union-find over arrays. Unknown 0 is the one whose value is known: 1 for scales, 0 for
shifts; whatever joins its class is anchored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

TOLERANCE = 2.0**-40  # what sums and products of float64 along a path may be off
_NOISE = 2.0**-48  # of its terms, what a sum that is 0 may be off


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """``x[target] = slope * x[source] + offset``, entry by entry; slopes are not 0.

    ``owner`` is the operator that each of them stands for.
    """

    source: Ids
    target: Ids
    slope: F64
    offset: F64
    owner: Ids

    @classmethod
    def of(
        cls, source: Ids, target: Ids, slope: ArrayLike = 1.0, offset: ArrayLike = 0.0,
        owner: ArrayLike = -1,
    ) -> Edges:  # fmt: skip
        """Edges from arrays, or one number for all."""
        source, target = np.broadcast_arrays(source, target)
        shape = source.shape
        return cls(
            source, target,
            np.broadcast_to(np.asarray(slope, np.float64), shape),
            np.broadcast_to(np.asarray(offset, np.float64), shape),
            np.broadcast_to(np.asarray(owner, np.int64), shape),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Edges]) -> Edges:
        """All of them in one."""
        if not parts:
            return cls.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
        columns = ("source", "target", "slope", "offset", "owner")
        return cls(*(np.concatenate([getattr(p, c).ravel() for p in parts]) for c in columns))

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.source.size)


class EdgeList:
    """Edges being collected; most of them say that two unknowns are equal."""

    def __init__(self) -> None:
        self._ends: list[tuple[Ids, Ids]] = []
        self._owners: list[int] = []
        self._slopes: dict[int, ArrayLike] = {}

    def add(
        self, source: Ids, target: Ids, owner: int = -1, slope: ArrayLike | None = None
    ) -> None:
        """``x[target] = slope * x[source]``, or equal, for operator ``owner``."""
        if slope is not None:
            self._slopes[len(self._ends)] = slope
        self._ends.append((source.ravel(), target.ravel()))
        self._owners.append(owner)

    def edges(self) -> Edges:
        """All of them."""
        if not self._ends:
            return Edges.joined([])
        source, target = (np.concatenate(side) for side in zip(*self._ends, strict=True))
        lengths = [ends[0].size for ends in self._ends]
        starts = np.cumsum([0, *lengths])
        slope = np.ones(source.size)
        for at, stated in self._slopes.items():
            slope[starts[at] : starts[at + 1]] = stated
        owner = np.repeat(np.array(self._owners), lengths)
        return Edges(source, target, slope, np.zeros(source.size), owner)


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Classes that become one: root ``nodes[i]`` is ``slope[i] * x[root[i]] + offset[i]``.

    ``broken`` says which of the edges that made it do not hold then.
    """

    nodes: Ids
    root: Ids
    slope: F64
    offset: F64
    source: Ids
    broken: Mask


@dataclass(frozen=True, slots=True, eq=False)
class Potentials:
    """Every unknown relative to the root of its class.

    ``known`` is the value of unknown 0, which is the root of its class.
    """

    root: Ids
    slope: F64
    offset: F64
    known: float

    @classmethod
    def free(cls, count: int, known: float) -> Potentials:
        """``count`` unknowns of which nothing is known, but for the first."""
        return cls(np.arange(count), np.ones(count), np.zeros(count), known)

    @classmethod
    def settled(cls, count: int, known: float, edges: Edges) -> Potentials:
        """``count`` unknowns with ``edges``, which contradict neither each other nor what is known.

        Where two lines through one unknown meet in a point, that is its value.
        """
        ends = (edges.source, edges.target, edges.slope, edges.offset)
        found = cls(*_contract(count, *ends), known)
        if found.residual(edges, known).any():
            found = cls.free(count, known).joined(edges)[0] or found
        return found

    def merge(self, edges: Edges) -> Merge:
        """What the edges make of the classes, and which of them can't hold."""
        p, q = edges.source, edges.target
        ends = np.concatenate([self.root[p], self.root[q]])
        nodes, local = np.unique(ends, return_inverse=True)
        first, second = local[: p.size], local[p.size :]
        with np.errstate(all="ignore"):
            # Between roots: slope_q x_rq + offset_q = a (slope_p x_rp + offset_p) + b
            slope = edges.slope * self.slope[p] / self.slope[q]
            offset = _total(edges.slope * self.offset[p], edges.offset, -self.offset[q])
            offset = offset / self.slope[q]
            root, slopes, offsets = _contract(nodes.size, first, second, slope, offset)
        known = self.known if nodes.size and nodes[0] == 0 else None
        sizes = np.abs(edges.slope * self.offset[p]) + np.abs(edges.offset)
        sizes = (sizes + np.abs(self.offset[q])) / np.abs(self.slope[q])
        now = Potentials(root, slopes, offsets, 0.0)
        broken = now.residual(Edges.of(first, second, slope, offset), known, sizes)
        return Merge(nodes, nodes[root], slopes, offsets, first, broken)

    def residual(self, edges: Edges, known: float | None, sizes: F64 | float = 0.0) -> Mask:
        """Which edges do not hold, all their ends being in one class.

        Args:
            edges: The equations.
            known: The value of unknown 0, if it is the one that is known.
            sizes: Of the terms that were added up to the offsets of ``edges``.
        """
        p, q = edges.source, edges.target
        slope, moved = edges.slope * self.slope[p], edges.slope * self.offset[p]
        left, right = self.offset[q], moved + edges.offset
        anchored = (self.root[q] == 0) & (known is not None)
        at = 0.0 if known is None else known
        left = np.where(anchored, self.slope[q] * at + left, left)
        right = np.where(anchored, slope * at + right, right)
        off = _differ(left, right, np.abs(moved) + np.abs(edges.offset) + sizes)
        off |= ~anchored & _differ(self.slope[q], slope, 0.0)
        return off

    def after(self, merge: Merge) -> Potentials:
        """The same unknowns in the classes that ``merge`` leaves."""
        count = self.root.size
        root, slope, offset = np.arange(count), np.ones(count), np.zeros(count)
        root[merge.nodes], slope[merge.nodes] = merge.root, merge.slope
        offset[merge.nodes] = merge.offset
        was = self.root
        return Potentials(
            root[was],
            self.slope * slope[was],
            _total(self.slope * offset[was], self.offset),
            self.known,
        )

    def joined(self, edges: Edges) -> tuple[Potentials | None, Mask]:
        """The unknowns with ``edges`` holding, and which of these can't hold.

        Two different lines through one unknown meet in one point, which is its value.
        """
        merge = self.merge(edges)
        found, broken = self, merge.broken
        while broken.any():
            found = found.after(found.merge(edges))
            points = found._meeting(edges, broken)
            if not points.size:
                return None, broken
            found = found.after(found.merge(points))
            merge = found.merge(edges)
            broken = merge.broken
        return found.after(merge), broken

    def _meeting(self, edges: Edges, wrong: Mask) -> Edges:
        p, q, factor = edges.source[wrong], edges.target[wrong], edges.slope[wrong]
        slope = self.slope[q] - factor * self.slope[p]
        rest = factor * self.offset[p] + edges.offset[wrong] - self.offset[q]
        size = np.abs(self.slope[q]) + np.abs(factor * self.slope[p])
        meets = (self.root[q] != 0) & (np.abs(slope) > TOLERANCE * size)
        roots, first = np.unique(self.root[q][meets], return_index=True)
        return Edges.of(np.zeros_like(roots), roots, 1.0, (rest[meets] / slope[meets])[first])


def _total(*terms: F64) -> F64:
    """The sum of ``terms``; 0 where nothing but rounding is left of them."""
    total = np.asarray(sum(terms))
    noise = np.abs(total) <= _NOISE * sum(np.abs(term) for term in terms)
    result: F64 = np.where(noise, 0.0, total)
    return result


def _differ(left: F64, right: F64, terms: F64 | float) -> Mask:
    size = np.maximum(np.maximum(np.abs(left), np.abs(right)), terms)
    result: Mask = ~(np.abs(left - right) <= TOLERANCE * size)
    return result


def _contract(count: int, p: Ids, q: Ids, slope: F64, offset: F64) -> tuple[Ids, F64, F64]:
    """Join nodes along the edges ``x_q = slope x_p + offset``; the smallest is the root.

    Each round every root that has an edge to a smaller one is hung below it.
    """
    root: Ids = np.arange(count)
    slopes, offsets = np.ones(count), np.zeros(count)
    if (slope == 1).all() and not offset.any():
        return _equated(root, p, q), slopes, offsets
    while True:
        rp, rq = root[p], root[q]
        (open_,) = np.nonzero(rp != rq)
        if not open_.size:
            return root, slopes, offsets
        p, q, rp, rq = p[open_], q[open_], rp[open_], rq[open_]
        slope, offset = slope[open_], offset[open_]
        # x_rq = k x_rp + m
        k = slope * slopes[p] / slopes[q]
        m = _total(slope * offsets[p], offset, -offsets[q]) / slopes[q]
        down = rp < rq
        high, low = np.where(down, rq, rp), np.where(down, rp, rq)
        high, chosen = np.unique(high, return_index=True)
        k, m, down = k[chosen], m[chosen], down[chosen]
        root[high] = low[chosen]
        slopes[high], offsets[high] = np.where(down, k, 1 / k), np.where(down, m, -m / k)
        _flatten(root, slopes, offsets)


def _equated(root: Ids, p: Ids, q: Ids) -> Ids:
    """The same along edges that only say that two unknowns are equal."""
    while True:
        rp, rq = root[p], root[q]
        (open_,) = np.nonzero(rp != rq)
        if not open_.size:
            return root
        p, q, rp, rq = p[open_], q[open_], rp[open_], rq[open_]
        np.minimum.at(root, np.maximum(rp, rq), np.minimum(rp, rq))
        while not np.array_equal(above := root[root], root):
            root = above


def _flatten(root: Ids, slopes: F64, offsets: F64) -> None:
    """Let every node point at the root of its class."""
    while True:
        above = root[root]
        if np.array_equal(above, root):
            return
        offsets[:] = _total(offsets, slopes * offsets[root])
        slopes *= slopes[root]
        root[:] = above
