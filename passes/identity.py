"""affine(x) -> x   where scale = 1 and shift = 0 on every channel

Exact on every finite input. The step stays only where it joins an output of the graph to a value
that has to keep a name of its own.
"""

from __future__ import annotations

from bnfold.passes.draft import Draft
from bnfold.passes.guards import Refusal, anchored
from bnfold.planning import How, Stored


def drop_identity(draft: Draft, index: int) -> Refusal | None:
    """Drop step ``index``, which is an identity, or say why it has to stay."""
    written_outside = draft.output(index) in draft.anchors
    if written_outside and (refusal := anchored(draft, draft.input(index))):
        return refusal
    stored = Stored.AFTER if written_outside else Stored.BEFORE
    draft.vanish(index, How.IDENTITY, (), stored)
    return None
