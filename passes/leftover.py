"""a x + b that stays, in another form

    affine      (x * a) + b                 one of the two alone where the other changes nothing
    depthwise   Conv of 1x1, group = C      channels on axis 1, before one to three other axes

The map is the same, so that this is exact wherever the step is constant; what is asked for is that
its constants can be laid beside its input. Whether that is faster is for whoever asks to measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bnfold.channel_graph import Affine, ChannelGraph, Leftover
from bnfold.passes.number_types import NUMBER_TYPES
from bnfold.planning import Absorption, Kept, Plan

_CONVOLVED = (3, 4, 5)  # the ranks of what convolutions read


def with_forms(graph: ChannelGraph, plan: Plan, wanted: Leftover) -> Plan:
    """The plan with the form ``wanted`` for every step that stays and can take it.

    Args:
        graph: The facts, from a front end.
        plan: What was decided on them.
        wanted: The form that is asked for.
    """
    forms = {
        kept.step: wanted for kept in plan.kept if _can_take(graph, plan.absorptions, kept, wanted)
    }
    return replace(plan, forms=forms)


def _can_take(
    graph: ChannelGraph, absorptions: Mapping[int, Absorption], kept: Kept, wanted: Leftover
) -> bool:
    step = graph.operators[kept.step]
    if not isinstance(step, Affine) or kept.unchanged or wanted not in step.alternatives:
        return False
    if step.map is None or step.training_mode or step.unproved:
        return False
    taken = absorptions.get(kept.step, Absorption())
    merged = taken.around(step.map)
    if not merged.finite or merged.is_identity or taken.axis not in (None, step.axis):
        return False
    return _fits(graph, step, merged.channels, wanted)


def _fits(graph: ChannelGraph, step: Affine, channels: int, wanted: Leftover) -> bool:
    """Whether constants for ``channels`` can be laid beside what the step reads."""
    read = graph.values[step.inputs[0]]
    if read.shape is None or step.axis is None or read.dtype not in NUMBER_TYPES:
        return False
    rank = len(read.shape)
    if not 0 <= step.axis < rank:
        return False
    size = read.shape[step.axis]
    if not isinstance(size, int) or channels not in (1, size):
        return False
    return wanted is Leftover.AFFINE or (step.axis == 1 and rank in _CONVOLVED)
