"""v = s u + t: units for every tensor, so that as many steps as can be become u -> u.

Direct neighbours first, as at level "local": such folds ask nothing of anybody else, and an
ordinary network is done with them. For the steps that are left the units of all tensors that they
can reach are solved for together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from bnfold.passes.search import Found, Regions, search
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
    why = {index: r.kept(index) for index, r in fold_neighbours(draft, joining=False).items()}
    units: Mapping[int, Units] = draft.restored
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

    @property
    def vanished(self) -> tuple[Candidate, ...]:
        return tuple(bond.candidate for bond in self.found.solution.vanished)


def _solve(draft: Draft, cloned: frozenset[str]) -> _Outcome:
    """The best choice in which no operator gains an Add that is not paid for.

    Group by group: the steps that vanish have to do as much as the Adds, and to be worth them.
    """
    loose = _attempt(draft, cloned)
    adds = _adds(loose)
    if not adds:
        return loose
    bare = frozenset(loose.channels.constraints.bare)
    strict = _attempt(draft, cloned, bare)
    groups = _Accounts(loose, strict, adds)
    barred = frozenset(index for index in bare if not groups.even(index))
    if not barred:
        return loose
    mixed = _attempt(draft, cloned, barred) if barred != bare else strict
    return mixed if _Accounts(mixed, strict, _adds(mixed)).all_even() else strict


class _Accounts:
    """What each group of steps saves, and what its Adds cost."""

    def __init__(self, outcome: _Outcome, strict: _Outcome, adds: Sequence[int]) -> None:
        constraints = outcome.channels.constraints
        classes = outcome.found.solution.classes
        self._outcome = outcome
        self._regions = Regions.of(classes, classes.bonds)
        gone = {c.step for c in outcome.vanished}
        before = {c.step for c in strict.vanished}
        self.saved: Counter[int] = Counter()
        self.purses: dict[int, list[int]] = {}
        for bond, region in zip(classes.bonds, self._regions.steps, strict=True):
            step = bond.candidate
            self.saved[int(region)] += step.cost * ((step.step in gone) - (step.step in before))
            if step.step in gone and _does_both(constraints.draft, step):
                self.purses.setdefault(int(region), []).append(step.cost)
        self.prices: dict[int, list[int]] = {}
        for index in adds:
            self.prices.setdefault(self._region(index), []).append(_bytes_of(outcome, index))

    def _region(self, index: int) -> int:
        """The group that an operator's channels are in."""
        channels = self._outcome.channels
        constraints = channels.constraints
        for numbers in (constraints.writes.get(index), constraints.reads.get(index)):
            shifts = channels.shift[numbers] if numbers is not None else np.zeros(0, np.int64)
            if shifts.any():
                return int(self._regions.shifts[shifts[shifts != 0][0]])
        return -1

    def even(self, index: int) -> bool:
        """Whether the group around operator ``index`` pays for its Adds."""
        return self._pays(self._region(index))

    def all_even(self) -> bool:
        """Whether all groups do."""
        return all(self._pays(region) for region in self.prices)

    def _pays(self, region: int) -> bool:
        prices = sorted(self.prices.get(region, ()), reverse=True)
        purses = sorted(self.purses.get(region, ()), reverse=True)
        enough = all(purse >= price for purse, price in zip(purses, prices, strict=False))
        worth = not prices or self.saved[region] >= sum(prices)
        return len(purses) >= len(prices) and enough and worth


def _attempt(
    draft: Draft, cloned: frozenset[str], barred: frozenset[int] = frozenset()
) -> _Outcome:
    """Solve; steps that can only stay as they are, and stay, are then taken to be fixed."""
    rigid: frozenset[int] = frozenset()
    while True:
        constraints = Constraints(draft, barred=barred, rigid=rigid, cloned=cloned)
        channels = Channels.of(constraints)
        found = search(channels.classes())
        gone = {bond.candidate.step for bond in found.solution.vanished}
        stay = [c for c in constraints.candidates if c.step not in gone]
        fixed = {c.step for c in stay if _inexpressible(draft, c.step)}
        if not fixed:
            return _Outcome(channels, found)
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
        stored = self._stored()
        if not self.gone:
            return stored
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
        """All values that are in other units, those of folds between neighbours too."""
        numbering = self.constraints.numbering
        found = dict(self.draft.restored)
        for value, axes in numbering.axes.items():
            numbers = numbering.of(value).ravel()
            taken = AffineMap(self.units.scale[numbers], self.units.shift[numbers])
            if not taken.is_identity:
                held = self.draft.holds(value)
                units = Units(axes, taken)
                found[held] = units if held not in found else found[held].inside(axes, taken)
        return found
