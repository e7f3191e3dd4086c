"""Add(MatMul(x, W), c): an operator without a bias may gain an Add, if a step pays for it.

A fold that would leave an Add behind is no fold; but where a BatchNorm vanishes, which did a scale
and a shift on as many elements, an Add in its place is one that was there before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.channel_graph import ValueId
from bnfold.passes.attempts import Outcome, attempt
from bnfold.passes.constraints import Candidate, Constraints
from bnfold.passes.draft import Draft
from bnfold.passes.search import Regions


def solve(draft: Draft, cloned: frozenset[str]) -> Outcome:
    """The best choice in which no operator gains an Add that is not paid for.

    Group by group: the steps that vanish have to do as much as the Adds, and to be worth them.
    """
    loose = attempt(draft, cloned)
    adds = _adds(loose)
    if not adds:
        return loose
    bare = frozenset(loose.channels.constraints.bare)
    strict = attempt(draft, cloned, bare)
    groups = _Accounts(loose, strict, adds)
    barred = frozenset(index for index in bare if not groups.even(index))
    if not barred:
        return loose
    mixed = attempt(draft, cloned, barred) if barred != bare else strict
    return mixed if _Accounts(mixed, strict, _adds(mixed)).all_even() else strict


class _Accounts:
    """What each group of steps saves, and what its Adds cost."""

    def __init__(self, outcome: Outcome, strict: Outcome, adds: Sequence[int]) -> None:
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


def _adds(outcome: Outcome) -> list[int]:
    """The operators that would gain an Add."""
    constraints = outcome.channels.constraints
    if not constraints.bare:
        return []
    units = outcome.units
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
