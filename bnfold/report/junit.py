"""JUnit XML, as GitLab, Jenkins and GitHub's test reporters read it.

A suite for each tier on each provider, with a case for each output or site, and one of the steps
that stay, as skipped cases with their reason. What fails is a ``failure``; what is inconclusive is
an ``error``, which all readers show as not passed. An output that is inconclusive in a tier that
passes all the same (it never changes) is ``skipped``, so that the readers' count of what went
wrong is zero exactly when the exit code is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from bnfold.report import words
from bnfold.report.lines import one_line

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.report.model import Step
    from bnfold.verify.result import CheckResult, TierResult

# The elements that tell an outcome; a case that passed has none.
_PASSED, _FAILURE, _ERROR, _SKIPPED = "", "failure", "error", "skipped"


@dataclass(frozen=True, slots=True)
class _Case:
    """One case: its class, its name, the element of its outcome and what that says."""

    place: str
    name: str
    outcome: str = _PASSED
    kind: str = ""
    message: str = ""
    text: str = ""


def render_junit(found: Envelope) -> str:
    """``found`` as JUnit XML."""
    suites, cases = [], []
    for name, properties, inner in _suites(found):
        suites.append(_suite(name, properties, inner))
        cases += inner
    head = f"<testsuites {_attributes({'name': 'bnfold', **_counts(cases)})}>"
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *suites, "</testsuites>"])


def _suites(found: Envelope) -> Iterator[tuple[str, Mapping[str, str], list[_Case]]]:
    if found.check is not None:
        for tier in words.spoken(found.check):
            properties = _properties(found, found.check, tier)
            yield words.tier_place(tier), properties, _cases(found.check.candidate, tier)
    if found.report is not None and found.report.kept:
        source = found.report.source
        yield (
            "steps that stay",
            {"level": found.report.level},
            [_kept(f"{source}.steps", step) for step in found.report.kept],
        )


def _properties(found: Envelope, check: CheckResult, tier: TierResult) -> dict[str, str]:
    properties = {"bnfold": found.version, "reference": check.reference, **check.environment}
    properties["samples"] = str(check.samples)
    if check.seed is not None:
        properties["seed"] = str(check.seed)
    if tier.caught is not None:
        properties["caught"] = words.number(tier.caught)
    if check.caught:
        properties["would have caught"] = check.caught
    for run in check.runs:
        if run.provider == tier.provider:
            properties |= {"runtime": run.runtime, "placement": words.certificate(run)}
    return properties


def _cases(candidate: str, tier: TierResult) -> list[_Case]:
    name = words.tier_name(tier)
    place = ".".join(part for part in (candidate, name, tier.provider) if part)
    said = tier.verdict.value
    cases = [
        _case(place, f"output {one.output}", said, one.verdict.value, one.message)
        for one in tier.outputs
    ]
    for one in tier.sites:
        site = f"site {one.site}: {one.tensor}"
        cases.append(_case(place, site, said, one.verdict.value, words.site_said(one)))
    if all(case.outcome != _outcome(said, said) for case in cases):
        cases.append(_case(place, name, said, said, tier.message))
    return cases


def _case(place: str, name: str, tier: str, verdict: str, message: str) -> _Case:
    outcome = _outcome(tier, verdict)
    kind = {"fail": "mismatch"}.get(verdict, verdict)
    return _Case(place, name, outcome, kind, message, message)


def _outcome(tier: str, verdict: str) -> str:
    if tier == "pass" and verdict == "inconclusive":
        return _SKIPPED
    return {"pass": _PASSED, "fail": _FAILURE, "inconclusive": _ERROR}[verdict]


def _kept(place: str, step: Step) -> _Case:
    message = f"{step.code} {step.reason}: {step.sentence}"
    return _Case(place, f"{step.name} ({step.op_type})", _SKIPPED, step.code, message, step.hint)


# ---- XML ----


def _suite(name: str, properties: Mapping[str, str], cases: Sequence[_Case]) -> str:
    lines = [f"  <testsuite {_attributes({'name': name, **_counts(cases), 'time': '0'})}>"]
    lines.append("    <properties>")
    for key, value in properties.items():
        lines.append(f"      <property {_attributes({'name': key, 'value': value})}/>")
    lines += ["    </properties>", *map(_element, cases), "  </testsuite>"]
    return "\n".join(lines)


def _counts(cases: Sequence[_Case]) -> dict[str, str]:
    outcomes = Counter(case.outcome for case in cases)
    counts = {"tests": len(cases), "failures": outcomes[_FAILURE], "errors": outcomes[_ERROR]}
    return {key: str(count) for key, count in {**counts, "skipped": outcomes[_SKIPPED]}.items()}


def _element(case: _Case) -> str:
    head = _attributes({"classname": case.place, "name": case.name, "time": "0"})
    if not case.outcome:
        return f"    <testcase {head}/>"
    said = {"message": case.message}
    if case.outcome != _SKIPPED:
        said["type"] = case.kind
    text = escape(one_line(case.text))
    inner = f"      <{case.outcome} {_attributes(said)}>{text}</{case.outcome}>"
    return f"    <testcase {head}>\n{inner}\n    </testcase>"


def _attributes(values: Mapping[str, str]) -> str:
    # Control characters are no XML, not even escaped: made printable first.
    return " ".join(f"{name}={quoteattr(one_line(value))}" for name, value in values.items())
