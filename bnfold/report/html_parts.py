"""Pieces of the page: text made harmless, tables, marks of a verdict."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from bnfold.report.lines import one_line

# A shape for each verdict, so that none is told by its color alone.
_SHAPES = {
    "pass": "M2 8.5 6.2 12.5 14 4",
    "fail": "M3 3 13 13M13 3 3 13",
    "inconclusive": "M8 2V9.5M8 13V13.2",
    "unchecked": "M3 8H13",
}
_SAID = {"unchecked": "not checked"}


def esc(text: str) -> str:
    """``text`` as HTML, in an element or in a quoted attribute."""
    return html.escape(one_line(text), quote=True)


def code(name: str) -> str:
    """A name from the model; its lines break after a slash where they can."""
    return f"<code>{esc(name).replace('/', '/<wbr>')}</code>" if name else ""


def shortened(name: str, width: int) -> str:
    """``name`` with its middle left out where it is longer than ``width``; not escaped."""
    if len(name) <= width:
        return name
    half = (width - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def sign(verdict: str) -> str:
    """The shape of a verdict."""
    return (
        '<svg viewBox="0 0 16 16" aria-hidden="true" fill="none" stroke="currentColor" '
        f'stroke-width="2.4" stroke-linecap="round"><path d="{_SHAPES[verdict]}"/></svg>'
    )


def mark(verdict: str) -> str:
    """A verdict: its shape, its word and its color."""
    return f'<span class="mark {verdict}">{sign(verdict)} {_SAID.get(verdict, verdict)}</span>'


def section(title: str, about: str, *parts: str) -> str:
    """A section of the page.

    Args:
        title: Its title, as text.
        about: What is to be seen, as HTML; none where empty.
        parts: What is in it, as HTML.
    """
    said = f"<p>{about}</p>" if about else ""
    return f"<section><h2>{esc(title)}</h2>{said}{''.join(parts)}</section>"


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), kind: str = ""
) -> str:
    """A table.

    Args:
        heads: The columns' titles, as text.
        rows: Each row's cells, as HTML.
        numbers: Columns that hold numbers.
        kind: Its classes.
    """
    head = "".join(f"<th{_side(i, numbers)}>{esc(name)}</th>" for i, name in enumerate(heads))
    body = "".join(f"<tr>{''.join(cells(heads, row, numbers))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def cells(heads: Sequence[str], row: Sequence[str], numbers: Sequence[int] = ()) -> list[str]:
    """A row's cells; each knows its column's title, for screens too narrow for a table."""
    return [
        f"<td{_side(i, numbers)}{_label(head)}>{cell}</td>"
        for i, (head, cell) in enumerate(zip(heads, row, strict=True))
    ]


def _side(column: int, numbers: Sequence[int]) -> str:
    return ' class="n"' if column in numbers else ""


def _label(head: str) -> str:
    return f' data-label="{esc(head)}"' if head else ""


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they stand for; both as HTML."""
    inner = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items)
    return f'<dl class="pairs">{inner}</dl>' if inner else ""


def legend(items: Iterable[tuple[str, str]]) -> str:
    """What the signs in a picture mean: each sign as HTML, and its words."""
    inner = "".join(f"<li>{sample}{esc(said)}</li>" for sample, said in items)
    return f'<ul class="legend">{inner}</ul>'


def swatch(inner: str) -> str:
    """A sign of a chart, for its legend."""
    return f'<svg class="chart" viewBox="0 0 22 12" aria-hidden="true">{inner}</svg>'
