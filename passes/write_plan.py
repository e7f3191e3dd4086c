"""A choice of units, entered into the plan: who absorbs what, what vanishes, who is stored how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, Anchor, Form, Linear
from bnfold.passes.attempts import Outcome
from bnfold.passes.constraints import Candidate
from bnfold.passes.draft import Draft
from bnfold.passes.potentials import Edges, Ids, Potentials
from bnfold.planning import How, Stored, Units


def write_plan(draft: Draft, outcome: Outcome) -> Mapping[int, Units]:
    """Enter ``outcome`` into ``draft``; returns the values that are stored in other units."""
    return _Writer(draft, outcome).write()


def _connected(outcome: Outcome) -> Ids:
    """By channel, a number that all channels have in common that are tied or made one."""
    constraints = outcome.channels.constraints
    tied = constraints.scale.source != 0
    edges = [Edges.of(constraints.scale.source[tied], constraints.scale.target[tied])]
    edges += [Edges.of(step.x, step.y) for step in outcome.vanished]
    return Potentials.settled(constraints.numbering.count, 0.0, Edges.joined(edges)).root


class _Writer:
    def __init__(self, draft: Draft, outcome: Outcome) -> None:
        self.draft = draft
        self.constraints = outcome.channels.constraints
        self.units = outcome.units
        self.vanished = outcome.vanished
        self.classes = _connected(outcome)
        self.gone = {candidate.step for candidate in self.vanished}
        self.absorbers: list[tuple[int, Ids, bool]] = []

    def write(self) -> Mapping[int, Units]:
        stored = self._stored()
        if not self.gone:
            return stored
        for index, numbers in self.constraints.reads.items():
            if index not in self.gone and isinstance(self.draft.operator(index), Linear):
                taken = AffineMap(self.units.scale[numbers], self.units.shift[numbers])
                if not taken.is_identity:
                    self.draft.absorb_input(index, taken)
                    self.absorbers.append((index, numbers, False))
        for index, numbers in (*self.constraints.writes.items(), *self.constraints.fills.items()):
            if index in self.gone:
                continue
            taken = AffineMap(self.units.into[numbers], self.units.plus[numbers])
            if isinstance(self.draft.operator(index), Affine):
                self._step(index)
            elif not taken.is_identity:
                self.draft.absorb_output(index, taken)
                self.absorbers.append((index, numbers, True))
        nearest = self._nearest()
        for candidate in sorted(self.vanished, key=lambda c: c.step):
            self._vanish(candidate, stored, nearest.get(candidate.step, {}))
        return stored

    def _step(self, index: int) -> None:
        """A step that stays takes over the units on both sides of it."""
        operator = self.draft.operator(index)
        assert isinstance(operator, Affine)
        axis, x, y = self.constraints.sides(index)
        units = self.units
        before = AffineMap(units.scale[x], units.shift[x])
        after = AffineMap(units.into[y], units.plus[y])
        if before.is_identity and after.is_identity:
            return
        taken = self.draft.step_map(index)
        if operator.form is Form.EITHER:
            # Written so that what is to be 0 or 1 is exactly that.
            if taken.is_shifting:
                whole = after.after(taken.after(before))
                after = AffineMap.shifting(whole.shift - taken.shift)
            else:
                after = AffineMap.scaling(units.scale[x] * units.into[y])
            before = AffineMap.identity()
        if not before.is_identity:
            self.draft.absorb_input(index, before)
        if not after.is_identity:
            self.draft.absorb_output(index, after)
        if operator.axis is None and axis is not None:
            self.draft.widen(index, axis)
        self.absorbers += [(index, x, False), (index, y, True)]

    # ---- folds ----

    def _vanish(
        self, candidate: Candidate, stored: Mapping[int, Units], near: Mapping[int, set[bool]]
    ) -> None:
        index = candidate.step
        before, after = self.draft.input(index), self.draft.output(index)
        named, renamed = self.draft.holds(before), self.draft.holds(after)
        keeps = Stored.BEFORE if named not in stored or renamed in stored else Stored.AFTER
        anchors = self.draft.anchors
        if before in anchors or after in anchors:  # the name that others know stays
            stays = before in anchors and anchors.get(after) is not Anchor.OUTPUT
            keeps = Stored.BEFORE if stays else Stored.AFTER
        into = tuple(sorted(near))
        self.draft.vanish(index, self._how(near), into, keeps)

    def _how(self, near: Mapping[int, set[bool]]) -> How:
        if not near:
            return How.IDENTITY
        if all(isinstance(self.draft.operator(index), Affine) for index in near):
            return How.MERGED
        sides = set().union(*near.values())
        if len(sides) == 2:
            return How.AROUND
        return How.BACKWARD if True in sides else How.FORWARD

    def _nearest(self) -> dict[int, dict[int, set[bool]]]:
        """For each step, those that took over its units, and whether they write them.

        In a class of many steps and many operators, each goes to those nearest to it.
        """
        found: dict[int, dict[int, set[bool]]] = {}
        if not self.absorbers:
            return found
        taken = _Places.of((i, self.classes[n], side) for i, n, side in self.absorbers)
        steps = _Places.of(
            (c.step, np.concatenate([self.classes[c.x], self.classes[c.y]]), False)
            for c in self.vanished
        )
        for here, there in ((taken, steps), (steps, taken)):
            mine, theirs = here.nearest(there)
            pairs = (here.index[mine], there.index[theirs])
            step, operator = pairs if here is steps else pairs[::-1]
            side = taken.side[theirs if here is steps else mine]
            stride = 1 + int(operator.max(initial=0))
            for key in np.unique((step * stride + operator) * 2 + side).tolist():
                taker = found.setdefault(key // 2 // stride, {})
                taker.setdefault(key // 2 % stride, set()).add(bool(key % 2))
        return found

    # ---- units ----

    def _stored(self) -> dict[int, Units]:
        """All values that are in other units, those of folds between neighbours too."""
        numbering = self.constraints.numbering
        found = dict(self.draft.restored)
        changed = (self.units.scale != 1) | (self.units.shift != 0)
        before = np.cumsum(np.r_[0, changed])
        for value, axes in numbering.axes.items():
            start = numbering.start[value]
            end = start + prod(numbering.sizes[value])
            if before[end] > before[start]:
                taken = AffineMap(self.units.scale[start:end], self.units.shift[start:end])
                held = self.draft.holds(value)
                units = Units(axes, taken)
                found[held] = units if held not in found else found[held].inside(axes, taken)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """In which classes operators are: entry by entry, sorted by class, then by operator."""

    root: Ids
    index: Ids
    side: Ids

    @classmethod
    def of(cls, entries: Iterable[tuple[int, Ids, bool]]) -> _Places:
        listed = list(entries)
        root = np.concatenate([roots for _, roots, _ in listed])
        lengths = [roots.size for _, roots, _ in listed]
        index = np.repeat(np.array([i for i, _, _ in listed]), lengths)
        side = np.repeat(np.array([int(side) for _, _, side in listed]), lengths)
        order = np.lexsort((side, index, root))
        root, index, side = root[order], index[order], side[order]
        fresh = np.r_[True, (np.diff(root) != 0) | (np.diff(index) != 0) | (np.diff(side) != 0)]
        return cls(root[fresh], index[fresh], side[fresh])

    def nearest(self, others: _Places) -> tuple[Ids, Ids]:
        """Entries, and for each the entry of ``others`` in its class that is nearest by number."""
        stride = 1 + max(int(self.index.max()), int(others.index.max()))
        keys, wanted = others.root * stride + others.index, self.root * stride + self.index
        above = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
        below = np.maximum(above - 1, 0)
        far = [
            np.where(others.root[at] == self.root, np.abs(others.index[at] - self.index), stride)
            for at in (below, above)
        ]
        best, distance = np.where(far[0] <= far[1], below, above), np.minimum(*far)
        return np.flatnonzero(distance < stride), best[distance < stride]
