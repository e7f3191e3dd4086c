"""Add(MatMul(x, W), c): an operator without a bias may gain an Add, if a step pays for it.

A fold that would leave an Add behind is no fold; but where a BatchNorm vanishes, which did a scale
and a shift on as many elements, an Add in its place is one that was there before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.channel_graph import Affine, Route, Tie, ValueId
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


_FAR = 32  # values that are looked at for one that says how large it is


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
            size = _Size.of(constraints, constraints.draft.output(step.step))
            self.saved[int(region)] += size.known * ((step.step in gone) - (step.step in before))
            if step.step in gone and _does_both(constraints.draft, step):
                self.purses.setdefault(int(region), []).append(size)
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
        prices = sorted(self.prices.get(region, ()), key=lambda price: -price.known)
        purses = sorted(self.purses.get(region, ()), key=lambda purse: -purse.known)
        pairs = zip(purses, prices, strict=False)
        enough = len(purses) >= len(prices) and all(purse.covers(price) for purse, price in pairs)
        return enough and self.saved[region] >= sum(price.known for price in prices)


@dataclass(frozen=True, slots=True)
class _Size:
    """The bytes of a value: a number times symbols, in all the ways in which they are stated.

    Of the value itself, and of others that have as many elements: one of two reshaped tensors may
    have a size that the other does not say. Nothing is stated where a dimension is unknown.
    """

    ways: tuple[tuple[int, Counter[str]], ...]

    @property
    def known(self) -> int:
        """The largest of the numbers."""
        return max((number for number, _ in self.ways), default=0)

    @classmethod
    def of(cls, constraints: Constraints, value: ValueId) -> _Size:
        draft, ways = constraints.draft, []
        queue = [value]
        for near in queue:
            shape = draft.values[near].shape
            if shape is not None and None not in shape:
                symbols = Counter(dim for dim in shape if isinstance(dim, str))
                ways.append((constraints.bytes_of(near), symbols))
            beyond = [v for index in draft.touching(near) for v in _as_many(draft, index)]
            fresh = [v for v in dict.fromkeys(beyond) if v not in queue]
            queue += fresh[: max(0, _FAR - len(queue))]
        return cls(tuple(ways))

    def covers(self, other: _Size) -> bool:
        """Whether it is at least as large as ``other``, whatever the symbols stand for."""
        return any(
            number >= asked and wanted <= symbols
            for number, symbols in self.ways
            for asked, wanted in other.ways
        )


def _as_many(draft: Draft, index: int) -> tuple[ValueId, ...]:
    """The values on both sides of an operator that keeps every element, if it is one."""
    operator = draft.operator(index)
    if isinstance(operator, Affine):
        return draft.input(index), draft.output(index)
    routes = draft.routes(index) if isinstance(operator, Tie) else ()
    if len(routes) != 1 or not _keeps_all(draft, routes[0]):
        return ()
    return routes[0].source, routes[0].target


def _keeps_all(draft: Draft, route: Route) -> bool:
    if route.links is None:
        return True
    for value, axes in (
        (route.source, [link.source for link in route.links]),
        (route.target, [link.target for link in route.links]),
    ):
        shape = draft.values[value].shape
        if shape is None:
            return False
        linked = {axis for group in axes for axis in group}
        if any(dim != 1 and axis not in linked for axis, dim in enumerate(shape)):
            return False
    indexed = (link.source_index is not None or link.target_index is not None
               for link in route.links)  # fmt: skip
    return not any(indexed)


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
