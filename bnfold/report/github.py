"""What GitHub Actions shows of a run: annotations (workflow commands) and the step summary.

The commands are lines on stdout, ``::error file=F,title=T::MESSAGE``; the summary is Markdown for
the file that ``GITHUB_STEP_SUMMARY`` names. Both are capped as GitHub caps them, the worst first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.lines import one_line
from bnfold.report.markdown import ALL, render_markdown
from bnfold.report.text import count_steps

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.verify.result import CheckResult

SUMMARY_BYTES = 1 << 20  # of one step; GitHub drops a longer one as a whole
SHOWN = 10  # annotations of each level that GitHub shows of one step
_CLOSE = "\n\n</details>"
_CUT = "\n\n*The rest does not fit here; see the report file.*\n"


def workflow_commands(found: Envelope) -> tuple[str, ...]:
    """Workflow commands: errors for what does not pass, warnings, and one notice of the steps."""
    lines: list[str] = []
    if found.check is not None:
        lines += list(_errors(found.check))[:SHOWN]
    lines += list(_warnings(found))[:SHOWN]
    if found.report is not None:
        lines.append(command("notice", found.model, "bnfold", count_steps(found.report)))
    return tuple(lines)


def _errors(check: CheckResult) -> Iterator[str]:
    """Also what is inconclusive: it does not pass."""
    for tier in sorted(words.spoken(check), key=lambda tier: tier.verdict.value != "fail"):
        if tier.verdict.value == "pass":
            continue
        guilty = f" (first wrong site: {check.guilty})" if check.guilty else ""
        title = f"bnfold: {tier.verdict.value}, {words.tier_place(tier)}"
        yield command("error", check.candidate, title, tier.message + guilty)


def _warnings(found: Envelope) -> Iterator[str]:
    if found.dropped:
        said = words.rolled_back(found.dropped)
        yield command("warning", found.model, "bnfold: fold rolled back", said)
    for warning in found.check.warnings if found.check is not None else ():
        yield command("warning", found.model, "bnfold: hazard", warning)


def command(level: str, file: str, title: str, message: str) -> str:
    """One workflow command; no name in it can end it or start another.

    Args:
        level: ``error``, ``warning`` or ``notice``.
        file: The file that it is about; none where empty.
        title: The title.
        message: What it says.
    """
    given = {"file": file, "title": title}
    properties = ",".join(f"{key}={_property(text)}" for key, text in given.items() if text)
    return f"::{level} {properties}::{_data(message)}"


def _data(text: str) -> str:
    # one_line would turn line ends into \n; as %0A they stay what they are.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "%0A".join(one_line(line).replace("%", "%25") for line in lines)


def _property(text: str) -> str:
    escaped = one_line(text).replace("%", "%25")
    return escaped.replace(":", "%3A").replace(",", "%2C")


def step_summary(found: Envelope, *, limit: int = SUMMARY_BYTES) -> str:
    """The summary of a step in Markdown, at most ``limit`` bytes of UTF-8."""
    for listed in (ALL, 1000, 100, 10):
        text = render_markdown(found, listed=listed)
        if len(text.encode()) <= limit:
            return text
    room = limit - len(_CUT.encode()) - len(_CLOSE)
    whole_lines = text.encode()[:room].decode(errors="ignore").rpartition("\n")[0]
    is_open = whole_lines.count("<details>") > whole_lines.count("</details>")
    return whole_lines + _CLOSE * is_open + _CUT
