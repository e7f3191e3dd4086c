"""Which inputs of a Concat linear operators make, with nothing but affine steps between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnfold.channel_graph import Affine, Linear, Operator, Taps, Tie, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.number_types import NUMBER_TYPES
from bnfold.passes.regions import is_linear


@dataclass(frozen=True, slots=True)
class Branch:
    """A linear operator, and the steps after it up to the ``value`` that a Concat reads.

    ``position`` is which input of the Concat that is, ``shared`` whether others read it too.
    """

    position: int
    value: ValueId
    linear: int
    steps: tuple[int, ...]
    source: ValueId
    taps: tuple[Taps, ...]
    dtype: str
    shared: bool

    def is_like(self, other: Branch) -> bool:
        """Whether both read the same positions of the same tensor, in numbers of one type."""
        mine = (self.source, self.taps, self.dtype)
        return mine == (other.source, other.taps, other.dtype)


def branches_of(draft: Draft, index: int) -> list[Branch]:
    """The inputs of operator ``index`` that linear operators make, if it is a Concat."""
    concat = draft.operator(index)
    if not isinstance(concat, Tie) or concat.joins is None:
        return []
    each = (_branch(draft, k, v, concat.joins) for k, v in enumerate(concat.inputs)
            if concat.inputs.count(v) == 1)  # fmt: skip
    return [branch for branch in each if branch is not None]


def _branch(draft: Draft, position: int, value: ValueId, axis: int) -> Branch | None:
    """What makes ``value``, if it is linear and nobody sees what is between."""
    steps: list[int] = []
    read = value
    while True:
        producer = draft.producer(read)
        if producer is None or draft.is_seen(read) or not is_linear(draft, producer):
            return None
        if read != value and len(draft.readers(read)) > 1:
            return None
        operator = draft.operator(producer)
        if isinstance(operator, Linear):
            break
        if not _is_step(operator, axis):
            return None
        steps.insert(0, producer)
        read = draft.input(producer)
    if not _is_stackable(draft, operator, steps, axis) or draft.values[value].shape is None:
        return None
    dtype = _dtype(draft, operator, [*steps, producer])
    if dtype is None:
        return None
    assert operator.taps is not None
    shared = len(draft.readers(value)) > 1
    return Branch(position, value, producer, tuple(steps), draft.input(producer), operator.taps,
                  dtype, shared)  # fmt: skip


def _is_step(operator: Operator, axis: int) -> bool:
    """Whether an operator between does something to each row by itself, or nothing."""
    if isinstance(operator, Affine):
        return operator.axis in (None, axis)
    return isinstance(operator, Tie) and operator.free


def _is_stackable(draft: Draft, linear: Linear, steps: Sequence[int], axis: int) -> bool:
    """Whether its outputs are rows: all made of all channels, along the axis of the Concat."""
    maps = [step.map for step in map(draft.operator, steps) if isinstance(step, Affine)]
    fits = all(m is not None and m.channels in (1, linear.out_channels) for m in maps)
    return fits and linear.groups == 1 and linear.in_axis == linear.out_axis == axis


def _dtype(draft: Draft, linear: Linear, operators: Sequence[int]) -> str | None:
    """The type of all numbers of a branch, if it is one."""
    assert linear.weight is not None
    values = [draft.input(operators[-1]), *map(draft.output, operators)]
    types = {draft.values[value].dtype for value in values} & NUMBER_TYPES.keys()
    types.add(linear.weight.dtype)
    return types.pop() if len(types) == 1 else None
