"""(skip + W1 x) + W2 x  =  skip + (W1 + W2) x

Sums of sums may add their terms in any order. Where some of the terms, not all, are linear over one
tensor, they become one term in the place of that which is added last; the others are left out of
the sums that they were in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass

from bnfold.channel_graph import Linear, Sum, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.regions import MOST, Region, is_linear, regions_of
from bnfold.planning import Left, Term


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A value that a tree of sums adds up: with which sign, and as which operand of which sum.

    ``sums`` are those that it is in, the last of the graph first.
    """

    value: ValueId
    sign: int
    place: Left
    sums: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.sums) - 1


def regrouped(draft: Draft, root: int, taken: Container[int]) -> Iterator[Region]:
    """Terms of the sums that end in ``root``, by the tensor that they are linear over.

    Args:
        draft: The graph.
        root: The last of the sums.
        taken: Operators that may not be in a region.
    """
    by_source: dict[ValueId, list[tuple[_Leaf, frozenset[int]]]] = defaultdict(list)
    leaves = list(_leaves(draft, root, taken))
    for leaf in leaves:
        for source, operators in _chains(draft, leaf.value, taken):
            by_source[source].append((leaf, operators))
    for source, found in by_source.items():
        operators = frozenset[int]().union(*(chain for _, chain in found))
        linear = any(isinstance(draft.operator(index), Linear) for index in operators)
        if linear and 1 < len(found) < len(leaves):
            region = _region(draft, source, [leaf for leaf, _ in found], operators)
            if region is not None:
                yield region


def _leaves(
    draft: Draft, root: int, taken: Container[int], sign: int = 1, above: tuple[int, ...] = ()
) -> Iterator[_Leaf]:
    total, sums = draft.operator(root), (*above, root)
    assert isinstance(total, Sum)
    for position, value in enumerate(draft.inputs(root)):
        signed = sign * total.signs[position]
        producer = draft.producer(value)
        deep = len(sums) > MOST
        if not deep and producer is not None and _is_inner(draft, value, producer, taken):
            yield from _leaves(draft, producer, taken, signed, sums)
        else:
            yield _Leaf(value, signed, Left(root, position), sums)


def _is_inner(draft: Draft, value: ValueId, producer: int, taken: Container[int]) -> bool:
    alone = not draft.is_seen(value) and len(draft.readers(value)) == 1
    total = isinstance(draft.operator(producer), Sum) and producer not in taken
    return alone and total and is_linear(draft, producer)


def _chains(
    draft: Draft, value: ValueId, taken: Container[int]
) -> Iterator[tuple[ValueId, frozenset[int]]]:
    """What ``value`` is linear over, nearest first, and the operators between."""
    yield value, frozenset()
    producer = draft.producer(value)
    alone = not draft.is_seen(value) and len(draft.readers(value)) == 1
    if producer is None or producer in taken or not alone or not is_linear(draft, producer):
        return
    if len(draft.inputs(producer)) == 1:
        yield draft.input(producer), frozenset((producer,))
    for region in regions_of(draft, producer, taken):
        yield region.source, frozenset(region.operators)


def _region(
    draft: Draft, source: ValueId, leaves: list[_Leaf], operators: frozenset[int]
) -> Region | None:
    """The terms as one, in the place of the one that is added last."""
    made = [leaf for leaf in leaves if leaf.value != source]
    last = max(made, key=lambda leaf: leaf.place.total)  # all that it is made of is there by then
    # What all of the sums give stays one: of two operands none can go from the first of them.
    inner = [leaf for leaf in leaves if leaf is last or leaf.depth or _operands(draft, leaf) > 2]
    left = tuple(leaf.place for leaf in inner if leaf is not last)
    if not left or not all(_can_lose(draft, place, left) for place in left):
        return None
    terms = tuple(Term(leaf.value, leaf.sign * last.sign) for leaf in inner)
    every = [set(leaf.sums) for leaf in inner]
    whole = every[0].intersection(*every)  # all of the terms are in these: they give what they did
    partial = set[int]().union(*every) - whole
    other = (last.value, *(draft.output(total) for total in sorted(partial)))
    return Region(tuple(sorted(operators)), source, last.value, terms, left, min(whole), other)


def _operands(draft: Draft, leaf: _Leaf) -> int:
    return len(draft.inputs(leaf.place.total))


def _can_lose(draft: Draft, place: Left, left: tuple[Left, ...]) -> bool:
    """Whether what stays of a sum is a sum, or one operand in its place that nobody waits for."""
    total = draft.operator(place.total)
    assert isinstance(total, Sum)
    gone = {other.position for other in left if other.total == place.total}
    stay = [sign for position, sign in enumerate(total.signs) if position not in gone]
    alone = stay == [1] and draft.output(place.total) not in draft.anchors
    return alone or (len(stay) > 1 and len(total.signs) > 2)
