"""The folds between direct neighbours, any number of times, to the fixpoint.

Backward first: it is the textbook fold and leaves consumers' weights alone. What can go neither
way merges with its neighbour and is tried again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnfold.channel_graph import Affine, ChannelGraph, ConstantStep
from bnfold.passes.backward import fold_backward
from bnfold.passes.draft import Draft
from bnfold.passes.forward import fold_forward
from bnfold.passes.guards import Refusal
from bnfold.passes.identity import drop_identity, is_identity
from bnfold.passes.merge import merge_with_next
from bnfold.planning import Fold, How, Kept, Plan, Reason, Stored


def plan_local(graph: ChannelGraph, refused: Mapping[int, Kept] | None = None) -> Plan:
    """Decide every affine step of ``graph`` by its direct neighbours.

    Args:
        graph: The facts, from a front end.
        refused: Steps that must stay, with the reason: those whose fold left the range of the
            stored type when it was computed.

    Returns:
        A plan in which every affine step is folded or kept with a reason.
    """
    draft = Draft(graph, refused or {})
    refusals = fold_neighbours(draft)
    kept = kept_steps(draft, {index: r.kept(index) for index, r in refusals.items()})
    folds = (*draft.folds.values(), *evaluated(draft))
    return Plan("local", folds, kept, draft.absorptions, draft.restored)


def fold_neighbours(draft: Draft, *, joining: bool = True) -> dict[int, Refusal]:
    """Make the folds between direct neighbours; returns why the other steps stay.

    Args:
        draft: The graph; the folds are entered.
        joining: Whether steps merge with each other too, and identities vanish. Such a step could
            have stayed to hold what others leave, which is for a planner that sees further; only
            where a scale is 0 there is nothing to see: it can't be undone.
    """
    refusals: dict[int, Refusal] = {}
    changed = True
    while changed:
        changed = False
        for index, step in list(draft.steps()):
            if draft.is_open(index):
                changed |= _fold(draft, index, step, refusals, joining)
        if changed and not joining:
            continue  # what can still go into a neighbour need not merge
        for index, step in list(draft.steps()):
            if draft.is_open(index):
                changed |= merge_with_next(draft, index, step, only_dead=not joining)
    return refusals


def evaluated(draft: Draft) -> tuple[Fold, ...]:
    """Steps over constants only, which vanish without anything else."""
    return tuple(
        Fold(i, How.EVALUATED, (), Stored.AFTER)
        for i, op in enumerate(draft.operators)
        if isinstance(op, ConstantStep) and i not in draft.refused
    )


def _fold(
    draft: Draft, index: int, step: Affine, refusals: dict[int, Refusal], joining: bool
) -> bool:
    """Try the ways a step can vanish; remember the most telling refusal."""
    taken = draft.step_map(index)
    if not taken.finite:
        channel = int(np.argmin(np.isfinite(taken.scale) & np.isfinite(taken.shift)))
        refusals[index] = Refusal(Reason.RANGE, (step.name,), f"channel {channel} is not finite")
        return False
    if joining and is_identity(taken):
        refusal = drop_identity(draft, index)
        if refusal is not None:
            refusals[index] = refusal
        return refusal is None
    before = fold_backward(draft, index, step)
    if before is None:
        return True
    after = fold_forward(draft, index, step)
    if after is None:
        return True
    refusals[index] = _more_telling(before, after)
    return False


def _more_telling(before: Refusal, after: Refusal) -> Refusal:
    if before.near or after.near:
        return before if before.near else after
    return Refusal(Reason.NO_LINEAR_NEIGHBOUR, before.witness + after.witness, near=False)


def kept_steps(draft: Draft, why: Mapping[int, Kept]) -> tuple[Kept, ...]:
    """Every step that stays: by its nature, because it was refused, or as ``why`` has it."""
    kept = []
    for index, operator in enumerate(draft.operators):
        if not isinstance(operator, Affine | ConstantStep):
            continue
        if index in draft.refused:
            kept.append(draft.refused[index])
        elif isinstance(operator, Affine) and index not in draft.folds:
            kept.append(_by_nature(index, operator) or why[index])
    return tuple(kept)


def _by_nature(index: int, step: Affine) -> Kept | None:
    if step.training_mode:
        return Kept(index, Reason.TRAINING_MODE, (step.name,))
    if step.map is None:
        return Kept(index, Reason.NOT_CONSTANT, (step.unproved or step.name,))
    if step.stays:
        return Kept(index, Reason.IN_CODE, (step.stays,))
    if step.unproved:
        return Kept(index, Reason.CHANNEL_AXIS, ("its neighbours",), step.unproved)
    return None
