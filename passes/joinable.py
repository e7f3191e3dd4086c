"""Whether a linear region can be one operator, and which: its filter, what it costs, who holds it.

Weights and work are counted as multiplications and additions a position of the source: what one
operator takes may not be more than what all of the region took together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

from bnfold.channel_graph import (
    POINT,
    Affine,
    Bias,
    Form,
    Linear,
    Link,
    Operator,
    Sum,
    Tie,
    ValueId,
)
from bnfold.passes.draft import Draft
from bnfold.passes.filters import Filter, beside
from bnfold.passes.guards import Refusal
from bnfold.passes.number_types import NUMBER_TYPES
from bnfold.passes.regions import Region, is_flattening
from bnfold.planning import Joining, Merge, Reason


@dataclass(frozen=True, slots=True)
class Joint:
    """A region that can be one operator, and the filter of that."""

    merge: Merge
    filter: Filter


class _NotAlikeError(Exception):
    """The region is none that could be one operator; there is nothing to say of it."""


class _RefusedError(Exception):
    """The region could be one operator, but for ``refusal``."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


def joint_of(draft: Draft, region: Region, *, symmetric: bool = False) -> Joint | Refusal | None:
    """The one operator that ``region`` can be; else why not, or None where it is no candidate.

    Args:
        draft: The graph.
        region: A linear part of it.
        symmetric: Whether operators can only pad as many zeros before an axis as behind it.
    """
    try:
        return _Region(draft, region, symmetric).joint()
    except _RefusedError as error:
        return error.refusal
    except _NotAlikeError:
        return None


class _Region:
    def __init__(self, draft: Draft, region: Region, symmetric: bool) -> None:
        self.draft, self.region, self.symmetric = draft, region, symmetric
        self.members = [(index, draft.operator(index)) for index in region.operators]
        self.linears = {i: op for i, op in self.members if isinstance(op, Linear)}
        self.windows = [op for _, op in self.members if isinstance(op, Tie) and op.taps is not None]
        self.sums = [op for _, op in self.members if isinstance(op, Sum)]
        self.flattening = [i for i, op in self.members if is_flattening(draft, op)]
        self.flat = self._after_flattening()
        self.filters: dict[ValueId, Filter] = {}
        self.weights = self.work = 0.0

    def joint(self) -> Joint:
        parts = len(self.linears) + len(self.sums) + len(self.windows) + len(self.region.left)
        if not self.linears or parts < 2:
            raise _NotAlikeError
        axis, axes = self._axes()
        self._same_type()
        if len(self.flattening) > 1:
            raise _NotAlikeError
        channels = self._channels(axis)
        self.filters[self.region.source] = Filter.identity(channels, axes)
        for _, operator in self.members:
            self.filters[operator.outputs[0]] = self._filter(operator, axis)
        found = self._whole(axis).runnable(symmetric=self.symmetric)
        if found.weights > self.weights or found.weights / found.thinning > self.work:
            detail = f"{found.weights} weights, {self.weights:.0f} as it is"
            if found.weights <= self.weights:
                detail = "it would go over more positions"
            self._refuse(Reason.GROWS, detail)
        kind = Joining.PARALLEL if self.sums or self.region.left else Joining.SERIAL
        merge = Merge(
            kind, self.region.operators, self._holder(found), self.region.source,
            self.region.target, found.ins, found.groups, found.taps,
            through=self.flattening[0] if self.flattening else None, terms=self.region.terms,
            left=self.region.left, total=self.region.total, restated=self.region.restated,
        )  # fmt: skip
        return Joint(merge, found)

    # ---- what they have in common ----

    def _axes(self) -> tuple[int, int]:
        """The axis of the channels, and the number of spatial axes, which all have to share."""
        spatial = {len(op.taps or ()) for i, op in self.linears.items() if i not in self.flat}
        if any(self.linears[i].taps for i in self.linears.keys() & self.flat):
            raise _NotAlikeError
        spatial |= {len(op.taps or ()) for op in self.windows}
        axis = {a for op in self.linears.values() for a in (op.in_axis, op.out_axis)}
        steps = (op for _, op in self.members if isinstance(op, Affine))
        axis |= {step.axis for step in steps if step.axis is not None}
        if len(spatial) != 1 or len(axis) != 1:
            raise _NotAlikeError
        return axis.pop(), spatial.pop()

    def _after_flattening(self) -> frozenset[int]:
        """The operators that read what has no axes of positions any more."""
        found: set[int] = set()
        values: set[ValueId] = set()
        for index, operator in self.members:
            if values.intersection(operator.inputs):
                found.add(index)
            if index in found or index in self.flattening:
                values.add(operator.outputs[0])
        return frozenset(found)

    def _same_type(self) -> None:
        values = {op.outputs[0] for _, op in self.members} | {self.region.source}
        types = {self.draft.values[value].dtype for value in values} & NUMBER_TYPES.keys()
        types |= {op.weight.dtype for op in self.linears.values() if op.weight is not None}
        if len(types) != 1:
            raise _NotAlikeError

    def _channels(self, axis: int) -> int:
        """How many channels the source has."""
        for linear in self.linears.values():
            if linear.inputs[0] == self.region.source:
                return linear.in_channels
        shape = self.draft.values[self.region.source].shape
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            raise _NotAlikeError
        return size

    # ---- filters ----

    def _filter(self, operator: Operator, axis: int) -> Filter:
        """What ``operator`` makes, of the source; its cost is noted."""
        read = [self.filters[value] for value in operator.inputs]
        if isinstance(operator, Sum):
            return self._sum(operator, read, axis)
        if isinstance(operator, Affine):
            assert operator.map is not None
            if operator.map.channels not in (1, read[0].outs):
                raise _NotAlikeError
            numbers = operator.map.channels * (2 if operator.form is Form.BOTH else 1)
            self._spend(numbers, read[0].outs, read[0])
            return read[0] if operator.map.is_scaling else read[0].shift()
        own = own_filter(operator, read[0])
        if own is None:
            return read[0]
        if own.ins != read[0].outs:
            raise _NotAlikeError
        own = replace(own, taps=own.taps or (POINT,) * len(read[0].taps))
        if not read[0].meets_border(own):
            self._refuse(Reason.BORDER, _border(read[0], operator))
        made = read[0].then(own)
        self._spend(own.weights if isinstance(operator, Linear) else 0, own.weights, made)
        return made

    def _sum(self, total: Sum, read: list[Filter], axis: int) -> Filter:
        if not self._is_whole(total, axis):
            raise _NotAlikeError
        return self._added(read)

    def _is_whole(self, total: Sum, axis: int) -> bool:
        """Whether channels are added to channels, none of them broadcast along, no axis lost.

        That positions are added to positions follows: all come from one tensor in the same way.
        """
        ranks = {self._rank_of(value) for value in (*total.inputs, *total.outputs)}
        return all(
            route.links is None or (len(ranks) == 1 and _keeps(route.links, axis))
            for route in total.paths
        )

    def _rank_of(self, value: ValueId) -> int | None:
        shape = self.draft.values[value].shape
        return None if shape is None else len(shape)

    def _whole(self, axis: int) -> Filter:
        """The filter of all that the region makes."""
        if not self.region.terms:
            return self.filters[self.region.target]
        for place in self.region.left:
            total = self.draft.operator(place.total)
            assert isinstance(total, Sum)
            if not self._is_whole(total, axis):
                raise _NotAlikeError
        return self._added([self.filters[term.value] for term in self.region.terms])

    def _added(self, read: list[Filter]) -> Filter:
        if len({(f.ins, f.outs) for f in read}) != 1:
            raise _NotAlikeError
        made = beside(read)
        if made is None:
            self._refuse(Reason.GEOMETRY, "")
        self._spend(0, made.outs * (len(read) - 1), made)
        return made

    def _spend(self, weights: int, work: int, made: Filter) -> None:
        self.weights += weights
        self.work += work / made.thinning

    # ---- verdicts ----

    def _refuse(self, reason: Reason, detail: str) -> NoReturn:
        names = tuple(linear.name for linear in self.linears.values())
        raise _RefusedError(Refusal(reason, names, detail))

    def _holder(self, found: Filter) -> int:
        """The operator that stays: one with a place for the bias, and the largest of these."""
        places = {Bias.BUILT_IN}
        if self.sums or self.region.left:
            places.add(Bias.OPERATOR)  # a MatMul may gain an Add where a sum goes
        able = [
            index for index, linear in self.linears.items()
            if index not in self.flat and (not found.shifted or linear.bias in places)
        ]  # fmt: skip
        if not able:
            self._refuse(Reason.EXTRA_OPERATOR, "")
        return max(able, key=lambda index: self._rank(self.linears[index]))

    def _rank(self, linear: Linear) -> tuple[bool, int]:
        own = own_filter(linear, None)
        assert own is not None
        return linear.bias is Bias.BUILT_IN, own.weights


def own_filter(operator: Operator, read: Filter | None) -> Filter | None:
    """What an operator does to what it reads; None where it changes nothing."""
    if isinstance(operator, Linear):
        assert operator.taps is not None
        return Filter(operator.in_channels, operator.out_channels, operator.groups, operator.taps,
                      operator.biased)  # fmt: skip
    assert isinstance(operator, Tie)
    if operator.taps is None:
        return None
    assert read is not None
    return Filter(read.outs, read.outs, read.outs, operator.taps)


def _keeps(links: tuple[Link, ...], axis: int) -> bool:
    return any(
        link.source == link.target == (axis,)
        and link.source_index is None and link.target_index is None
        for link in links
    )  # fmt: skip


def _border(read: Filter, operator: Operator) -> str:
    shifted = "something is added before the zeros that it pads"
    return f"{operator.name}: {shifted if read.shifted else 'it pads what the one before cuts off'}"
