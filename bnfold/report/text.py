"""A report and a check as text for people. Pure: values in, text out.

Nothing is cut: lines wider than ``width`` are wrapped between words, and `UNCUT` is the width of a
pipe. Names come from the model and may hold anything, so every line is made printable first.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfold.report.model import Report, Size, Step
    from bnfold.verify.check import CheckResult, TierResult

UNCUT = 1 << 20
LISTED = 20  # kept steps shown for each reason; the report file has them all

_BOLD, _RED, _GREEN, _YELLOW = "1", "31", "32", "33"
_COLORS = {"pass": _GREEN, "fail": _RED, "inconclusive": _YELLOW}


def render_report(report: Report, *, color: bool = False, width: int = UNCUT) -> str:
    """The model before and after, how many steps were folded, and why the others stay.

    Args:
        report: What was done to the model.
        color: Whether to use ANSI colors.
        width: Columns of the terminal.
    """
    title = _title(report, color, width)
    parts = [title, *_table(report), _wrap(count_steps(report), width), *_notes(report, width)]
    parts += [_group(list(steps), color, width) for _, steps in groupby(_by_code(report), _code)]
    return "\n\n".join(parts)


def render_explain(report: Report, *, color: bool = False, width: int = UNCUT) -> str:
    """Each affine step on a line of its own: first what is folded, then what stays and why.

    Arguments as for `render_report`.
    """
    parts = [f"{_title(report, color, width)}\n{_wrap(count_steps(report), width)}"]
    parts += _notes(report, width)
    folded = [_wrap(f"fold  {_named(step)}: {step.sentence}", width) for step in report.folded]
    kept = [
        _wrap(f"keep  {_named(step)}: {_reason(step)}: {step.sentence}{_hint(step)}", width)
        for step in report.kept
    ]
    return "\n\n".join(parts + ["\n".join(lines) for lines in (folded, kept) if lines])


def _notes(report: Report, width: int) -> list[str]:
    lines = [_wrap(f"note: {note}", width) for note in report.notes]
    return ["\n".join(lines)] if lines else []


def render_check(check: CheckResult, *, color: bool = False, width: int = UNCUT) -> str:
    """The verdict, then a line for each tier with its figures, then the warnings.

    Arguments as for `render_report`.
    """
    verdict = _paint(check.verdict.value, _COLORS[check.verdict.value], color)
    drawn = "given" if check.seed is None else f"seed {check.seed}"
    lines = [f"check: {verdict} ({_count(check.samples, 'sample')}, {drawn})"]
    lines += [line for tier in check.tiers for line in _tier(tier, color, width)]
    lines += [_wrap(f"  warning: {warning}", width) for warning in check.warnings]
    return "\n".join(lines)


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
    how = ", ".join(f"{count} {way}" for way, count in ways.most_common())
    folded = f"{len(report.folded)} folded" + (f" ({how})" if how else "")
    return f"{_count(len(report.steps), 'affine step')}: {folded}, {len(report.kept)} kept"


def one_line(text: str) -> str:
    """``text`` without line ends, escape sequences or anything else that does not print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def human_bytes(count: int) -> str:
    """``count`` in decimal units: 106240 is ``106.2 kB``."""
    if abs(count) < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if abs(size) < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


# ---- the table ----


def _table(report: Report) -> list[str]:
    """The table as one text, or nothing where the model was not changed."""
    if report.after is None:
        return []
    before, after = report.before, report.after
    rows = [("", "before", "after", "change", "")]
    rows += [_row(name, old, new) for name, old, new in _changed_operators(before, after)]
    rows += [
        _row("nodes", before.nodes, after.nodes),
        _row("parameters", before.parameters, after.parameters),
        _row("bytes", before.parameter_bytes, after.parameter_bytes, human_bytes),
    ]
    return [_aligned(rows)]


def _changed_operators(before: Size, after: Size) -> list[tuple[str, int, int]]:
    """Operators whose number changed, the largest change first."""
    names = {*before.operators, *after.operators}
    counts = [(n, before.operators.get(n, 0), after.operators.get(n, 0)) for n in names]
    changed = [(name, old, new) for name, old, new in counts if old != new]
    return sorted(changed, key=lambda row: (-abs(row[2] - row[1]), row[0]))


def _row(
    name: str, old: int, new: int, say: Callable[[int], str] = "{:,}".format
) -> tuple[str, str, str, str, str]:
    delta = new - old
    sign = "+" if delta > 0 else ""
    return one_line(name), say(old), say(new), f"{sign}{say(delta)}", _share(delta, old)


def _share(delta: int, old: int) -> str:
    if not (old and delta):
        return ""
    percent = f"{100 * delta / old:+.1f} %"
    return "~0 %" if percent in ("+0.0 %", "-0.0 %") else percent


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


# ---- the steps ----


def _title(report: Report, color: bool, width: int) -> str:
    return _paint(_wrap(f"{report.source} (level {report.level})", width), _BOLD, color)


def _by_code(report: Report) -> list[Step]:
    return sorted(report.kept, key=_code)


def _code(step: Step) -> str:
    return step.code


def _reason(step: Step) -> str:
    return f"{step.code} {step.reason}"


def _group(steps: Sequence[Step], color: bool, width: int) -> str:
    """The steps that stay for one reason."""
    head = _paint(f"kept for {_reason(steps[0])}: {_count(len(steps), 'step')}", _YELLOW, color)
    lines = [_wrap(f"  {_named(step)}: {step.sentence}", width) for step in steps[:LISTED]]
    return "\n".join([head, *lines, *_more(steps)])


def _named(step: Step) -> str:
    return f"{step.name} ({step.op_type})"


def _hint(step: Step) -> str:
    return f"; {step.hint}" if step.hint else ""


def _tier(tier: TierResult, color: bool, width: int) -> list[str]:
    """What the tier says, then the outputs that do not pass and are not what it speaks of."""
    place = f"tier {tier.tier}" + (f" on {tier.provider}" if tier.provider else "")
    lines = [_verdict(f"  {place}", tier.verdict.value, tier.message, color, width)]
    others = [
        _verdict("    also", output.verdict.value, output.message, color, width)
        for output in tier.outputs
        if output.verdict.value != "pass" and output.message != tier.message
    ]
    return lines + others[:LISTED] + _more(others)


def _verdict(place: str, verdict: str, message: str, color: bool, width: int) -> str:
    # Painted last: the wrapping counts characters, and the escapes take no room.
    painted = _paint(verdict, _COLORS[verdict], color)
    line = _wrap(f"{place}: {verdict}: {message}", width)
    return line.replace(f": {verdict}: ", f": {painted}: ", 1)


def _more(lines: Sequence[object]) -> list[str]:
    hidden = len(lines) - LISTED
    return [f"  ... and {hidden} more, see --report"] if hidden > 0 else []


# ---- lines ----


def _wrap(line: str, width: int) -> str:
    """``line`` made printable and no wider than ``width`` where its words allow."""
    line = one_line(line)
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(
        line, max(width, 40), subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _paint(text: str, style: str, color: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if color else text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
