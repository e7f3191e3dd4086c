"""Which steps to let vanish, so that those that stay move the fewest bytes.

All of them together, if that is consistent; else, among the steps that depend on each other, one
after the other in order of what they cost. For scales alone that order is optimal (the steps that
vanish are a spanning forest); where channels of a step fall into several classes, or shifts have a
say, it is not, so that small groups are searched to the end and larger ones by exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.passes.classes import Bond, Classes, summed
from bnfold.passes.potentials import Edges, Ids, Potentials
from bnfold.passes.solution import Conflict, Solution

_EXACT = 12  # steps of a group that is searched to the end
_TRIALS = 300  # consistency tests for improving all groups of a graph


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best solution, and for each step that stays what it broke when it was tried.

    ``hopeless`` are those of them that could not vanish if no other step did.
    """

    solution: Solution
    conflicts: dict[int, Conflict]
    hopeless: frozenset[int]


def search(classes: Classes) -> Found:
    """Let steps vanish."""
    start = Solution.of(classes)
    conflicts = start.hopeless() if classes.bonds else {}
    hopeless = set(conflicts)
    steps = sorted((b for b in classes.bonds if b.candidate.step not in conflicts), key=_order)
    plain = [step for step in steps if not step.awkward.size]
    whole = start.grown(plain) if plain else start
    if isinstance(whole, Solution):
        awkward: dict[int, Conflict] = {}
        solution = _greedy(whole, [step for step in steps if step.awkward.size], awkward)
        if not awkward:
            return Found(solution, conflicts, frozenset(hopeless))
    budget = _Budget(_TRIALS)
    chosen: set[int] = set()
    for group in _groups(classes, steps):
        chosen |= _best(classes.part(group), conflicts, hopeless, budget)
    best = [step for step in steps if step.candidate.step in chosen]
    ignored: dict[int, Conflict] = {}
    solution = _greedy(start, best, ignored, leap=max(1, len(best)))
    conflicts |= ignored
    return Found(solution, conflicts, frozenset(hopeless))


def _order(step: Bond) -> tuple[bool, int, int]:
    """Those that can go only one way last, the dearest first."""
    return bool(step.awkward.size), -step.candidate.cost, step.candidate.step


def _groups(classes: Classes, steps: Sequence[Bond]) -> list[list[Bond]]:
    """Steps that depend on each other; each group in order."""
    groups: dict[int, list[Bond]] = {}
    for step, region in zip(steps, Regions.of(classes, steps).steps, strict=True):
        groups.setdefault(int(region), []).append(step)
    return list(groups.values())


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """What depends on each other: by shift class and by step, a number that is theirs in common."""

    shifts: Ids
    steps: Ids

    @classmethod
    def of(cls, classes: Classes, steps: Sequence[Bond]) -> Regions:
        """Steps share a class, directly or through others or a sum.

        Scale classes, shift classes and steps are numbered one behind the other.
        """
        first = classes.scales
        count = first + classes.shifts
        ties = summed(classes.sums)
        parts = [Edges.of(first + ties.source, first + ties.target)]
        for at, step in enumerate(steps, start=count):
            scales = np.concatenate([step.scale.source, step.scale.target, step.x, step.y])
            shifts = np.concatenate(
                [step.shift.source, step.shift.target, step.x_shift, step.y_shift]
            )
            met = np.concatenate([scales[scales != 0], first + shifts[shifts != 0]])
            parts.append(Edges.of(met, np.full_like(met, at)))
        root = Potentials.settled(count + len(steps), 0.0, Edges.joined(parts)).root
        return cls(root[first:count], root[count:])


@dataclass(slots=True)
class _Budget:
    left: int

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _best(
    part: Classes, conflicts: dict[int, Conflict], hopeless: set[int], budget: _Budget
) -> set[int]:
    """The steps of one group that had best vanish; fills in what the others break."""
    start, group = Solution.of(part), part.bonds
    refused: dict[int, Conflict] = {}
    solution = _greedy(start, group, refused, leap=len(group))
    if refused and not solution.vanished:  # each was tried alone
        hopeless |= set(refused)
    elif refused:
        better = _Exact(start, group, _lost(group, refused), budget)
        if len(group) <= _EXACT:
            better.run()
        else:
            better.exchange(refused)
        if better.best is not None:
            solution = better.best
            refused = _why(solution, group)
    conflicts.update(refused)
    return {step.candidate.step for step in solution.vanished}


def _lost(group: Sequence[Bond], refused: dict[int, Conflict]) -> int:
    return sum(b.candidate.cost for b in group if b.candidate.step in refused)


def _why(solution: Solution, group: Sequence[Bond]) -> dict[int, Conflict]:
    """What each step of ``group`` that did not vanish would break."""
    gone = {step.candidate.step for step in solution.vanished}
    tried = (solution.grown([step]) for step in group if step.candidate.step not in gone)
    return {found.step: found for found in tried if isinstance(found, Conflict)}


def _greedy(
    solution: Solution, group: Sequence[Bond], conflicts: dict[int, Conflict], leap: int = 1
) -> Solution:
    """One after the other; in leaps that double while they succeed."""
    at = 0
    while at < len(group):
        some = group[at : at + leap]
        awkward = [k for k, step in enumerate(some) if step.awkward.size]
        if awkward:
            some = some[: max(1, awkward[0])]
        grown = solution.grown(some)
        if isinstance(grown, Solution):
            solution, at, leap = grown, at + len(some), 2 * leap
        elif len(some) == 1:
            conflicts[some[0].candidate.step] = grown
            at, leap = at + 1, 1
        else:
            leap = max(1, len(some) // 4)
    return solution


class _Exact:
    """Search for a choice that leaves less than ``lost`` bytes."""

    def __init__(self, start: Solution, group: Sequence[Bond], lost: int, budget: _Budget) -> None:
        self.start, self.group, self.lost, self.budget = start, group, lost, budget
        self.best: Solution | None = None

    def run(self) -> None:
        """Take or leave each step in turn, and give up where too much is lost already."""
        self._from(self.start, 0, 0)

    def _from(self, solution: Solution, at: int, lost: int) -> None:
        if lost >= self.lost:
            return
        if at == len(self.group):
            self.best, self.lost = solution, lost
            return
        if not self.budget.take():
            return
        step = self.group[at]
        grown = solution.grown([step])
        if isinstance(grown, Solution):
            self._from(grown, at + 1, lost)
        self._from(solution, at + 1, lost + step.candidate.cost)

    def exchange(self, refused: dict[int, Conflict]) -> None:
        """Begin with a step that was refused, then all others in order."""
        for step in [b for b in self.group if b.candidate.step in refused]:
            self.budget.left -= len(self.group)
            if not self.budget.take():
                return
            first = self.start.grown([step])
            if isinstance(first, Conflict):
                continue
            others: dict[int, Conflict] = {}
            solution = _greedy(first, [b for b in self.group if b is not step], others)
            if _lost(self.group, others) < self.lost:
                self.best, self.lost = solution, _lost(self.group, others)
