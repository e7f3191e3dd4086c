"""One envelope for every command, as JSON; ``schema.json`` beside this file describes it.

Strict JSON in ASCII: it parses everywhere, whatever a model calls its nodes. A number that is not
finite becomes a string (``"inf"``, ``"-inf"``, ``"nan"``), because JSON has no word for it.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bnfold.report.envelope import Envelope
from bnfold.verify.plain import plain

if TYPE_CHECKING:
    from bnfold.report.model import Report
    from bnfold.verify.result import CheckResult


def to_json(
    *,
    report: Report | None = None,
    check: CheckResult | None = None,
    target: str | None = None,
    dropped: tuple[str, ...] = (),
    reproducer: str | None = None,
) -> str:
    """What a command found, as JSON; the arguments are the attributes of `Envelope`."""
    return render_json(Envelope(report, check, target, dropped, reproducer))


def render_json(found: Envelope) -> str:
    """``found`` as JSON."""
    return json.dumps(plain(found.to_dict()), indent=2, allow_nan=False)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what ``--report FILE.json`` writes."""
    text = files("bnfold.report").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
