"""v = s u + t: units for every tensor, so that as many steps as can be become u -> u.

Direct neighbours first, as at level "local": such folds ask nothing of anybody else, and an
ordinary network is done with them. For the steps that are left the units of all tensors that they
can reach are solved for together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, Anchor, ChannelGraph, Form, Linear, ValueId, Weight
from bnfold.passes.bases import ChannelUnits, choose_units
from bnfold.passes.classes import Channels
from bnfold.passes.constraints import Candidate, Constraints
from bnfold.passes.draft import Draft
from bnfold.passes.local import evaluated, fold_neighbours, kept_steps
from bnfold.passes.potentials import Ids
from bnfold.passes.search import Found, Regions, search
from bnfold.passes.solution import Solution
from bnfold.passes.witness import explain
from bnfold.planning import How, Kept, Plan, Reason, Stored, Units


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
        why |= outcome.held
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
    held: Mapping[int, Kept]

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
        self.purses: dict[int, list[_Size]] = {}
        for bond, region in zip(classes.bonds, self._regions.steps, strict=True):
            step = bond.candidate
            self.saved[int(region)] += step.cost * ((step.step in gone) - (step.step in before))
            if step.step in gone and _does_both(constraints.draft, step):
                after = constraints.draft.output(step.step)
                self.purses.setdefault(int(region), []).append(_Size.of(constraints, after))
        self.prices: dict[int, list[_Size]] = {}
        for index in adds:
            made = _Size.of(constraints, constraints.draft.output(index))
            self.prices.setdefault(self._region(index), []).append(made)

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
        prices = sorted(self.prices.get(region, ()), key=lambda p: -p.known)
        purses = sorted(self.purses.get(region, ()), key=lambda p: -p.known)
        if len(purses) < len(prices):
            return False
        pairs = list(zip(purses, prices, strict=False))
        if any(purse.whole and price.whole and purse.known < price.known for purse, price in pairs):
            return False
        unsure = any(not size.whole for size in (*purses, *prices))
        return unsure or self.saved[region] >= sum(price.known for price in prices)


@dataclass(frozen=True, slots=True)
class _Size:
    """The bytes of a value as far as its dimensions are ``known``; all of them if ``whole``."""

    known: int
    whole: bool

    @classmethod
    def of(cls, constraints: Constraints, value: ValueId) -> _Size:
        shape = constraints.draft.values[value].shape
        whole = shape is not None and all(isinstance(dim, int) for dim in shape)
        return cls(constraints.bytes_of(value), whole)


def _attempt(
    draft: Draft, cloned: frozenset[str], barred: frozenset[int] = frozenset()
) -> _Outcome:
    """Solve, and again with what turns out to have to stay.

    A step that can only stay as it is, and stays, can't take over units; and of a chain of steps
    between two tensors that others know by name, one has to stay.
    """
    rigid: set[int] = set()
    narrowed: set[int] = set()
    held: dict[int, Kept] = {}
    while True:
        constraints = Constraints(
            draft, barred=barred, rigid=rigid, held=held, narrowed=narrowed, cloned=cloned
        )
        channels = Channels.of(constraints)
        found = search(channels.classes())
        gone = {bond.candidate.step for bond in found.solution.vanished}
        fixed = {
            c.step for c in constraints.candidates
            if c.step not in gone and _inexpressible(draft, c.step)
        }  # fmt: skip
        named = {kept.step: kept for kept in _between_names(draft, gone)}
        wide = {i for i in _too_wide(channels, found, gone) if i not in narrowed}
        if not fixed and not named and not wide:
            return _Outcome(channels, found, held)
        rigid |= fixed
        held |= named
        narrowed |= wide


def _too_wide(channels: Channels, found: Found, gone: set[int]) -> Iterator[int]:
    """Steps that stay where the units around them vary along an axis that is not theirs."""
    constraints = channels.constraints
    asked = [
        index for index in constraints.reads
        if index not in gone and isinstance(constraints.draft.operator(index), Affine)
        and set(constraints.numbering.axes[constraints.draft.input(index)])
        - {constraints.own_axis(index)}
    ]  # fmt: skip
    if not asked:
        return
    units = choose_units(channels, found.solution)
    for index in asked:
        ends = (constraints.draft.input(index), constraints.draft.output(index))
        pairs = [constraints.numbering.beside(v, constraints.own_axis(index)) for v in ends]
        columns = (units.scale, units.shift, units.into, units.plus)
        if any((column[one] != column[two]).any() for one, two in pairs for column in columns):
            yield index


def _between_names(draft: Draft, gone: set[int]) -> Iterator[Kept]:
    """Steps whose input and output would be one tensor under two names of the graph's boundary."""
    tensor: dict[ValueId, ValueId] = {}
    names = {v: a for v, a in draft.anchors.items() if a is not Anchor.CAPTURED}
    for index in sorted(gone):
        before, after = draft.input(index), draft.output(index)
        first = tensor.get(before, before)
        if first in names and after in names:
            name = f"'{draft.values[first].name}'"
            yield Kept(index, Reason.GRAPH_BOUNDARY, (name,), f"which {names[first].value}")
            continue
        tensor[after] = first
        if after in names:
            names[first] = names[after]


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
        self.absorbers: list[tuple[int, Ids, bool]] = []

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
                self.absorbers.append((index, numbers, True))
        nearest = self._nearest()
        for candidate in sorted(self.vanished, key=lambda c: c.step):
            self._vanish(candidate, stored, nearest.get(candidate.step, {}))
        return stored

    def _absorb_input(self, index: int, numbers: Ids, taken: AffineMap) -> None:
        if not taken.is_identity:
            self.draft.absorb_input(index, taken)
            self.absorbers.append((index, numbers, False))

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
            for row in np.unique(np.stack([step, operator, side]), axis=1).T.tolist():
                found.setdefault(row[0], {}).setdefault(row[1], set()).add(bool(row[2]))
        return found

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
