"""affine(x) -> x   where scale = 1 and shift = 0 on every channel

Exact on every finite input. The step stays only where it joins an output of the graph to a value
that has to keep a name of its own.
"""

from __future__ import annotations

import numpy as np

from bnfold.affine import AffineMap
from bnfold.passes.draft import Draft
from bnfold.passes.guards import Refusal, anchored
from bnfold.planning import How, Stored

_ROUNDING = 2.0**-50  # what a few products of float64 may be off, and no weight can tell


def is_identity(taken: AffineMap) -> bool:
    """Whether a step changes nothing: a Mul by k and a Div by k may miss 1 by an ulp."""
    return taken.is_scaling and bool((np.abs(taken.scale - 1) <= _ROUNDING).all())


def drop_identity(draft: Draft, index: int) -> Refusal | None:
    """Drop step ``index``, which is an identity, or say why it has to stay."""
    written_outside = draft.output(index) in draft.anchors
    if written_outside and (refusal := anchored(draft, draft.input(index))):
        return refusal
    stored = Stored.AFTER if written_outside else Stored.BEFORE
    draft.vanish(index, How.IDENTITY, (), stored)
    return None
