"""What a check would have caught, in words."""

from __future__ import annotations

import math

from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult


def what_was_caught(result: CheckResult) -> str:
    """The smallest error that each tier would have flagged, in one sentence.

    For tier B an error of the scale of any one fold; for tier C one of the whole output.
    """
    said = []
    for tier in result.tiers:
        if tier.verdict is not Verdict.PASS:
            continue
        if tier.tier == "A":
            said.append("one bit of a folded weight (tier A)")
        if tier.tier in "BC" and tier.caught is not None and math.isfinite(tier.caught):
            what = "of the scale of any one fold" if tier.tier == "B" else "of the output"
            where = f" on {tier.provider}" if tier.provider else ""
            said.append(f"an error of {tier.caught:.2g} {what} (tier {tier.tier}{where})")
    said += [
        f"an error of {m.caught:.2g} of the weight '{m.weight}' (mutants on {m.provider})"
        for m in result.mutations
    ]
    return ", ".join(said)
