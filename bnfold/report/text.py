"""A report and a check as text for people. Pure: values in, text out.

Nothing is cut: lines wider than ``width`` are wrapped between words, and `UNCUT` is the width of a
pipe. Names come from the model and may hold anything, so every line is made printable first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from bnfold.report.lines import (
    LISTED,
    UNCUT,
    aligned,
    counted,
    human_bytes,
    more,
    one_line,
    paint,
    share,
    wrap,
)
from bnfold.report.text_bench import render_bench
from bnfold.report.text_check import render_check
from bnfold.report.words import changed_operators, rolled_back, totals

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.report.model import Report, Step

_BOLD, _YELLOW = "1", "33"


def render_text(found: Envelope) -> str:
    """Everything that was found, as a text file."""
    parts = []
    if found.report is not None:
        changed = found.report.after is not None
        parts.append((render_report if changed else render_explain)(found.report))
        parts += [one_line(line) for line in (rolled_back(found.dropped),) if line]
    if found.check is not None:
        parts.append(render_check(found.check))
    if found.bench is not None:
        parts.append(render_bench(found.bench))
    if found.target is not None:
        parts.append(one_line(f"written to {found.target}"))
    if found.reproducer is not None:
        parts.append(one_line(f"reproducer in {found.reproducer}"))
    return "\n\n".join(parts)


def render_report(report: Report, *, color: bool = False, width: int = UNCUT) -> str:
    """The model before and after, how many steps were folded, and why the others stay.

    Args:
        report: What was done to the model.
        color: Whether to use ANSI colors.
        width: Columns of the terminal.
    """
    title = _title(report, color, width)
    counts = "\n".join(wrap(line, width) for line in counts_of(report))
    parts = [title, *_table(report), counts, *_notes(report, width)]
    parts += [_group(list(steps), color, width) for _, steps in groupby(_by_code(report), _code)]
    return "\n\n".join(parts)


def render_explain(report: Report, *, color: bool = False, width: int = UNCUT) -> str:
    """Each affine step on a line of its own: first what is folded, then what stays and why.

    Operators that become one are on lines of their own, and so are those that nearly do.

    Arguments as for `render_report`.
    """
    counts = [wrap(line, width) for line in counts_of(report)]
    parts = ["\n".join([_title(report, color, width), *counts])]
    parts += _notes(report, width)
    folded = [wrap(f"fold  {_named(step)}: {step.sentence}", width) for step in report.folded]
    kept = [
        wrap(f"keep  {_named(step)}: {_reason(step)}: {step.sentence}{_hint(step)}", width)
        for step in report.kept
    ]
    joined = [wrap(f"join  {j.into} ({j.op_type}): {j.sentence}", width) for j in report.joints]
    apart = [
        wrap(f"apart {_named(step)}: {_reason(step)}: {step.sentence}{_hint(step)}", width)
        for step in report.apart
    ]
    listed = (joined, folded, apart, kept)
    return "\n\n".join(parts + ["\n".join(lines) for lines in listed if lines])


def _notes(report: Report, width: int) -> list[str]:
    lines = [wrap(f"note: {note}", width) for note in report.notes]
    return ["\n".join(lines)] if lines else []


def render_outcome(target: str, *, written: bool, checked: bool, folded: bool) -> str:
    """Where the file is and whether it was checked, or that there is none."""
    if not written:
        return one_line(f"nothing was written to {target}: the check did not pass")
    if checked:
        return one_line(f"written to {target}")
    why = "" if folded else ": nothing was folded"
    return one_line(f"written to {target}, not checked{why}")


def count_steps(report: Report) -> str:
    """How many steps were folded, in which ways, and how many stay; in one line."""
    if not report.steps:
        return "no affine steps: nothing to fold"
    ways = Counter(step.how for step in report.folded)
    how = ", ".join(f"{count:,} {way}" for way, count in ways.most_common())
    folded = f"{len(report.folded):,} folded" + (f" ({how})" if how else "")
    forms = Counter(step.form for step in report.kept if step.form)
    written = ", ".join(f"{count:,} as {form}" for form, count in forms.most_common())
    kept = f"{len(report.kept):,} kept" + (f" ({written})" if written else "")
    return f"{counted(len(report.steps), 'affine step')}: {folded}, {kept}"


def counts_of(report: Report) -> list[str]:
    """What was folded, what was joined, and what stays apart, each in one line."""
    return [count_steps(report), *count_joints(report)]


def count_joints(report: Report) -> Iterator[str]:
    """How many operators became one, and how many stay apart for which reasons."""
    if report.joints:
        kinds = Counter(joint.kind for joint in report.joints)
        how = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        before = sum(len(joint.operators) + 1 for joint in report.joints)
        after = counted(len(report.joints), "linear operator")
        yield f"joined: {counted(before, 'operator')} became {after} ({how})"
    if report.apart:
        reasons = Counter(_reason(step) for step in report.apart)
        why = ", ".join(f"{count:,} for {reason}" for reason, count in reasons.most_common())
        yield f"linear operators next to each other that stay apart: {len(report.apart):,} ({why})"


# ---- the table ----


def _table(report: Report) -> list[str]:
    """The table as one text, or nothing where the model was not changed."""
    if report.after is None:
        return []
    before, after = report.before, report.after
    rows = [("", "before", "after", "change", "")]
    rows += [_row(name, old, new) for name, old, new in changed_operators(before, after)]
    for name, old, new in totals(before, after):
        rows.append(_row(name, old, new, human_bytes if name == "bytes" else "{:,}".format))
    return [aligned(rows)]


def _row(
    name: str, old: int, new: int, say: Callable[[int], str] = "{:,}".format
) -> tuple[str, str, str, str, str]:
    delta = new - old
    sign = "+" if delta > 0 else ""
    return one_line(name), say(old), say(new), f"{sign}{say(delta)}", share(old, new)


# ---- the steps ----


def _title(report: Report, color: bool, width: int) -> str:
    return paint(wrap(f"{report.source} (level {report.level})", width), _BOLD, color)


def _by_code(report: Report) -> list[Step]:
    return sorted(report.kept, key=_code)


def _code(step: Step) -> str:
    return step.code


def _reason(step: Step) -> str:
    return f"{step.code} {step.reason}"


def _group(steps: Sequence[Step], color: bool, width: int) -> str:
    """The steps that stay for one reason."""
    head = paint(f"kept for {_reason(steps[0])}: {counted(len(steps), 'step')}", _YELLOW, color)
    lines = [wrap(f"  {_named(step)}: {step.sentence}", width) for step in steps[:LISTED]]
    return "\n".join([head, *lines, *more(steps)])


def _named(step: Step) -> str:
    return f"{step.name} ({step.op_type})"


def _hint(step: Step) -> str:
    return f"; {step.hint}" if step.hint else ""
