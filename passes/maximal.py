"""v = s u + t: units for every tensor, so that as many steps as can be become u -> u.

Direct neighbours first, as at level "local": such folds ask nothing of anybody else, and an
ordinary network is done with them. For the steps that are left the units of all tensors that they
can reach are solved for together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, ChannelGraph, Form, Linear, Weight
from bnfold.passes.bases import ChannelUnits, choose_units
from bnfold.passes.classes import Channels
from bnfold.passes.constraints import Candidate, Constraints
from bnfold.passes.draft import Draft
from bnfold.passes.local import evaluated, fold_neighbours, kept_steps
from bnfold.passes.potentials import Ids
from bnfold.passes.search import Found, search
from bnfold.passes.solution import Solution
from bnfold.passes.witness import explain
from bnfold.planning import How, Kept, Plan, Stored, Units


def plan_max(
    graph: ChannelGraph, refused: Mapping[int, Kept] | None = None, *, unshare_bytes: int = 0
) -> Plan:
    """Decide every affine step of ``graph`` by the units of all tensors that it can reach.

    Args:
        graph: The facts, from a front end.
        refused: Steps that must stay, with the reason.
        unshare_bytes: How many bytes of weights that several operators share may be stored again,
            so that each of these can have its own.

    Returns:
        A plan in which every affine step is folded or kept with a reason.
    """
    draft = Draft(graph, refused or {})
    why = {index: r.kept(index) for index, r in fold_neighbours(draft).items()}
    units: Mapping[int, Units] = {}
    if any(True for _ in draft.steps()):
        outcome = _solve(draft, _to_clone(graph, unshare_bytes))
        why |= explain(outcome.channels.constraints, outcome.found, why)
        units = _Writer(draft, outcome.channels, outcome.found.solution).write()
    folds = (*draft.folds.values(), *evaluated(draft))
    return Plan("max", folds, kept_steps(draft, why), draft.absorptions, units)


def _to_clone(graph: ChannelGraph, budget: int) -> frozenset[str]:
    """The shared weights that fit into ``budget``, the smallest first."""
    shared: dict[str, tuple[int, Weight]] = {}
    for operator in graph.operators:
        if isinstance(operator, Linear) and operator.weight and len(operator.weight.readers) > 1:
            weight = operator.weight
            shared[weight.storage] = (weight.nbytes * (len(weight.readers) - 1), weight)
    chosen = []
    for cost, weight in sorted(shared.values(), key=lambda pair: pair[0]):
        budget -= cost
        if budget < 0:
            break
        chosen.append(weight.storage)
    return frozenset(chosen)


# ---- what may be gained by an Add ----


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    channels: Channels
    found: Found
    left: int

    @property
    def vanished(self) -> tuple[Candidate, ...]:
        return tuple(bond.candidate for bond in self.found.solution.vanished)


def _solve(draft: Draft, cloned: frozenset[str]) -> _Outcome:
    """The better of two: operators without a bias may gain an Add for one, or may not.

    Each Add has to be paid for by a step that vanishes and that did as much.
    """
    loose = _attempt(draft, cloned, strict=False)
    adds = _adds(loose)
    if not adds:
        return loose
    paid = _paid(loose, adds)
    strict = _attempt(draft, cloned, strict=True)
    made = sum(_bytes_of(loose, index) for index in adds)
    return loose if paid and loose.left + made <= strict.left else strict


def _attempt(draft: Draft, cloned: frozenset[str], *, strict: bool) -> _Outcome:
    """Solve; steps that can only stay as they are, and stay, are then taken to be fixed."""
    rigid: frozenset[int] = frozenset()
    while True:
        constraints = Constraints(draft, strict=strict, rigid=rigid, cloned=cloned)
        channels = Channels.of(constraints)
        found = search(channels.classes())
        gone = {bond.candidate.step for bond in found.solution.vanished}
        stay = [c for c in constraints.candidates if c.step not in gone]
        fixed = {c.step for c in stay if _inexpressible(draft, c.step)}
        if not fixed:
            left = sum(c.cost for c in stay)
            left += sum(constraints.cost_of(step) for step in rigid)
            return _Outcome(channels, found, left)
        rigid |= fixed


def _inexpressible(draft: Draft, index: int) -> bool:
    """Whether a step does a scale and a shift, but another one of that kind could not."""
    step = draft.operator(index)
    assert isinstance(step, Affine)
    taken = draft.step_map(index)
    return step.form is Form.EITHER and not (taken.is_scaling or taken.is_shifting)


def _adds(outcome: _Outcome) -> list[int]:
    """The operators that would gain an Add."""
    constraints = outcome.channels.constraints
    if not constraints.bare:
        return []
    units = choose_units(outcome.channels, outcome.found.solution)
    gained = []
    for index in constraints.bare:
        reads, writes = constraints.reads.get(index), constraints.writes.get(index)
        before = reads is not None and units.shift[reads].any()
        if before or (writes is not None and units.plus[writes].any()):
            gained.append(index)
    return gained


def _paid(outcome: _Outcome, adds: Iterable[int]) -> bool:
    """Whether for each Add a step vanishes that did a scale and a shift on as many bytes."""
    draft = outcome.channels.constraints.draft
    purses = sorted((c.cost for c in outcome.vanished if _does_both(draft, c)), reverse=True)
    prices = sorted((_bytes_of(outcome, index) for index in adds), reverse=True)
    enough = all(purse >= price for purse, price in zip(purses, prices, strict=False))
    return len(purses) >= len(prices) and enough


def _does_both(draft: Draft, candidate: Candidate) -> bool:
    taken = draft.step_map(candidate.step)
    return not (taken.is_scaling or taken.is_shifting)


def _bytes_of(outcome: _Outcome, index: int) -> int:
    constraints = outcome.channels.constraints
    return constraints.bytes_of(constraints.draft.output(index))


# ---- the plan ----


class _Writer:
    """Enters a solution into the draft: absorptions, folds, units."""

    def __init__(self, draft: Draft, channels: Channels, solution: Solution) -> None:
        self.draft = draft
        self.constraints = channels.constraints
        self.classes = solution.scale.root[channels.scale]
        self.units: ChannelUnits = choose_units(channels, solution)
        self.vanished = [bond.candidate for bond in solution.vanished]
        self.gone = {candidate.step for candidate in self.vanished}
        self.by_class: dict[int, dict[int, str]] = {}

    def write(self) -> Mapping[int, Units]:
        """Enter everything; returns the values that are stored in other units."""
        if not self.gone:
            return {}
        stored = self._stored()
        for index, numbers in self.constraints.reads.items():
            if index not in self.gone and isinstance(self.draft.operator(index), Linear):
                taken = AffineMap(self.units.scale[numbers], self.units.shift[numbers])
                self._absorb_input(index, numbers, taken)
        for index, numbers in self.constraints.writes.items():
            if index in self.gone:
                continue
            taken = AffineMap(self.units.into[numbers], self.units.plus[numbers])
            if isinstance(self.draft.operator(index), Affine):
                self._step(index)
            elif not taken.is_identity:
                self.draft.absorb_output(index, taken)
                self._note(index, numbers, "before")
        for candidate in sorted(self.vanished, key=lambda c: c.step):
            self._vanish(candidate, stored)
        return stored

    def _absorb_input(self, index: int, numbers: Ids, taken: AffineMap) -> None:
        if not taken.is_identity:
            self.draft.absorb_input(index, taken)
            self._note(index, numbers, "after")

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
            if taken.is_scaling:
                before = AffineMap.identity()
                after = AffineMap.scaling(units.scale[x] * units.into[y])
            else:
                before = AffineMap.identity()
                whole = after.after(taken.after(AffineMap(units.scale[x], units.shift[x])))
                after = AffineMap.shifting(whole.shift - taken.shift)
        if not before.is_identity:
            self.draft.absorb_input(index, before)
        if not after.is_identity:
            self.draft.absorb_output(index, after)
        if operator.axis is None and axis is not None:
            self.draft.widen(index, axis)
        self._note(index, x, "after")
        self._note(index, y, "before")

    def _note(self, index: int, numbers: Ids, side: str) -> None:
        for root in np.unique(self.classes[numbers]):
            self.by_class.setdefault(int(root), {})[index] = side

    # ---- folds ----

    def _vanish(self, candidate: Candidate, stored: Mapping[int, Units]) -> None:
        index = candidate.step
        before, after = self.draft.input(index), self.draft.output(index)
        named, renamed = self.draft.holds(before), self.draft.holds(after)
        keeps = Stored.BEFORE if named not in stored or renamed in stored else Stored.AFTER
        if after in self.draft.anchors:
            keeps = Stored.AFTER
        how, into = self._absorbers(candidate)
        self.draft.vanish(index, how, into, keeps)

    def _absorbers(self, candidate: Candidate) -> tuple[How, tuple[int, ...]]:
        """Who took over the units of the class that the step was in."""
        numbers = np.concatenate([candidate.x, candidate.y])
        sides: dict[int, str] = {}
        for root in np.unique(self.classes[numbers]):
            sides |= self.by_class.get(int(root), {})
        into = tuple(sorted(sides))
        if into and all(isinstance(self.draft.operator(index), Affine) for index in into):
            return How.MERGED, into
        kinds = set(sides.values())
        if len(kinds) == 1:
            return (How.BACKWARD if kinds == {"before"} else How.FORWARD), into
        return How.AROUND, into

    # ---- units ----

    def _stored(self) -> dict[int, Units]:
        numbering = self.constraints.numbering
        found = {}
        for value, axes in numbering.axes.items():
            numbers = numbering.of(value).ravel()
            taken = AffineMap(self.units.scale[numbers], self.units.shift[numbers])
            if not taken.is_identity:
                found[self.draft.holds(value)] = Units(axes, taken)
        return found
