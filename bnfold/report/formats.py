"""The formats of a report, and which one a file's ending asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from bnfold.errors import UsageError
from bnfold.report.as_json import render_json
from bnfold.report.html import render_html
from bnfold.report.junit import render_junit
from bnfold.report.markdown import render_markdown
from bnfold.report.sarif import render_sarif
from bnfold.report.text import render_text

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope

FORMATS: Mapping[str, Callable[[Envelope], str]] = {
    "json": render_json,
    "junit": render_junit,
    "sarif": render_sarif,
    "markdown": render_markdown,
    "html": render_html,
    "text": render_text,
}
# The first ending that fits: a .sarif.json is not any JSON.
_ENDINGS = {
    ".sarif.json": "sarif",
    ".json": "json",
    ".xml": "junit",
    ".sarif": "sarif",
    ".md": "markdown",
    ".html": "html",
    ".txt": "text",
}


# What can say how long models take: the others are about verdicts.
OF_TIMES = ("json", "markdown", "text")


def format_of(path: str, forms: Collection[str] = FORMATS) -> str:
    """The format that ``path`` asks for by its ending; ``-`` is JSON.

    Args:
        path: Where the report is to be.
        forms: Those that the command has.

    Raises:
        UsageError: There is no format with this ending, or the command has none.
    """
    if path == "-":
        return "json"
    for ending, name in _ENDINGS.items():
        if path.lower().endswith(ending):
            if name in forms:
                return name
            break
    known = ", ".join(f"{ending} ({name})" for ending, name in _ENDINGS.items() if name in forms)
    raise UsageError(
        "its ending asks for no format of a report", file=path, todo=f"the endings are {known}"
    )


def render(name: str, found: Envelope) -> str:
    """``found`` in the format ``name``, one of `FORMATS`."""
    return FORMATS[name](found)
