"""SARIF 2.1.0 (OASIS), as GitHub's code scanning takes it.

Rules are the reasons for which a step stays (``BNF001`` ...) and what a check can say. A step that
stays is a note, a hazard and a fold that was rolled back are warnings, a mismatch and an
inconclusive check are errors. The model's file is the location; a node is a logical location in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bnfold.planning import Reason
from bnfold.report import words
from bnfold.report.lines import one_line

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.verify.result import CheckResult

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_WITNESS = "(witness)"
_OTHERS = {
    "mismatch": ("error", "The folded model does not say what the unfolded one says",
                 "bnfold optimize rolls the guilty fold back and writes a reproducer"),
    "inconclusive": ("error", "Nothing could be told, so the check does not pass",
                     "give inputs on which the outputs vary (--inputs), or more samples"),
    "rolled-back": ("warning", "A fold was taken back because the check did not pass with it",
                    "the reproducer shows it with onnx and onnxruntime alone"),
    "hazard": ("warning", "Something in the model makes its numbers fragile",
               "look at the weights that are named before quantising or narrowing the type"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Finding:
    """One result: its rule, its level, what it says, and where."""

    rule: str
    level: str
    message: str
    file: str
    node: str = ""


def render_sarif(found: Envelope) -> str:
    """``found`` as SARIF."""
    rules = [*map(_reason_rule, Reason), *(_rule(name, *said) for name, said in _OTHERS.items())]
    index = {rule["id"]: number for number, rule in enumerate(rules)}
    driver = {
        "name": "bnfold", "version": found.version, "semanticVersion": found.version,
        "rules": rules,
    }  # fmt: skip
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "exitCode": _exit_code(found)}],
        "columnKind": "unicodeCodePoints",
        "results": _results(list(_findings(found)), index),
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, allow_nan=False)


def _exit_code(found: Envelope) -> int:
    return found.check.exit_code if found.check is not None else 0


# ---- rules ----


def _reason_rule(reason: Reason) -> dict[str, Any]:
    sentence, hint = (text.format(witness=_WITNESS) for text in (reason.sentence, reason.hint))
    rule = _rule(reason.code, "note", f"The step stays: {sentence}", hint)
    return rule | {"name": reason.slug.title().replace("-", "")}


def _rule(name: str, level: str, said: str, hint: str) -> dict[str, Any]:
    return {
        "id": name,
        "name": name.title().replace("-", ""),
        "shortDescription": {"text": said},
        "fullDescription": {"text": said},
        "help": {"text": hint, "markdown": hint},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["onnx", "batchnorm"], "precision": "very-high"},
    }


# ---- results ----


def _findings(found: Envelope) -> Iterator[_Finding]:
    if found.check is not None:
        yield from _check_findings(found.check)
    for name in found.dropped:
        yield _Finding("rolled-back", "warning", f"{name}: its fold was rolled back: the check did "
                       "not pass with it", found.model, name)  # fmt: skip
    for step in found.report.kept if found.report is not None else ():
        text = f"{step.name} ({step.op_type}) stays: {step.sentence}"
        hint = f"; {step.hint}" if step.hint else ""
        yield _Finding(step.code, "note", text + hint, found.model, step.name)


def _check_findings(check: CheckResult) -> Iterator[_Finding]:
    for tier in words.spoken(check):
        rule = {"fail": "mismatch", "inconclusive": "inconclusive"}.get(tier.verdict.value)
        if rule is None:
            continue
        text = f"{words.tier_place(tier)}: {tier.message}"
        yield _Finding(rule, "error", text, check.candidate, check.guilty)
    for warning in check.warnings:
        yield _Finding("hazard", "warning", warning, check.candidate)


def _results(findings: list[_Finding], index: dict[str, int]) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    results = []
    for finding in findings:
        key = _fingerprint(finding)
        seen[key] += 1
        # A report that another version wrote may have a reason that is no rule of this one.
        rule = {"ruleIndex": index[finding.rule]} if finding.rule in index else {}
        results.append(_result(finding, f"{key}:{seen[key]}") | rule)
    return results


def _fingerprint(finding: _Finding) -> str:
    """What the finding is known by from one run to the next: not by its numbers."""
    known = finding.node or (finding.message if finding.rule == "hazard" else "")
    text = "\0".join((finding.rule, finding.file, known))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _result(finding: _Finding, fingerprint: str) -> dict[str, Any]:
    place: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(finding.file)},
            "region": {"startLine": 1},  # a model has no lines, but readers want one
        }
    }
    if finding.node:
        name = one_line(finding.node)
        place["logicalLocations"] = [
            {"name": name, "fullyQualifiedName": name, "kind": "element"}
        ]  # fmt: skip
    return {
        "ruleId": finding.rule,
        "level": finding.level,
        "message": {"text": one_line(finding.message) or finding.rule},
        "locations": [place],
        "partialFingerprints": {"primaryLocationLineHash": fingerprint, "bnfold/v1": fingerprint},
    }


def _uri(path: str) -> str:
    # Relative paths stay so: readers resolve them against the root of the repository.
    text = path.replace("\\", "/")
    quoted = quote(text or "model", safe="/", errors="backslashreplace")
    drive = len(text) > 1 and text[1] == ":"
    if text.startswith("/"):
        return f"file://{quoted}"
    return f"file:///{quoted}" if drive else quoted
