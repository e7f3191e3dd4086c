"""GitHub-flavoured Markdown for step summaries and comments on pull requests.

Names come from the model and may hold anything. They stand in ``<code>``, where GitHub links no
mention, with every character that means something to Markdown or HTML written as an entity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.lines import LISTED, counted, human_bytes, one_line, share
from bnfold.report.text import counts_of

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.report.model import Report, Step
    from bnfold.verify.result import CheckResult, TierResult

SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️", "unchecked": "▫️"}
_SPECIAL = frozenset("\\`*_{}[]<>&|~#!$\"'")
ALL = 1 << 30
_INLINE = 5  # of what does not pass; the rest is folded away


def render_markdown(found: Envelope, *, listed: int = ALL) -> str:
    """``found`` as Markdown.

    Args:
        found: What was found.
        listed: How many steps, sites and outputs are listed of each kind.
    """
    if found.bench is not None:
        from bnfold.report.markdown_bench import bench_markdown  # it writes with what is here

        return bench_markdown(found.bench)
    parts = [_headline(found)]
    if found.report is not None:
        parts += [*map(escaped, counts_of(found.report)), *_size(found.report)]
    parts += [*_outcome(found)]
    if found.check is not None:
        parts += _check(found.check, listed)
    if found.report is not None:
        parts += _steps(found.report, listed)
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """``text`` so that Markdown and HTML show it as it is."""
    shown = "".join(f"&#{ord(c)};" if c in _SPECIAL else c for c in one_line(text))
    return shown.replace("@", "@&#8203;")  # a mention would notify somebody


def code(name: str) -> str:
    """A name from the model, as code."""
    shown = "".join(f"&#{ord(c)};" if c in _SPECIAL else c for c in one_line(name))
    return f"<code>{shown}</code>" if shown else ""


# ---- the verdict ----


def _headline(found: Envelope) -> str:
    said = {"unchecked": "not checked"}.get(found.verdict, found.verdict)
    title = f"### {SIGNS[found.verdict]} bnfold: {said} {code(found.model)}".rstrip()
    if found.check is None:
        return title
    lines = [title, escaped(words.summary(found.check))]
    if found.check.caught:
        lines.append(f"**Would have caught:** {escaped(found.check.caught)}")
    if found.check.guilty:
        lines.append(f"**First wrong site:** {code(found.check.guilty)}")
    return "\n\n".join(lines)


def _outcome(found: Envelope) -> Iterator[str]:
    if found.dropped:
        names = ", ".join(map(code, found.dropped[:LISTED]))
        hidden = len(found.dropped) - LISTED
        more = f" and {hidden:,} more" if hidden > 0 else ""
        yield f"**{counted(len(found.dropped), 'fold')} rolled back:** {names}{more}"
    if found.target is not None:
        yield f"Written to {code(found.target)}"
    if found.reproducer is not None:
        yield f"Reproducer in {code(found.reproducer)}"


# ---- tables ----


def _size(report: Report) -> Iterator[str]:
    yield from (f"> {escaped(note)}" for note in report.notes)
    if report.after is None:
        return
    before, after = report.before, report.after
    rows = []
    for name, old, new in words.changed_operators(before, after):
        rows.append((code(name), f"{old:,}", f"{new:,}", share(old, new)))
    for name, old, new in words.totals(before, after):
        say = human_bytes if name == "bytes" else "{:,}".format
        rows.append((f"**{name}**", say(old), say(new), share(old, new)))
    yield table(("", "before", "after", "change"), rows, "lrrr")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    """A table; ``sides`` has ``l`` or ``r`` for each column."""
    rules = [{"l": ":--", "r": "--:"}[side] for side in sides]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def _check(check: CheckResult, listed: int) -> Iterator[str]:
    yield table(("tier", "on", "verdict", "found"), map(_tier_row, check.tiers), "llll")
    wrong = [
        f"- {SIGNS[verdict]} {escaped(said)}"
        for tier in check.tiers
        for verdict, said in _not_passed(tier)
        if said != tier.message
    ]
    yield "\n".join(wrong[:_INLINE])
    if wrong[_INLINE:listed]:
        yield _details(f"and {len(wrong) - _INLINE:,} more that do not pass", wrong[_INLINE:listed])
    yield "\n".join(f"- ⚠️ {escaped(warning)}" for warning in check.warnings[:listed])
    yield _details("How it was checked", [f"- {escaped(line)}" for line in _conditions(check)])


def _tier_row(tier: TierResult) -> tuple[str, str, str, str]:
    sign = f"{SIGNS[tier.verdict.value]} {tier.verdict.value}"
    name = f"{tier.tier} {words.TIERS.get(tier.tier, '')}".rstrip()
    return name, code(tier.provider), sign, escaped(tier.message)


def _not_passed(tier: TierResult) -> Iterator[tuple[str, str]]:
    for output in tier.outputs:
        if output.verdict.value != "pass":
            yield output.verdict.value, output.message
    for site in tier.sites:
        if site.verdict.value != "pass":
            yield site.verdict.value, words.site_said(site)


def _conditions(check: CheckResult) -> Iterator[str]:
    yield f"{check.candidate} against {check.reference}, {words.drawn(check)}"
    yield from map(words.certificate, check.runs)
    yield from (f"input {words.fed(use)}" for use in check.inputs)
    if words.limits(check.gates):
        yield f"gates: {words.limits(check.gates)}"
    if check.unpaired:
        yield words.unpaired(check)
    yield from (f"{name}: {value}" for name, value in check.environment.items())


# ---- the steps ----


def _steps(report: Report, listed: int) -> Iterator[str]:
    by_code = attrgetter("code")
    for _, group in groupby(sorted(report.kept, key=by_code), by_code):
        steps = list(group)
        title = f"{steps[0].code} {steps[0].reason}: {counted(len(steps), 'step')} kept"
        lines = [_step(step) for step in steps[:listed]]
        if len(steps) > listed:
            lines.append(f"- and {len(steps) - listed:,} more")
        yield _details(escaped(title), lines)
    yield from _joints(report, listed)


def _joints(report: Report, listed: int) -> Iterator[str]:
    """Operators that became one, and those that stay apart."""
    joined = [f"- {code(j.into)} ({escaped(j.op_type)}): {escaped(j.sentence)}"
              for j in report.joints]  # fmt: skip
    apart = [f"{_step(step)} ({escaped(step.code)})" for step in report.apart]
    for title, lines in (("operators that became one", joined), ("that stay apart", apart)):
        if lines:
            hidden = len(lines) - listed
            shown = [*lines[:listed], *([f"- and {hidden:,} more"] if hidden > 0 else [])]
            yield _details(f"{len(lines):,} {title}", shown)


def _step(step: Step) -> str:
    hint = f"; {step.hint}" if step.hint else ""
    return f"- {code(step.name)} ({escaped(step.op_type)}): {escaped(step.sentence + hint)}"


def _details(title: str, lines: Sequence[str]) -> str:
    # GitHub reads Markdown inside only after an empty line.
    return "\n".join([f"<details><summary>{title}</summary>", "", *lines, "", "</details>"])
