"""Units in which a set of steps vanishes, or which of the equations they break.

    scale   s_y = a s_x          along the step; s = 1 where units are known; s > 0 before Relu
    shift   t_y = a t_x + b      along the step; t = 0 where it is known; one equation a sum

A solution only grows: `Solution.grown` adds steps to those that vanish already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from bnfold.passes.classes import Bond, Classes
from bnfold.passes.potentials import F64, Edges, Ids, Mask, Merge, Potentials
from bnfold.passes.shift_sums import sums_hold


class Broken(Enum):
    """What a set of steps can't have."""

    SCALE = "scale"
    SIGN = "sign"
    ZERO = "zero"
    RANGE = "range"
    SHIFT = "shift"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class Conflict:
    """Step ``step`` can't vanish as well, because of its ``entry``-th channel if that is known."""

    kind: Broken
    step: int
    entry: int


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Channels of a step that only one direction can carry, because they can't be divided by.

    ``backward``: whoever writes the step's input writes its output instead. Otherwise, whoever
    reads its output reads its input. Both are places among the awkward channels of ``bond``.
    """

    bond: Bond
    backward: Ids
    forward: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Units in which the steps ``vanished`` are gone.

    By root of a scale class: ``sign`` that its value must have (0: either), ``low`` and ``high``
    powers of 2 of the scales in it, ``limit`` how far these may lie apart, ``whole`` whether it
    is still a class that only ties made, ``frozen`` whether it may not be joined any more.
    """

    classes: Classes
    scale: Potentials
    shift: Potentials
    sign: F64
    low: F64
    high: F64
    limit: F64
    whole: Mask
    frozen: Mask
    vanished: tuple[Bond, ...] = ()
    patches: tuple[Patch, ...] = ()

    @classmethod
    def of(cls, classes: Classes) -> Solution:
        """Nothing vanished yet."""
        count = classes.scales
        return cls(
            classes, Potentials.free(count, 1.0), Potentials.free(classes.shifts, 0.0),
            classes.sign, np.zeros(count), np.zeros(count), classes.limit,
            np.ones(count, bool), np.zeros(count, bool),
        )  # fmt: skip

    def grown(self, steps: Sequence[Bond]) -> Solution | Conflict:
        """The solution in which ``steps`` vanish too, or the first thing that they break."""
        patches: list[Patch] = []
        for step in steps:
            patch = self._patch(step) if step.awkward.size else None
            if isinstance(patch, Conflict):
                return patch
            patches += [] if patch is None else [patch]
        scale = self._scales(steps, Edges.joined([step.scale for step in steps]))
        if isinstance(scale, Conflict):
            return scale
        shift = self._shifts(steps, Edges.joined([step.shift for step in steps]))
        if isinstance(shift, Conflict):
            return shift
        if not sums_hold(self.classes.sums, shift):
            return Conflict(Broken.SUM, steps[0].candidate.step, 0)
        for patch in patches:
            scale.frozen[scale.scale.root[patch.bond.x[patch.backward]]] = True
            scale.frozen[scale.scale.root[patch.bond.y[patch.forward]]] = True
        return replace(
            scale, shift=shift, vanished=(*self.vanished, *steps),
            patches=(*self.patches, *patches),
        )  # fmt: skip

    def hopeless(self) -> dict[int, Conflict]:
        """Steps that can't vanish whatever else does: they contradict what is known."""
        found: dict[int, Conflict] = {}
        steps = self.classes.bonds
        starts = np.cumsum([0, *(step.at.size for step in steps)])
        owner = np.repeat(np.arange(len(steps)), np.diff(starts))
        for kind, classes, edges in (
            (Broken.SCALE, self.scale, Edges.joined([step.scale for step in steps])),
            (Broken.SHIFT, self.shift, Edges.joined([step.shift for step in steps])),
        ):
            closed = edges.source == edges.target
            closed &= (kind is Broken.SCALE) | (edges.source == 0)
            (wrong,) = np.nonzero(classes.residual(edges, classes.known) & closed)
            for at in wrong[np.unique(owner[wrong], return_index=True)[1]].tolist():
                bond = steps[owner[at]]
                entry = int(bond.at[at - starts[owner[at]]])
                step = bond.candidate.step
                found.setdefault(step, Conflict(kind, step, entry))
        return found

    # ---- scales ----

    def _scales(self, steps: Sequence[Bond], edges: Edges) -> Solution | Conflict:
        ends = (self.scale.root[edges.source], self.scale.root[edges.target])
        held = (self.frozen[ends[0]] | self.frozen[ends[1]]) & (ends[0] != ends[1])
        if held.any():
            return _blame(steps, edges, Broken.ZERO, held)
        merge = self.scale.merge(edges)
        if merge.broken.any():
            return _blame(steps, edges, Broken.SCALE, merge.broken)
        sign, clash = self._signs(merge)
        if clash.any():
            return _blame(steps, edges, Broken.SIGN, self._turned(merge, clash, edges))
        low, high, limit = self._ranges(merge)
        spread = np.where(merge.root == 0, 2 * np.maximum(high, -low), high - low)
        if (spread > limit).any():
            return _blame(steps, edges, Broken.RANGE, (spread > limit)[merge.source])
        found = replace(
            self, scale=self.scale.after(merge), sign=self.sign.copy(), low=self.low.copy(),
            high=self.high.copy(), limit=self.limit.copy(), whole=self.whole.copy(),
            frozen=self.frozen.copy(),
        )  # fmt: skip
        found.sign[merge.root], found.limit[merge.root] = sign, limit
        found.low[merge.root], found.high[merge.root] = low, high
        joined = merge.root != merge.nodes
        found.whole[merge.nodes[joined]] = found.whole[merge.root[joined]] = False
        return found

    def _signs(self, merge: Merge) -> tuple[F64, Mask]:
        """For each node, the sign that its root has to have, and whether it would need both."""
        wanted = self.sign[merge.nodes] * np.sign(merge.slope)
        roots = np.searchsorted(merge.nodes, merge.root)
        most, least = np.zeros(roots.size), np.zeros(roots.size)
        np.maximum.at(most, roots, wanted)
        np.minimum.at(least, roots, wanted)
        return (most + least)[roots], ((most > 0) & (least < 0))[roots]

    def _turned(self, merge: Merge, clash: Mask, edges: Edges) -> Mask:
        """The edges with a negative scale among those that lead to a clash of signs."""
        met = clash[merge.source]
        negative = met & (edges.slope < 0)
        return negative if negative.any() else met

    def _ranges(self, merge: Merge) -> tuple[F64, F64, F64]:
        """For each node, the least and largest power of 2 in its new class, and the limit there."""
        with np.errstate(all="ignore"):
            moved = np.nan_to_num(np.log2(np.abs(merge.slope)), nan=np.inf)
        roots = np.searchsorted(merge.nodes, merge.root)
        low, high = np.full(roots.size, np.inf), np.full(roots.size, -np.inf)
        limit = np.full(roots.size, np.inf)
        np.minimum.at(low, roots, self.low[merge.nodes] + moved)
        np.maximum.at(high, roots, self.high[merge.nodes] + moved)
        np.minimum.at(limit, roots, self.limit[merge.nodes])
        return low[roots], high[roots], limit[roots]

    # ---- shifts ----

    def _shifts(self, steps: Sequence[Bond], edges: Edges) -> Potentials | Conflict:
        shift, wrong = self.shift.joined(edges)
        return _blame(steps, edges, Broken.SHIFT, wrong) if shift is None else shift

    # ---- scales that can't be divided by ----

    def _patch(self, step: Bond) -> Patch | Conflict:
        """Which way each awkward channel goes: only where nobody else is met on that side."""
        x, y, classes = self.scale.root[step.x], self.scale.root[step.y], self.classes
        apart = x != y
        backward = classes.leaf_x[x] & self.whole[x] & ~self.frozen[x] & apart
        backward &= self.shift.root[step.x_shift] != 0
        forward = classes.leaf_y[y] & self.whole[y] & ~self.frozen[y] & apart
        a, b = step.candidate.a[step.awkward], step.candidate.b[step.awkward]
        forward &= (self.shift.root[step.y_shift] != 0) | ((a == 0) & (b == 0))
        lost = ~(backward | forward)
        if lost.any():
            entry = int(step.awkward[np.argmax(lost)])
            return Conflict(Broken.ZERO, step.candidate.step, entry)
        return Patch(step, np.flatnonzero(backward), np.flatnonzero(~backward))


def _blame(steps: Sequence[Bond], edges: Edges, kind: Broken, wrong: Mask) -> Conflict:
    at = int(np.argmax(wrong))
    step = next(s for s in steps if s.candidate.step == edges.owner[at])
    first = int(np.argmax(edges.owner == edges.owner[at]))
    return Conflict(kind, step.candidate.step, int(step.at[at - first]))
