"""Everything that a command found, in one value: what every format is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bnfold import __version__
from bnfold.errors import UsageError
from bnfold.report.bench import BenchResult
from bnfold.report.model import SCHEMA_VERSION, Report
from bnfold.verify.plain import plain, restored
from bnfold.verify.result import CheckResult

_TODO = "give a report that bnfold wrote with --report FILE.json"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a command found.

    Attributes:
        report: The verdict on each affine step; None where no model was folded.
        check: The verdict on the result; None where nothing was checked.
        target: The file that was written; None where none was.
        dropped: Steps whose fold was taken back because the check did not pass with it, by name.
        reproducer: The folder with a reproducer of what failed; None where there is none.
        bench: The latency of models side by side; None where nothing was timed.
        version: The version of bnfold that found it.
    """

    report: Report | None = None
    check: CheckResult | None = None
    target: str | None = None
    dropped: tuple[str, ...] = ()
    reproducer: str | None = None
    bench: BenchResult | None = None
    version: str = __version__

    @property
    def model(self) -> str:
        """The file that the findings are about: what was folded, timed or checked."""
        if self.report is not None:
            return self.report.source
        if self.bench is not None and self.bench.models:
            return self.bench.models[0].file
        return self.check.candidate if self.check is not None else ""

    @property
    def verdict(self) -> str:
        """``pass``, ``fail`` or ``inconclusive``; ``unchecked`` where nothing was checked."""
        return self.check.verdict.value if self.check is not None else "unchecked"

    def to_dict(self) -> dict[str, Any]:
        """The envelope for JSON: strings, numbers, lists, mappings and None only."""
        return {
            "schema_version": SCHEMA_VERSION,
            "tool": {"name": "bnfold", "version": self.version},
            "report": plain(self.report.to_dict()) if self.report else None,
            "check": self.check.to_dict() if self.check else None,
            "target": self.target,
            "dropped": list(self.dropped),
            "reproducer": self.reproducer,
            "bench": plain(self.bench),
        }


def envelope_from_json(text: str, file: str = "") -> Envelope:
    """The envelope that `bnfold.report.as_json.render_json` wrote, to judge or render it again.

    Args:
        text: The JSON.
        file: Its name, for errors.

    Raises:
        UsageError: It is none, or its schema is newer than this version of bnfold.
    """
    stored = _parsed(text, file)
    version = stored["schema_version"]
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"the report has schema version {version}, and this bnfold ({__version__}) knows "
            f"versions up to {SCHEMA_VERSION}", file=file, todo="use a newer bnfold",
        )  # fmt: skip
    try:
        return Envelope(
            report=restored(Report | None, stored.get("report")),
            check=restored(CheckResult | None, stored.get("check")),
            target=restored(str | None, stored.get("target")),
            dropped=restored(tuple[str, ...], stored.get("dropped", ())),
            reproducer=restored(str | None, stored.get("reproducer")),
            bench=restored(BenchResult | None, stored.get("bench")),
            version=str((stored.get("tool") or {}).get("version", "")),
        )
    except (ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"it is not a report of bnfold: {error}", file=file, todo=_TODO) from error


def _parsed(text: str, file: str) -> Mapping[str, Any]:
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is not JSON: {error}", file=file, todo=_TODO) from error
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise UsageError("it has no schema_version", file=file, todo=_TODO)
    known: Mapping[str, Any] = stored
    return known
