"""A check as text for people: a line for each thing, and the sites only where one is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.lines import LISTED, UNCUT, more, paint, wrap

if TYPE_CHECKING:
    from bnfold.verify.result import CheckResult, TierResult

WARNINGS = 4  # shown on the screen: a model with one fragile weight often has fifty
_RED, _GREEN, _YELLOW = "31", "32", "33"
_COLORS = {"pass": _GREEN, "fail": _RED, "inconclusive": _YELLOW}


def render_check(check: CheckResult, *, color: bool = False, width: int = UNCUT) -> str:
    """The verdict, a line for each tier with its figures, what they rest on, then the warnings.

    Args:
        check: What was found.
        color: Whether to use ANSI colors.
        width: Columns of the terminal.
    """
    verdict = paint(check.verdict.value, _COLORS[check.verdict.value], color)
    lines = [f"check: {verdict} ({words.drawn(check)})"]
    lines += [line for tier in check.tiers for line in _tier(tier, color, width)]
    lines += [wrap(f"  {line}", width) for line in _said(check)]
    return "\n".join(lines)


def _said(check: CheckResult) -> Iterator[str]:
    """What the verdict rests on, and what else there is to know."""
    if check.guilty:
        yield f"first wrong site: {check.guilty}"
    yield from map(words.certificate, check.runs)
    for use in check.inputs[:LISTED]:
        yield f"input {words.fed(use)}"
    if len(check.inputs) > LISTED:
        yield f"... and {len(check.inputs) - LISTED} more inputs, see --report"
    if words.limits(check.gates):
        yield f"gates: {words.limits(check.gates)}"
    if words.unpaired(check):
        yield words.unpaired(check)
    if check.caught:
        yield f"would have caught: {check.caught}"
    for warning in check.warnings[:WARNINGS]:
        yield f"warning: {warning}"
    if len(check.warnings) > WARNINGS:
        yield f"... and {len(check.warnings) - WARNINGS} more warnings, see --report"


def _tier(tier: TierResult, color: bool, width: int) -> list[str]:
    """What the tier says, then the outputs and sites that do not pass."""
    lines = [
        _verdict(f"  {words.tier_place(tier)}", tier.verdict.value, tier.message, color, width)
    ]
    outputs = [
        _verdict("    also", output.verdict.value, output.message, color, width)
        for output in tier.outputs
        if output.verdict.value != "pass" and output.message != tier.message
    ]
    sites = [
        _verdict("    site", site.verdict.value, words.site_said(site), color, width)
        for site in tier.sites
        if site.verdict.value != "pass"
    ]
    return lines + outputs[:LISTED] + more(outputs) + sites[:LISTED] + more(sites)


def _verdict(place: str, verdict: str, message: str, color: bool, width: int) -> str:
    # Painted last: the wrapping counts characters, and the escapes take no room.
    painted = paint(verdict, _COLORS[verdict], color)
    line = wrap(f"{place}: {verdict}: {message}", width)
    return line.replace(f": {verdict}: ", f": {painted}: ", 1)
