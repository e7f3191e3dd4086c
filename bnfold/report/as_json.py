"""One envelope for every command: ``{"schema_version", "report", "check", "target"}``.

Strict JSON in ASCII: it parses everywhere, whatever a model calls its nodes. A number that is not
finite becomes null, because JSON has no word for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from bnfold.report.model import SCHEMA_VERSION, Report

if TYPE_CHECKING:
    from bnfold.verify.check import CheckResult


def to_json(
    *, report: Report | None = None, check: CheckResult | None = None, target: str | None = None
) -> str:
    """What a command found, as JSON.

    Args:
        report: The verdict on each affine step; null where no model was folded.
        check: The verdict on the result; null where nothing was checked.
        target: The file that was written; null where none was.
    """
    found = {
        "schema_version": SCHEMA_VERSION,
        "report": report.to_dict() if report else None,
        "check": check.to_dict() if check else None,
        "target": target,
    }
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """``value`` in the types that JSON has."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
