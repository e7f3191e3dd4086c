"""Why a step stays: what stands in its way, by name."""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.passes.search import Found
from bnfold.planning import Kept, Reason


def explain(found: Found, local: Mapping[int, Kept]) -> dict[int, Kept]:
    """The verdict on every step that did not vanish."""
    constraints = found.solution.constraints
    gone = {c.step for c in found.solution.vanished}
    return {
        c.step: local.get(c.step, Kept(c.step, Reason.FENCED, ("?",)))
        for c in constraints.candidates
        if c.step not in gone
    }
