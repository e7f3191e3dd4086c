"""Judge again what was measured: other gates, no model run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bnfold.verify.caught import what_was_caught
from bnfold.verify.ends import judge_ends
from bnfold.verify.judge import Gates, Measured
from bnfold.verify.result import CheckResult, TierResult


def rejudge(
    result: CheckResult, rtol: float | None = None, atol: float | None = None
) -> CheckResult:
    """The same measurements under other gates; tiers A and B stand as they are.

    Args:
        result: What a check found, as ``CheckResult.from_dict`` gives it back.
        rtol: See `judge.Gates`.
        atol: Likewise.
    """
    gates = Gates(rtol, atol)
    again = replace(result, tiers=tuple(_tiers(result, gates)), gates=gates)
    return replace(again, caught=what_was_caught(again))


def _tiers(result: CheckResult, gates: Gates) -> Iterator[TierResult]:
    done: set[str] = set()
    for tier in result.tiers:
        measured = _measured(result, tier.provider)
        if tier.tier not in "CD" or not measured:
            yield tier
        elif tier.provider not in done:
            done.add(tier.provider)
            letters = "".join(t.tier for t in result.tiers if t.provider == tier.provider)
            yield from judge_ends(tier.provider, measured, letters, gates)


def _measured(result: CheckResult, provider: str) -> list[Measured]:
    found = {
        output.output: output.measured
        for tier in result.tiers
        if tier.provider == provider
        for output in tier.outputs
        if output.measured is not None
    }
    return list(found.values())
