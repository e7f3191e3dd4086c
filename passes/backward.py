"""affine(linear(x)) -> linear'(x)

    a (W x + c) + b  =  (a W) x + (a c + b)

The linear operator's output is stored in the units of the step's output. Exact for every ``a``,
zero and negative ones too, since nothing is divided. Allowed when nobody else reads what lies
between the two. Identity and Dropout may stand there.
"""

from __future__ import annotations

from bnfold.channel_graph import Affine, Linear, Side, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.guards import (
    Refusal,
    anchored,
    output_refusal,
    read_by_others,
    scale_refusal,
    undone,
)
from bnfold.planning import How, Reason, Stored


def fold_backward(draft: Draft, index: int, step: Affine) -> Refusal | None:
    """Fold step ``index`` into the linear operator before it, or say why not."""
    between, producer = _linear_before(draft, index)
    if producer is None:
        return _no_linear(draft, between[-1])
    linear = draft.operator(producer)
    assert isinstance(linear, Linear)
    reader = index
    for value in between:
        if refusal := anchored(draft, value) or read_by_others(draft, value, reader):
            return refusal
        reader = draft.producer(value) or 0
    taken = draft.step_map(index)
    if refusal := output_refusal(step, taken, linear):
        return refusal
    if refusal := scale_refusal(draft, producer, Side.OUTPUT, taken):
        return refusal
    draft.absorb_output(producer, taken)
    for value in between[1:]:
        draft.restore(value, step.axis, undone(taken))
    draft.vanish(index, How.BACKWARD, (producer,), Stored.AFTER)
    return None


def _linear_before(draft: Draft, index: int) -> tuple[list[ValueId], int | None]:
    """The values from the step's input back to a linear operator's output, and the operator."""
    value = draft.input(index)
    between = [value]
    producer = draft.producer(value)
    while producer is not None and draft.is_free_tie(producer):
        value = draft.input(producer)
        between.append(value)
        producer = draft.producer(value)
    found = producer is not None and isinstance(draft.operator(producer), Linear)
    return between, producer if found else None


def _no_linear(draft: Draft, value: ValueId) -> Refusal:
    producer = draft.producer(value)
    name = draft.name(producer) if producer is not None else f"'{draft.values[value].name}'"
    return Refusal(Reason.NO_LINEAR_NEIGHBOUR, (f"{name} before it",), near=False)
