"""Why a step stays: the nodes that stand in its way, found by walking from it.

scale   the nearest tensors in true units on both sides, or the path that leads around the step
sign    the nearest operator that passes only positive scales
shift   the nearest operator that passes no shift
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bnfold.channel_graph import Linear, Sum
from bnfold.passes.classes import Bond
from bnfold.passes.constraints import Constraints
from bnfold.passes.guards import Refusal, has_no_scales, shared
from bnfold.passes.potentials import Edges, Ids
from bnfold.passes.search import Found
from bnfold.passes.solution import Broken, Conflict, Solution
from bnfold.planning import Kept, Reason

# The reasons that somebody can do something about, the most telling first.
_TELLING = (
    Reason.WEIGHT_TYPE, Reason.WEIGHT_NOT_CONSTANT, Reason.SHARED_WEIGHT, Reason.CHANNEL_AXIS,
    Reason.ZERO_PADDING, Reason.EXTRA_OPERATOR, Reason.BIAS_NOT_CONSTANT, Reason.SHIFT,
    Reason.CAPTURED, Reason.HOOK, Reason.IN_PLACE, Reason.GRAPH_BOUNDARY,
    Reason.NO_LINEAR_NEIGHBOUR,
)  # fmt: skip
_FIXES_SCALE = frozenset({*_TELLING[:4], Reason.BIAS_NOT_CONSTANT})
_NAMED = 3  # nodes of a path that are worth naming
_EXPLORED = 200  # channels that are looked at around a step


def explain(constraints: Constraints, found: Found, local: Mapping[int, Kept]) -> dict[int, Kept]:
    """The verdict on every step that did not vanish.

    Args:
        constraints: What was solved.
        found: The solution, and what each of the other steps would break.
        local: Why they do not fold into direct neighbours; for steps that were not tried.
    """
    gone = {bond.candidate.step for bond in found.solution.vanished}
    why = _Why(constraints, found)
    verdicts = {}
    for bond in found.solution.classes.bonds:
        step = bond.candidate.step
        if step not in gone:
            conflict = found.conflicts.get(step)
            verdicts[step] = local[step]
            if conflict is not None and not why.beside_its_axis(bond, local[step]):
                verdicts[step] = why.kept(bond, conflict)
    return verdicts


@dataclass(frozen=True, slots=True)
class _Met:
    """What a walk came to: a fence, or the other side of the step; and the operators on the way."""

    fence: Refusal | None
    passed: tuple[int, ...]


class _Ways:
    """Which channels are tied to which, and by which operator; unknown 0 is left out."""

    def __init__(self, edges: Edges, count: int) -> None:
        inner = (edges.source != 0) & (edges.target != 0)
        ends = np.concatenate([edges.source[inner], edges.target[inner]])
        others = np.concatenate([edges.target[inner], edges.source[inner]])
        owners = np.concatenate([edges.owner[inner], edges.owner[inner]])
        order = np.argsort(ends, kind="stable")
        self._next, self._owner = others[order], owners[order]
        self._start = np.searchsorted(ends[order], np.arange(count + 1))

    def out_of(self, here: int) -> Iterator[tuple[int, int]]:
        """The channels tied to ``here``, each with the operator that ties them."""
        ways = slice(self._start[here], self._start[here + 1])
        return zip(self._next[ways].tolist(), self._owner[ways].tolist(), strict=True)


class _Walk:
    """Walks between channels that are tied, until one stands at a fence."""

    def __init__(self, ways: _Ways, fences: Iterable[tuple[Ids, Refusal]]) -> None:
        self._ways = ways
        self._fence: dict[int, Refusal] = {}
        for numbers, fence in fences:
            for number in numbers.tolist():
                old = self._fence.get(number)
                if old is None or _rank(fence) < _rank(old):
                    self._fence[number] = fence

    def to_fence(self, start: int, but: int, goal: int = -1) -> _Met | None:
        """The nearest fence from ``start``, or channel ``goal``, not through operator ``but``."""
        came: dict[int, tuple[int, int]] = {start: (-1, -1)}
        queue = [start]
        for here in queue:
            if here == goal or here in self._fence:
                return _Met(None if here == goal else self._fence[here], _passed(came, here))
            for there, owner in self._ways.out_of(here):
                if owner != but and there not in came:
                    came[there] = (here, owner)
                    queue.append(there)
        return None

    def owners(self, start: int, but: int) -> Iterator[int]:
        """The operators that tie channels to ``start``, the nearest first, as far as the fences."""
        seen, queue = {start}, [start]
        for here in queue:
            for there, owner in self._ways.out_of(here):
                if owner != but:
                    yield owner
                if owner != but and there not in seen and len(seen) < _EXPLORED:
                    seen.add(there)
                    queue.append(there)


def _passed(came: Mapping[int, tuple[int, int]], end: int) -> tuple[int, ...]:
    owners = []
    while came[end][0] >= 0:
        end, owner = came[end]
        owners.append(owner)
    return tuple(dict.fromkeys(reversed(owners)))


def _rank(fence: Refusal) -> int:
    return _TELLING.index(fence.reason)


class _Why:
    def __init__(self, constraints: Constraints, found: Found) -> None:
        self.constraints, self.found = constraints, found
        self.draft = constraints.draft
        self.vanished = [bond.candidate for bond in found.solution.vanished]
        self.steps = {c.step for c in self.vanished}

    @cached_property
    def _scale_ways(self) -> _Ways:
        folded = [Edges.of(c.x, c.y, owner=c.step) for c in self.vanished]
        edges = Edges.joined([self.constraints.scale, *folded])
        return _Ways(edges, self.constraints.numbering.count)

    @cached_property
    def scale(self) -> _Walk:
        """Between channels of one scale."""
        return _Walk(self._scale_ways, self.constraints.scale_fences)

    @cached_property
    def sign(self) -> _Walk:
        """The same, to operators that pass only positive scales."""
        positive = [
            (numbers, Refusal(Reason.SHIFT, (self.draft.name(index),)))
            for numbers, index in self.constraints.positive
        ]
        return _Walk(self._scale_ways, positive)

    @cached_property
    def shift(self) -> _Walk:
        """Between channels whose shifts depend on each other."""
        folded = [Edges.of(c.x, c.y, owner=c.step) for c in self.vanished]
        edges = Edges.joined([self.constraints.shift, *folded, *_summed(self.constraints)])
        ways = _Ways(edges, self.constraints.numbering.count)
        return _Walk(ways, self.constraints.shift_fences)

    def kept(self, bond: Bond, conflict: Conflict) -> Kept:
        """The verdict on one step."""
        step, at = bond.candidate, conflict.entry
        x, y = int(step.x[at]), int(step.y[at])
        rivals = () if not self._alone(bond) else self._rivals(conflict.kind, step.step, x, y)
        if rivals:
            apart = "their scales lie too far apart" if conflict.kind is Broken.RANGE else ""
            return Kept(step.step, Reason.OTHER_STEP, rivals, apart)
        detail = f"on channel {at}" if step.x.size > 1 else ""
        if conflict.kind is Broken.SIGN:
            return Kept(step.step, Reason.SIGN, self._positive(step.step, x, y), detail)
        if conflict.kind is Broken.ZERO:
            return Kept(step.step, Reason.ZERO_SCALE, self._around(step.step, x, y), detail)
        if conflict.kind is Broken.RANGE:
            return Kept(
                step.step, Reason.RANGE, (self.draft.name(step.step),),
                "its scales and those it is tied to lie too far apart",
            )  # fmt: skip
        if conflict.kind is Broken.SCALE:
            return self._scale(step.step, x, y)
        return self._shift(step.step, x, y)

    def beside_its_axis(self, bond: Bond, local: Kept) -> bool:
        """Whether a linear operator beside the step has its channels or its scales elsewhere."""
        elsewhere = local.reason in (Reason.CHANNEL_AXIS, Reason.WEIGHT_TYPE)
        return elsewhere and not self._alone(bond)

    def _alone(self, bond: Bond) -> bool:
        """Whether the step could vanish if no other did."""
        if bond.candidate.step in self.found.hopeless:
            return False
        part = self.found.solution.classes.part([bond])
        return isinstance(Solution.of(part).grown(part.bonds), Solution)

    def _rivals(self, kind: Broken, step: int, x: int, y: int) -> tuple[str, ...]:
        """Steps that vanish and stand on the ways from this one to what holds it."""
        walk = self.shift if kind in (Broken.SHIFT, Broken.SUM) else self.scale
        ways = (walk.to_fence(x, step), walk.to_fence(y, step), walk.to_fence(y, step, x))
        passed = [owner for way in ways if way is not None for owner in way.passed]
        near = [o for o in passed if o in self.steps]
        if not near:
            met = (*walk.owners(x, step), *walk.owners(y, step))
            near = [o for o in met if o in self.steps]
        others = sorted(self.steps, key=lambda other: abs(other - step))
        names = (self.draft.name(o) for o in near or others)
        return tuple(dict.fromkeys(names))[:_NAMED]

    # ---- scales ----

    def _scale(self, step: int, x: int, y: int) -> Kept:
        around = self.scale.to_fence(y, step, x)
        if around is not None and around.fence is None:
            held = self._held(self.scale, step, x, y)
            return held or Kept(step, Reason.OTHER_PATH, self._names(around.passed))
        met = [m.fence for m in (self.scale.to_fence(x, step), around) if m and m.fence]
        telling = min(met, key=_rank, default=None)
        if telling is not None and telling.reason in _FIXES_SCALE:
            return telling.kept(step)
        held = self._held(self.scale, step, x, y)
        if held is not None:
            return held
        sides = tuple(dict.fromkeys(name for fence in met for name in fence.witness))
        return Kept(step, Reason.FENCED, sides or (self.draft.name(step),))

    def _names(self, passed: tuple[int, ...]) -> tuple[str, ...]:
        """The operators of a path where ways part or meet, or those that there are."""
        sums = [o for o in passed if isinstance(self.draft.operator(o), Sum)]
        return tuple(self.draft.name(o) for o in (sums or passed)[:_NAMED])

    def _positive(self, step: int, x: int, y: int) -> tuple[str, ...]:
        """The operators on both sides that pass only positive scales."""
        met = (self.sign.to_fence(start, step) for start in (x, y))
        names = dict.fromkeys(n for m in met if m and m.fence for n in m.fence.witness)
        return tuple(names) or (self.draft.name(step),)

    def _held(self, walk: _Walk, step: int, x: int, y: int) -> Kept | None:
        """Verdict on a step next to a linear operator that ties what it does not tell apart."""
        for index in dict.fromkeys((*walk.owners(x, step), *walk.owners(y, step))):
            linear = self.draft.operator(index)
            if not isinstance(linear, Linear):
                continue
            if index in self.constraints.uneven:
                return has_no_scales(linear.name, self.constraints.uneven[index]).kept(step)
            if index not in self.constraints.agreeing:
                return Kept(step, Reason.CHANNEL_AXIS, (linear.name,))
            assert linear.weight is not None
            return shared(linear.weight, linear.name).kept(step)
        return None

    def _around(self, step: int, x: int, y: int) -> tuple[str, ...]:
        """Who else reads before a step and writes behind it."""
        before = [i for i in self.draft.readers(self.draft.input(step)) if i != step]
        after = self.draft.readers(self.draft.output(step))
        met = (self.scale.to_fence(x, step), self.scale.to_fence(y, step))
        fences = [name for m in met if m and m.fence for name in m.fence.witness]
        names = [self.draft.name(i) for i in (*before, *after)]
        found = tuple(dict.fromkeys(fences or names))[:_NAMED]
        return found or (self.draft.name(step),)

    # ---- shifts ----

    def _shift(self, step: int, x: int, y: int) -> Kept:
        met = [self.shift.to_fence(start, step) for start in (y, x)]
        fences = [m.fence for m in met if m is not None and m.fence is not None]
        telling = min(fences, key=_rank, default=None)
        if telling is None:
            sums = tuple(
                self.draft.name(i) for i in self.constraints.numbering.operators
                if isinstance(self.draft.operator(i), Sum)
            )  # fmt: skip
            return Kept(step, Reason.SHIFT, sums[:_NAMED] or (self.draft.name(step),))
        if _rank(telling) <= _TELLING.index(Reason.SHIFT):
            return telling.kept(step)
        held = self._held(self.shift, step, x, y)
        if held is not None:
            return held
        sides = tuple(dict.fromkeys(name for fence in fences for name in fence.witness))
        return Kept(step, Reason.FENCED, sides)


def _summed(constraints: Constraints) -> Iterable[Edges]:
    """A way through each sum, from any of its terms to any other."""
    sums = constraints.sums
    for column in range(1, sums.numbers.shape[1]):
        there = sums.numbers[:, column] >= 0
        yield Edges.of(sums.numbers[there, 0], sums.numbers[there, column], owner=sums.owner[there])
