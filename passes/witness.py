"""Why a step stays: what stands in its way, by name."""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.passes.constraints import Constraints
from bnfold.passes.search import Found
from bnfold.planning import Kept, Reason


def explain(constraints: Constraints, found: Found, local: Mapping[int, Kept]) -> dict[int, Kept]:
    """The verdict on every step that did not vanish."""
    gone = {bond.candidate.step for bond in found.solution.vanished}
    return {
        c.step: local.get(c.step, Kept(c.step, Reason.FENCED, ("?",)))
        for c in constraints.candidates
        if c.step not in gone
    }
