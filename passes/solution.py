"""Units in which a set of steps vanishes, or which of the equations they break.

    scale   s_y = a s_x          along the step; s = 1 where units are known; s > 0 before Relu
    shift   t_y = a t_x + b      along the step; t = 0 where it is known; one equation a sum

A solution only grows: `Solution.grown` adds steps to those that vanish already. It is kept in
classes of equal scale and classes of equal shift, each up to one free value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from bnfold.passes.constraints import Candidate, Constraints
from bnfold.passes.potentials import F64, Edges, Ids, Mask, Merge, Potentials
from bnfold.passes.shift_sums import sums_hold

# How far, in powers of 2, the scales of one class may lie apart.
_SPREAD = {"FLOAT": 64.0, "BFLOAT16": 64.0, "DOUBLE": 512.0, "FLOAT16": 16.0}


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
    reads its output reads its input.
    """

    candidate: Candidate
    backward: Ids
    forward: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Units in which the steps ``vanished`` are gone.

    By root of a scale class: ``sign`` that its value must have (0: either), ``low`` and ``high``
    powers of 2 of the scales in it, ``limit`` how far these may lie apart, ``whole`` whether it
    is still a class that only ties made, ``frozen`` whether it may not be joined any more.
    """

    constraints: Constraints
    scale: Potentials
    shift: Potentials
    sign: F64
    low: F64
    high: F64
    limit: F64
    whole: Mask
    frozen: Mask
    leaf_x: Mask
    leaf_y: Mask
    vanished: tuple[Candidate, ...] = ()
    patches: tuple[Patch, ...] = ()

    @classmethod
    def of(cls, constraints: Constraints) -> Solution:
        """Nothing vanished yet."""
        count = constraints.numbering.count
        scale, shift = Potentials.free(count, 1.0), Potentials.free(count, 0.0)
        scale = scale.after(scale.merge(constraints.scale))
        shift = shift.joined(constraints.shift)[0] or shift
        sign = np.zeros(count)
        sign[0] = 1
        for numbers, _ in constraints.positive:
            sign[scale.root[numbers]] = 1
        leaf_x, leaf_y = _leaves(constraints, scale)
        return cls(
            constraints, scale, shift, sign, np.zeros(count), np.zeros(count),
            _limits(constraints, scale), np.ones(count, bool), np.zeros(count, bool),
            leaf_x, leaf_y,
        )  # fmt: skip

    def hopeless(self, steps: Sequence[Candidate]) -> dict[int, Conflict]:
        """Steps that can't vanish whatever else does: their equations contradict what is known."""
        found: dict[int, Conflict] = {}
        for at, (kind, classes) in enumerate(
            ((Broken.SCALE, self.scale), (Broken.SHIFT, self.shift))
        ):
            edges = Edges.joined([_edges(step)[at] for step in steps])
            closed = classes.root[edges.source] == classes.root[edges.target]
            if kind is Broken.SHIFT:
                closed &= classes.root[edges.source] == 0
            known = classes.known
            wrong = classes.residual(edges, known) & closed
            for step in np.unique(edges.owner[wrong]):
                only = wrong & (edges.owner == step)
                found.setdefault(int(step), _blame(steps, edges, kind, only))
        return found

    def grown(self, steps: Sequence[Candidate]) -> Solution | Conflict:
        """The solution in which ``steps`` vanish too, or the first thing that they break."""
        patches = [self._patch(step) for step in steps if step.awkward.any()]
        for patch in patches:
            if isinstance(patch, Conflict):
                return patch
        edges = [_edges(step) for step in steps]
        scale = self._scales(steps, Edges.joined([e[0] for e in edges]))
        if isinstance(scale, Conflict):
            return scale
        shift = self._shifts(steps, Edges.joined([e[1] for e in edges]))
        if isinstance(shift, Conflict):
            return shift
        found = replace(
            scale, shift=shift, vanished=(*self.vanished, *steps),
            patches=(*self.patches, *(p for p in patches if isinstance(p, Patch))),
        )  # fmt: skip
        if not sums_hold(self.constraints.sums, shift):
            return Conflict(Broken.SUM, steps[0].step, 0)
        for patch in patches:
            assert isinstance(patch, Patch)
            found.frozen[found.scale.root[patch.candidate.x[patch.backward]]] = True
            found.frozen[found.scale.root[patch.candidate.y[patch.forward]]] = True
        return found

    # ---- scales ----

    def _scales(self, steps: Sequence[Candidate], edges: Edges) -> Solution | Conflict:
        ends = (self.scale.root[edges.source], self.scale.root[edges.target])
        held = (self.frozen[ends[0]] | self.frozen[ends[1]]) & (ends[0] != ends[1])
        if held.any():
            return _blame(steps, edges, Broken.ZERO, held)
        merge = self.scale.merge(edges)
        if merge.broken.any():
            return _blame(steps, edges, Broken.SCALE, merge.broken)
        sign, clash = self._signs(merge)
        if clash.any():
            return _blame(steps, edges, Broken.SIGN, clash[merge.source])
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

    def _shifts(self, steps: Sequence[Candidate], edges: Edges) -> Potentials | Conflict:
        shift, wrong = self.shift.joined(edges)
        return _blame(steps, edges, Broken.SHIFT, wrong) if shift is None else shift

    # ---- scales that can't be divided by ----

    def _patch(self, step: Candidate) -> Patch | Conflict:
        """Which way each awkward channel goes: only where nobody else is met on that side."""
        (at,) = np.nonzero(step.awkward)
        x, y = self.scale.root[step.x[at]], self.scale.root[step.y[at]]
        backward = self.leaf_x[x] & self.whole[x] & ~self.frozen[x] & (x != y)
        loose = self.shift.root[step.y[at]] != 0
        forward = self.leaf_y[y] & self.whole[y] & ~self.frozen[y] & loose & (x != y)
        lost = ~(backward | forward)
        if lost.any():
            return Conflict(Broken.ZERO, step.step, int(at[np.argmax(lost)]))
        return Patch(step, at[backward], at[~backward])


def _edges(step: Candidate) -> tuple[Edges, Edges]:
    """The equations of a step on the channels on which they can be solved for either side."""
    plain = ~step.awkward
    x, y, a, b = step.x[plain], step.y[plain], step.a[plain], step.b[plain]
    return Edges.of(x, y, a, 0.0, step.step), Edges.of(x, y, a, b, step.step)


def _blame(steps: Sequence[Candidate], edges: Edges, kind: Broken, wrong: Mask) -> Conflict:
    at = int(np.argmax(wrong))
    step = next(s for s in steps if s.step == edges.owner[at])
    before = np.flatnonzero(edges.owner == edges.owner[at])[0]
    return Conflict(kind, step.step, int(np.flatnonzero(~step.awkward)[at - before]))


def _leaves(constraints: Constraints, scale: Potentials) -> tuple[Mask, Mask]:
    """By root: classes that only one step reads, and classes that only one step writes."""
    count = scale.root.size
    reads, writes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for table, sides in ((reads, constraints.reads), (writes, constraints.writes)):
        for numbers in sides.values():
            np.add.at(table, scale.root[numbers], 1)
    stiff = np.zeros(count, bool)
    stiff[0] = True
    stiff[scale.root[constraints.stiff]] = True
    # A value may be read by an operator that asks nothing only if it is counted above.
    return (reads == 1) & ~stiff, (writes == 1) & ~stiff


def _limits(constraints: Constraints, scale: Potentials) -> F64:
    limit = np.full(scale.root.size, _SPREAD["DOUBLE"])
    for value in constraints.numbering.values:
        dtype = constraints.draft.values[value].dtype
        most = _SPREAD.get(dtype, _SPREAD["FLOAT16"])
        if most < _SPREAD["DOUBLE"]:
            np.minimum.at(limit, scale.root[constraints.numbering.of(value).ravel()], most)
    return limit
