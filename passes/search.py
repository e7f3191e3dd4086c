"""Which steps to let vanish, so that those that stay move the fewest bytes.

All of them together, if that is consistent; else, among the steps that depend on each other, one
after the other in order of what they cost. For scales alone that order is optimal (the steps that
vanish are a spanning forest); where channels of a step fall into several classes, or shifts have a
say, it is not, so that small groups are searched to the end and larger ones by exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.passes.constraints import Candidate
from bnfold.passes.potentials import Edges, Potentials
from bnfold.passes.solution import Conflict, Solution

_EXACT = 12  # steps of a group that is searched to the end
_TRIALS = 600  # consistency tests for improving all groups of a graph


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best solution, and for each step that stays what it broke when it was tried."""

    solution: Solution
    conflicts: dict[int, Conflict]


def search(start: Solution) -> Found:
    """Let steps vanish from ``start``."""
    every = start.constraints.candidates
    conflicts = start.hopeless(every) if every else {}
    candidates = sorted((c for c in every if c.step not in conflicts), key=_order)
    plain = [c for c in candidates if not c.awkward.any()]
    whole = start.grown(plain) if plain else start
    if isinstance(whole, Solution):
        awkward: dict[int, Conflict] = {}
        solution = _greedy(whole, [c for c in candidates if c.awkward.any()], awkward)
        if not awkward:
            return Found(solution, conflicts)
    budget = _Budget(_TRIALS)
    solution = start
    for group in _groups(start, candidates):
        solution = _best(solution, group, conflicts, budget)
    return Found(solution, conflicts)


def _order(candidate: Candidate) -> tuple[bool, int, int]:
    """Those that can go only one way last, the dearest first."""
    return bool(candidate.awkward.any()), -candidate.cost, candidate.step


def _groups(start: Solution, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Steps that depend on each other: they share a class, directly or through others or a sum.

    Scale classes, shift classes and steps are numbered one behind the other.
    """
    count = start.scale.root.size
    parts = list(_summed(start, count))
    for at, candidate in enumerate(candidates):
        ends = np.concatenate([candidate.x, candidate.y])
        scales, shifts = start.scale.root[ends], start.shift.root[ends]
        classes = np.concatenate([scales[scales != 0], count + shifts[shifts != 0]])
        parts.append(Edges.of(classes, np.full_like(classes, 2 * count + at)))
    found = Potentials.free(2 * count + len(candidates), 0.0)
    found = found.after(found.merge(Edges.joined(parts)))
    groups: dict[int, list[Candidate]] = {}
    for at, candidate in enumerate(candidates):
        groups.setdefault(int(found.root[2 * count + at]), []).append(candidate)
    return list(groups.values())


def _summed(start: Solution, count: int) -> Iterator[Edges]:
    """Shift classes that are in one equation."""
    numbers = start.constraints.sums.numbers
    if not numbers.size:
        return
    roots = np.where(numbers >= 0, start.shift.root[np.maximum(numbers, 0)], 0)
    first = np.take_along_axis(roots, (roots != 0).argmax(axis=1)[:, None], axis=1)
    joined = (roots != 0) & (first != 0)
    yield Edges.of(count + np.broadcast_to(first, roots.shape)[joined], count + roots[joined])


@dataclass(slots=True)
class _Budget:
    left: int

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _best(
    start: Solution, group: list[Candidate], conflicts: dict[int, Conflict], budget: _Budget
) -> Solution:
    """The best solution for one group on top of ``start``; fills in ``conflicts``."""
    refused: dict[int, Conflict] = {}
    solution = _greedy(start, group, refused, leap=len(group))
    if refused:
        better = _Exact(start, group, _lost(group, refused), budget)
        if len(group) <= _EXACT:
            better.run()
        else:
            better.exchange(refused)
        if better.best is not None:
            solution = better.best
            refused = _why(solution, group)
    conflicts.update(refused)
    return solution


def _lost(group: Sequence[Candidate], refused: dict[int, Conflict]) -> int:
    return sum(c.cost for c in group if c.step in refused)


def _why(solution: Solution, group: Sequence[Candidate]) -> dict[int, Conflict]:
    """What each step of ``group`` that did not vanish would break."""
    gone = {c.step for c in solution.vanished}
    tried = ((c.step, solution.grown([c])) for c in group if c.step not in gone)
    return {step: found for step, found in tried if isinstance(found, Conflict)}


def _greedy(
    solution: Solution, group: Sequence[Candidate], conflicts: dict[int, Conflict], leap: int = 1
) -> Solution:
    """One after the other; in leaps that double while they succeed."""
    at = 0
    while at < len(group):
        some = group[at : at + leap]
        awkward = [k for k, c in enumerate(some) if c.awkward.any()]
        if awkward:
            some = some[: max(1, awkward[0])]
        grown = solution.grown(some)
        if isinstance(grown, Solution):
            solution, at, leap = grown, at + len(some), 2 * leap
        elif len(some) == 1:
            conflicts[some[0].step] = grown
            at, leap = at + 1, 1
        else:
            leap = max(1, len(some) // 4)
    return solution


class _Exact:
    """Search for a choice that leaves less than ``lost`` bytes."""

    def __init__(self, start: Solution, group: list[Candidate], lost: int, budget: _Budget) -> None:
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
        self._from(solution, at + 1, lost + step.cost)

    def exchange(self, refused: dict[int, Conflict]) -> None:
        """Begin with a step that was refused, then all others in order."""
        for step in [c for c in self.group if c.step in refused]:
            if not self.budget.take():
                return
            self.budget.left -= len(self.group)
            first = self.start.grown([step])
            if isinstance(first, Conflict):
                continue
            others: dict[int, Conflict] = {}
            solution = _greedy(first, [c for c in self.group if c is not step], others)
            if _lost(self.group, others) < self.lost:
                self.best, self.lost = solution, _lost(self.group, others)
