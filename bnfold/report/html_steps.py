"""The affine steps of a model: a strip of all, the reasons of those that stay, and a table."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bnfold.report.html_parts import cells, code, esc, legend, section, table
from bnfold.report.text import count_joints, count_steps

if TYPE_CHECKING:
    from bnfold.report.model import Report, Step

_HEADS = ("#", "step", "verdict", "why", "reason", "witness")
_MANY = 300  # steps from which on the strip is finer


def steps_section(report: Report) -> str:
    """Every affine step with its verdict, its reason and its witness."""
    if not report.steps:
        return section("Affine steps", esc(count_steps(report)))
    about = esc(count_steps(report)) + ". Each bar is one step, in the order of the graph."
    return section(
        "Affine steps", about, _strip(report), _reasons(report), _tools(), _table(report)
    )


# ---- the strip ----


def _strip(report: Report) -> str:
    bars = "".join(
        f'<i class="{_kind(step)}" title="{esc(step.name)}: {esc(_said(step))}"></i>'
        for step in report.steps
    )
    many = " many" if len(report.steps) > _MANY else ""
    said = esc(count_steps(report))
    keys = [(f'<i class="{kind}"></i>', words) for kind, words in _KINDS.items()]
    return f'<div class="strip{many}" role="img" aria-label="{said}">{bars}</div>' + legend(keys)


_KINDS = {
    "backward": "folded into what is before it",
    "forward": "folded into what is after it, or around it",
    "other": "joined or merged, or had nothing to do",
    "kept": "stays",
}


def _kind(step: Step) -> str:
    if step.verdict == "kept":
        return "kept"
    return {"backward": "backward", "forward": "forward", "around": "forward"}.get(
        step.how, "other"
    )


def _said(step: Step) -> str:
    return f"stays: {step.sentence}" if step.verdict == "kept" else f"folded {step.sentence}"


# ---- operators that became one ----


def joints_section(report: Report) -> str:
    """Operators that became one, and those next to each other that stay apart."""
    if not (report.joints or report.apart):
        return ""
    rows = [(code(j.into), esc(j.op_type), esc(j.sentence), "") for j in report.joints]
    rows += [
        (code(step.name), esc(step.op_type), f"stays apart: {esc(step.sentence)}",
         f'{esc(step.code)} <span class="soft">{esc(step.reason)}</span>')
        for step in report.apart
    ]  # fmt: skip
    about = ". ".join(map(esc, count_joints(report)))
    heads = ("operator", "", "what became of it", "reason")
    return section("Linear operators", about, table(heads, rows, (), "stack"))


# ---- the reasons ----


def _reasons(report: Report) -> str:
    if not report.kept:
        return ""
    counts = Counter((step.code, step.reason) for step in report.kept)
    most = max(counts.values())
    rows = [
        (esc(key), esc(reason), f"{count:,}", _bar(count / most))
        for (key, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return table(("reason", "", "steps", ""), rows, (2,), "compact")


def _bar(part: float) -> str:
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * part:.1f}" height="10" rx="1"/></svg>'
    )


# ---- the table ----


def _tools() -> str:
    choices = (("", "all steps"), ("folded", "folded"), ("kept", "kept"))
    options = "".join(f'<option value="{value}">{said}</option>' for value, said in choices)
    return (
        '<div class="tools" id="tools" hidden><input type="search" placeholder="Find a step, '
        'reason or witness" aria-label="Find a step, reason or witness">'
        f'<select aria-label="Which steps">{options}</select><output class="soft small"></output>'
        "</div>"
    )


def _table(report: Report) -> str:
    head = "".join(f"<th>{esc(name)}</th>" for name in _HEADS)
    rows = "".join(_row(number, step) for number, step in enumerate(report.steps, start=1))
    return (
        f'<div class="wide"><table class="steps stack" id="steps"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(number: int, step: Step) -> str:
    hint = f'<div class="soft small">{esc(step.hint)}</div>' if step.hint else ""
    reason = f'{esc(step.code)} <span class="soft">{esc(step.reason)}</span>' if step.code else ""
    verdict = f"{esc(step.verdict)} {esc(step.how)}".rstrip()
    verdict = f'<b class="stay">{verdict}</b>' if step.verdict == "kept" else verdict
    row = (
        f'<span class="soft">{number}</span>',
        f'{code(step.name)}<div class="soft small">{esc(step.op_type)}</div>',
        verdict,
        esc(step.sentence) + hint,
        reason,
        ", ".join(map(code, step.witness)),
    )
    heads = ("", "", "", "", "", "held by" if step.witness else "")
    return f'<tr data-kind="{esc(step.verdict)}">{"".join(cells(heads, row))}</tr>'
