"""linear(affine(x)) -> linear'(x)

    W (a x + b) + c  =  (W a) x + (c + W b)

All readers of the step absorb it, so that the step's input is what they read. A reader that
pads with zeros takes only a scale: it would pad the unshifted input with the wrong value.
"""

from __future__ import annotations

from bnfold.channel_graph import Affine, Linear, Side, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.guards import Refusal, anchored, input_refusal, scale_refusal
from bnfold.planning import How, Reason, Stored


def fold_forward(draft: Draft, index: int, step: Affine) -> Refusal | None:
    """Fold step ``index`` into all the linear operators after it, or say why not."""
    values, readers = _readers_after(draft, draft.output(index))
    linears = [reader for reader in readers if _reads_as_data(draft, reader, values)]
    if refusal := _others(draft, values, readers, linears):
        return refusal
    taken = draft.step_map(index)
    for reader in linears:
        linear = draft.operator(reader)
        assert isinstance(linear, Linear)
        if refusal := input_refusal(step, taken, linear):
            return refusal
        if refusal := scale_refusal(draft, reader, Side.INPUT, taken):
            return refusal
    if refusal := _extra_operator(draft, linears, taken.is_scaling, taken.is_shifting):
        return refusal
    for reader in linears:
        draft.absorb_input(reader, taken)
    for value in values[1:]:
        draft.restore(value, step.axis, taken)
    draft.vanish(index, How.FORWARD, tuple(linears), Stored.BEFORE)
    return None


def _readers_after(draft: Draft, value: ValueId) -> tuple[list[ValueId], list[int]]:
    """All values that carry the step's output, and the operators that read any of them."""
    values, readers = [value], []
    for carried in values:
        for reader in draft.readers(carried):
            if draft.is_free_tie(reader):
                values.append(draft.output(reader))
            else:
                readers.append(reader)
    return values, readers


def _reads_as_data(draft: Draft, reader: int, values: list[ValueId]) -> bool:
    """Whether the value is the activation that a linear operator reads, and that once only."""
    operator = draft.operator(reader)
    if not isinstance(operator, Linear):
        return False
    return (
        sum(draft.readers(v).count(reader) for v in values) == 1 and draft.input(reader) in values
    )


def _others(
    draft: Draft, values: list[ValueId], readers: list[int], linears: list[int]
) -> Refusal | None:
    """Refuse when anybody but linear operators reads the step's output."""
    near = bool(linears)
    for value in values:
        if (refusal := anchored(draft, value)) is not None:
            return Refusal(refusal.reason, refusal.witness, refusal.detail, near)
    others = dict.fromkeys(draft.name(i) for i in readers if i not in linears)
    if others and near:
        return Refusal(Reason.OTHER_READER, tuple(others))
    if not near:
        names = tuple(f"{name} after it" for name in others)
        return Refusal(Reason.NO_LINEAR_NEIGHBOUR, names, near=False)
    return None


def _extra_operator(
    draft: Draft, linears: list[int], only_scales: bool, only_shifts: bool
) -> Refusal | None:
    """Refuse when the shift would need more Adds than the one step that vanishes.

    One new Add is paid for by the step, if it takes a scale along and is no larger than the step.
    """
    if only_scales:
        return None
    bare = [index for index in linears if not draft.has_bias(index)]
    if not bare:
        return None
    linear = draft.operator(bare[0])
    assert isinstance(linear, Linear)
    if len(bare) == 1 and not only_shifts and linear.out_channels <= linear.in_channels:
        return None
    return Refusal(Reason.EXTRA_OPERATOR, tuple(draft.name(index) for index in bare))
