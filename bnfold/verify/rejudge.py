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
        rtol: See `judge.Gates`; with None of either the gates are those of the check.
        atol: Likewise.

    Raises:
        UsageError: A limit is negative or not a number.
    """
    gates = Gates.of(rtol, atol)
    return gated(result, result.gates if gates == Gates() else gates)


def gated(result: CheckResult, gates: Gates) -> CheckResult:
    """The same measurements under ``gates``; ``Gates()`` is the noise floor alone."""
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
    """What was measured of every output on ``provider``; nothing where that of one is missing."""
    outputs = [o for tier in result.tiers if tier.provider == provider for o in tier.outputs]
    found = {o.output: o.measured for o in outputs if o.measured is not None}
    # Tier D alone keeps no errors of floats: judged without them it could not fail for them.
    return list(found.values()) if found.keys() == {o.output for o in outputs} else []
