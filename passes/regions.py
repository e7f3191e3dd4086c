"""Parts of a graph that are linear as a whole: from one tensor to one tensor, seen by nobody else.

A region grows backward from an operator: what it reads is taken in as long as nobody outside reads
it. Whenever all that is taken in reads one tensor only, that is a region.

    sum of branches over x          x -> sum
    linear after linear             x -> the second one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from bnfold.channel_graph import Affine, Bias, Linear, Operator, ShiftRule, Sign, Sum, Tie, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.number_types import NUMBER_TYPES
from bnfold.planning import Left, Term

MOST = 64  # operators in one region; the largest block known has a third of that


@dataclass(frozen=True, slots=True)
class Region:
    """``operators``, in the order of the graph, that make ``target`` of ``source`` alone.

    With ``terms`` it is their sum that takes the place of ``target``; ``left`` are the operands of
    sums that then go, ``total`` is the first sum that all of the terms are in, and ``restated``
    are the values that then hold something else.
    """

    operators: tuple[int, ...]
    source: ValueId
    target: ValueId
    terms: tuple[Term, ...] = ()
    left: tuple[Left, ...] = ()
    total: int | None = None
    restated: tuple[ValueId, ...] = ()


def regions_of(draft: Draft, root: int, taken: Container[int]) -> Iterator[Region]:
    """The regions that end in operator ``root``, the smallest first.

    Args:
        draft: The graph.
        root: The last operator.
        taken: Operators that may not be in one.
    """
    target = draft.output(root)
    inside: set[int] = set()
    frontier: Counter[ValueId] = Counter()
    ready: list[tuple[int, ValueId]] = []  # values that nobody else reads, the last made first
    grown = root
    while len(inside) < MOST:
        inside.add(grown)
        for value in draft.inputs(grown):
            frontier[value] += 1
            if _is_inner(draft, value, frontier[value], taken):
                heappush(ready, (-_made_by(draft, value), value))
        if len(frontier) == 1 and (len(inside) > 1 or sum(frontier.values()) > 1):
            yield Region(tuple(sorted(inside)), next(iter(frontier)), target)
        if not ready:
            return
        value = heappop(ready)[1]
        del frontier[value]
        grown = _made_by(draft, value)


def _is_inner(draft: Draft, value: ValueId, count: int, taken: Container[int]) -> bool:
    """Whether a value that was read ``count`` times so far can be inside of a region."""
    producer = draft.producer(value)
    if producer is None or producer in taken or draft.is_seen(value):
        return False
    return len(draft.readers(value)) == count and is_linear(draft, producer)


def _made_by(draft: Draft, value: ValueId) -> int:
    producer = draft.producer(value)
    assert producer is not None
    return producer


def is_linear(draft: Draft, index: int) -> bool:
    """Whether operator ``index`` can be in a region."""
    if index in draft.refused:
        return False
    operator = draft.operator(index)
    if len(operator.outputs) != 1:
        return False
    if isinstance(operator, Linear):
        return _is_plain(operator)
    if isinstance(operator, Affine):
        return _is_known(operator)
    if isinstance(operator, Sum):
        return len(operator.inputs) == len(operator.signs) and set(operator.signs) <= {1, -1}
    if not isinstance(operator, Tie):
        return False
    return operator.free or operator.taps is not None or is_flattening(draft, operator)


def _is_plain(linear: Linear) -> bool:
    """Whether its numbers are there, and are floats that only it reads."""
    weight = linear.weight
    if weight is None or weight.dtype not in NUMBER_TYPES or linear.bias is Bias.DYNAMIC:
        return False
    return linear.taps is not None and len(set(weight.readers)) <= 1 and len(linear.inputs) == 1


def _is_known(step: Affine) -> bool:
    known = step.map is not None and step.map.finite and len(step.inputs) == 1
    return known and not (step.training_mode or step.unproved)


def is_flattening(draft: Draft, operator: Operator) -> bool:
    """Whether it makes (N, C) of (N, C, 1, 1), channel by channel."""
    if not isinstance(operator, Tie) or len(operator.inputs) != 1 or len(operator.routes) != 1:
        return False
    if operator.sign is not Sign.ANY or operator.shift is not ShiftRule.EQUAL:
        return False  # a norm of one element is its size
    before, after = (draft.values[v].shape for v in (operator.inputs[0], operator.outputs[0]))
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return False
    alike = isinstance(before[1], int) and before[1] == after[1] and set(before[2:]) == {1}
    links = operator.routes[0].links or ()
    return alike and any(
        link.target == (1,) and 1 in link.source and 0 not in link.source
        and link.source_index is None and link.target_index is None
        for link in links
    )  # fmt: skip
