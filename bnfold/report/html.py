"""One self-contained HTML page: the verdict, the number to trust, pictures, then the table.

Nothing is loaded from anywhere, and all of it can be read without a script; the one there is
searches and sorts the table of steps. The page's policy forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.html_check import check_sections, conditions, weights_section
from bnfold.report.html_parts import code, esc, pairs, section, sign, table
from bnfold.report.html_steps import joints_section, steps_section
from bnfold.report.lines import human_bytes, share

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.report.model import Report
    from bnfold.verify.result import CheckResult

_HEADLINES = {
    "pass": "Pass: both models say the same",
    "fail": "Fail: the models do not say the same",
    "inconclusive": "Inconclusive: nothing could be told",
    "unchecked": "Not checked",
}


def render_html(found: Envelope) -> str:
    """``found`` as one HTML page."""
    style, script = _data("html_page.css"), _data("html_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = esc(f"{found.verdict}: {found.model}" if found.model else found.verdict)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} · bnfold</title><style>\n{style}</style></head>\n<body>"
        f"{_header(found)}\n<main>{''.join(_body(found))}</main>\n{_footer(found)}"
        f"<script>{script}</script></body></html>\n"
    )


def _data(name: str) -> str:
    return files("bnfold.report").joinpath(name).read_text(encoding="utf-8")


# ---- the top ----


def _header(found: Envelope) -> str:
    beside = f"against {found.check.reference}" if found.check is not None else ""
    name = found.check.candidate if found.check is not None else found.model
    about = f'<p class="soft small">{esc(beside)}</p>' if beside else ""
    brand = '<p class="brand"><b>bnfold</b> report</p>'
    return f"<header>{brand}<h1>{esc(name)}</h1>{about}{_verdict(found)}{_facts(found)}</header>"


def _verdict(found: Envelope) -> str:
    head = f"<strong>{sign(found.verdict)} {_headline(found)}</strong>"
    parts = [head, *(f"<p>{line}</p>" for line in _said(found))]
    if found.check is not None and found.check.caught:
        label = "<span>The smallest error that this check would have caught</span>"
        # A line may not end within a number.
        caught = re.sub(r"(\d)e-(\d)", r"\1e&#8209;\2", esc(found.check.caught))
        parts.append(f'<div class="trust">{label}<b>{caught}</b></div>')
    return f'<div class="verdict {found.verdict}">{"".join(parts)}</div>'


def _headline(found: Envelope) -> str:
    if found.check is None and found.report is not None and found.report.after is None:
        return "A plan: nothing was changed"
    return _HEADLINES[found.verdict]


def _said(found: Envelope) -> Iterator[str]:
    if found.check is not None:
        yield esc(words.summary(found.check))
        if found.check.guilty:
            yield f"First wrong site: {code(found.check.guilty)}"
    if found.dropped:
        yield esc(words.rolled_back(found.dropped))
    if found.target is not None:
        yield f"Written to {code(found.target)}"
    if found.reproducer is not None:
        yield f"Reproducer in {code(found.reproducer)}"


def _facts(found: Envelope) -> str:
    facts = [*_report_facts(found.report), *_check_facts(found.check)]
    inner = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}<small>{esc(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{inner}</dl>' if inner else ""


def _report_facts(report: Report | None) -> Iterator[tuple[str, str, str]]:
    if report is None:
        return
    of = f"of {len(report.steps):,}; {len(report.kept):,} stay"
    yield "Affine steps folded", f"{len(report.folded):,}", of
    if report.after is not None:
        before, after = report.before, report.after
        change = share(before.nodes, after.nodes)
        yield "Nodes", f"{before.nodes:,} → {after.nodes:,}", change or "no change"
        change = share(before.parameter_bytes, after.parameter_bytes)
        yield "Weights", human_bytes(after.parameter_bytes), change or "no change"


def _check_facts(check: CheckResult | None) -> Iterator[tuple[str, str, str]]:
    if check is None:
        return
    yield "Samples", f"{check.samples:,}", "given" if check.seed is None else f"seed {check.seed}"
    places = list(dict.fromkeys(tier.provider for tier in check.tiers if tier.provider))
    if places:
        short = [place.removesuffix("ExecutionProvider") or place for place in places]
        yield "Ran on", ", ".join(short), "" if len(places) == 1 else f"{len(places)} providers"
    yield "Exit code", str(check.exit_code), check.verdict.value


# ---- the rest ----


def _body(found: Envelope) -> Iterator[str]:
    if found.check is not None:
        yield from check_sections(found.check)
    if found.report is not None:
        yield steps_section(found.report)
        yield joints_section(found.report)
        yield _size(found.report)
    if found.check is not None:
        # Behind the steps: there may be fifty pictures.
        yield weights_section(found.check.weights)
        yield conditions(found.check)


def _size(report: Report) -> str:
    notes = pairs(("note", esc(note)) for note in report.notes)
    if report.after is None:
        return section("Notes", "", notes) if notes else ""
    before, after = report.before, report.after
    changed, sums = words.changed_operators(before, after), words.totals(before, after)
    rows = [(code(name), *_change(name, old, new)) for name, old, new in changed]
    rows += [(f"<b>{name}</b>", *_change(name, old, new)) for name, old, new in sums]
    heads = ("", "before", "after", "change", "")
    return section("Size", "", table(heads, rows, (1, 2, 3, 4), "compact stack"), notes)


def _change(name: str, old: int, new: int) -> tuple[str, str, str, str]:
    say = human_bytes if name == "bytes" else "{:,}".format
    sign_of = "+" if new > old else ""
    return say(old), say(new), f"{sign_of}{say(new - old)}", share(old, new)


def _footer(found: Envelope) -> str:
    version = esc(found.version)
    return f"<footer>Written by bnfold {version}. This page loads nothing from anywhere.</footer>"
