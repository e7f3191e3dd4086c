"""affine2(affine1(x)) -> affine(x)

    a2 (a1 x + b1) + b2  =  (a2 a1) x + (a2 b1 + b2)

What stays gets cheaper: two neighbouring steps become one, in whichever of the two operators can
express the result (a Mul or an Add can't be both, a BatchNorm can).
"""

from __future__ import annotations

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, Form, ValueId
from bnfold.passes.draft import Draft
from bnfold.passes.guards import undone
from bnfold.planning import How, Stored


def merge_with_next(draft: Draft, index: int, step: Affine, *, only_dead: bool = False) -> bool:
    """Merge step ``index`` with the step that alone reads it; True when one of the two is gone.

    Args:
        draft: What is decided so far.
        index: The first of the two steps.
        step: Its facts.
        only_dead: Merge only where one of the two has a scale of 0.
    """
    between, following = _sole_step_after(draft, index)
    if following is None:
        return False
    after = draft.operator(following)
    assert isinstance(after, Affine)
    first, second = draft.step_map(index), draft.step_map(following)
    if not (first.finite and second.finite):
        return False
    if only_dead and first.scale.all() and second.scale.all():
        return False
    if not _axes_agree(step, after, first, second):
        return False
    merged = second.after(first)
    if _can_express(after, merged) and _covers(after, step):
        draft.absorb_input(following, first)
        for value in between[1:]:
            draft.restore(value, step.axis, first)
        draft.vanish(index, How.MERGED, (following,), Stored.BEFORE)
        return True
    if _can_express(step, merged) and _covers(step, after):
        draft.absorb_output(index, second)
        for value in between[:-1]:
            draft.restore(value, after.axis, undone(second))
        draft.vanish(following, How.MERGED, (index,), Stored.AFTER)
        return True
    return False


def _sole_step_after(draft: Draft, index: int) -> tuple[list[ValueId], int | None]:
    """The values from the step's output to the input of the step that alone reads it, and that."""
    between = [draft.output(index)]
    while True:
        readers = draft.readers(between[-1])
        if between[-1] in draft.anchors or len(readers) != 1:
            return between, None
        if not draft.is_free_tie(readers[0]):
            return between, readers[0] if draft.is_open(readers[0]) else None
        between.append(draft.output(readers[0]))


def _axes_agree(step: Affine, after: Affine, first: AffineMap, second: AffineMap) -> bool:
    if step.axis is None or after.axis is None:
        return True
    return step.axis == after.axis and (
        1 in (first.channels, second.channels) or first.channels == second.channels
    )


def _covers(survivor: Affine, gone: Affine) -> bool:
    """Whether the survivor has an axis for the channels of the step that goes."""
    return survivor.axis is not None or gone.axis is None


def _can_express(survivor: Affine, merged: AffineMap) -> bool:
    return survivor.form is Form.BOTH or merged.is_scaling or merged.is_shifting
