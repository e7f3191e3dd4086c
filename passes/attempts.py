"""One choice of steps: solved, and solved again with what turns out to have to stay.

What can't be said as an equation beforehand is looked at afterwards: a step that stays has to be
able to hold the units around it, a tensor has one name, and digits must not get lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bnfold.channel_graph import Affine, Anchor, Form, ValueId
from bnfold.passes.bases import ChannelUnits, choose_units
from bnfold.passes.classes import Channels
from bnfold.passes.constraints import Candidate, Constraints
from bnfold.passes.draft import Draft
from bnfold.passes.number_types import NUMBER_TYPES, number_type
from bnfold.passes.search import Found, search
from bnfold.planning import Kept, Reason

_LEAST_BOUND = min(kind.largest_shift for kind in NUMBER_TYPES.values())


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What was chosen; ``held`` are steps that stay for reasons of their own."""

    channels: Channels
    found: Found
    units: ChannelUnits
    held: Mapping[int, Kept]

    @property
    def vanished(self) -> tuple[Candidate, ...]:
        """The steps that vanish."""
        return tuple(bond.candidate for bond in self.found.solution.vanished)


def attempt(draft: Draft, cloned: frozenset[str], barred: frozenset[int] = frozenset()) -> Outcome:
    """Let as many steps vanish as can.

    Args:
        draft: The graph, with what is decided so far.
        cloned: Weights, by storage, that each of their readers may have for itself.
        barred: Operators that may not gain an Add for their bias.
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
        outcome = Outcome(channels, found, choose_units(channels, found.solution), held)
        stay = {kept.step: kept for kept in (*_between_names(draft, gone), *_ruined(outcome))}
        wide = {index for index in _too_wide(outcome, gone) if index not in narrowed}
        if not fixed and not stay and not wide:
            return outcome
        rigid |= fixed
        held = held | stay
        narrowed |= wide


def _too_wide(outcome: Outcome, gone: set[int]) -> Iterator[int]:
    """Steps that stay where the units around them vary along an axis that is not theirs."""
    constraints, units = outcome.channels.constraints, outcome.units
    asked = [
        index for index in constraints.reads
        if index not in gone and isinstance(constraints.draft.operator(index), Affine)
        and set(constraints.numbering.axes[constraints.draft.input(index)])
        - {constraints.own_axis(index)}
    ]  # fmt: skip
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


def _ruined(outcome: Outcome) -> Iterator[Kept]:
    """A step that makes a tensor hold what somebody reads as a small rest of a large shift."""
    constraints, units = outcome.channels.constraints, outcome.units
    draft, numbering = constraints.draft, constraints.numbering
    gone = {candidate.step for candidate in outcome.vanished}
    if not np.nanmax(np.abs(units.shift), initial=0) > _LEAST_BOUND:
        return
    for value in numbering.values:
        most = number_type(draft.values[value].dtype).largest_shift
        readers = [index for index in draft.readers(value) if index not in gone]
        over = np.flatnonzero(np.abs(units.shift[numbering.of(value).ravel()]) > most)
        if readers and over.size:
            channel = int(numbering.of(value).ravel()[over[0]])
            yield _least(outcome, channel, draft.name(readers[0]))
            return


def _least(outcome: Outcome, channel: int, reader: str) -> Kept:
    """Keep a step in the class of ``channel``: one that can take over all of it, if there is.

    Else, and among several, the one with the smallest scale.
    """
    classes = outcome.found.solution.scale.root[outcome.channels.scale]
    draft, found = outcome.channels.constraints.draft, []
    for step in outcome.vanished:
        at = (classes[step.x] == classes[channel]) | (classes[step.y] == classes[channel])
        operator = draft.operator(step.step)
        narrow = isinstance(operator, Affine) and operator.form is Form.EITHER
        apart = float(np.abs(step.a[at]).min(initial=np.inf))
        found.append((not at.any(), narrow, apart, step.step))
    index = min(found)[-1]
    return Kept(index, Reason.ZERO_SCALE, (reader,), "its shift is too large beside it")
