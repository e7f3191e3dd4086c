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
    refusals: dict[int, Refusal] = {}
    changed = True
    while changed:
        changed = False
        for index, step in list(draft.steps()):
            if draft.is_open(index):
                changed |= _fold(draft, index, step, refusals)
        for index, step in list(draft.steps()):
            if draft.is_open(index):
                changed |= merge_with_next(draft, index, step)
    evaluated = [
        Fold(i, How.EVALUATED, (), Stored.AFTER)
        for i, op in enumerate(graph.operators)
        if isinstance(op, ConstantStep) and i not in draft.refused
    ]
    return Plan(
        "local", (*draft.folds.values(), *evaluated), _kept(draft, refusals), draft.absorptions
    )


def _fold(draft: Draft, index: int, step: Affine, refusals: dict[int, Refusal]) -> bool:
    """Try the ways a step can vanish; remember the most telling refusal."""
    taken = draft.step_map(index)
    if not taken.finite:
        channel = int(np.argmin(np.isfinite(taken.scale) & np.isfinite(taken.shift)))
        refusals[index] = Refusal(Reason.RANGE, (step.name,), f"channel {channel} is not finite")
        return False
    if is_identity(taken):
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


def _kept(draft: Draft, refusals: Mapping[int, Refusal]) -> tuple[Kept, ...]:
    kept = []
    for index, operator in enumerate(draft.operators):
        if index in draft.refused:
            kept.append(draft.refused[index])
        elif isinstance(operator, Affine) and index not in draft.folds:
            kept.append(_why(index, operator, refusals))
    return tuple(kept)


def _why(index: int, step: Affine, refusals: Mapping[int, Refusal]) -> Kept:
    if step.training_mode:
        return Kept(index, Reason.TRAINING_MODE, (step.name,))
    if step.map is None:
        return Kept(index, Reason.NOT_CONSTANT, (step.unproved or step.name,))
    if step.unproved:
        return Kept(index, Reason.CHANNEL_AXIS, ("its neighbours",), step.unproved)
    refusal = refusals[index]
    return Kept(index, refusal.reason, refusal.witness, refusal.detail)
