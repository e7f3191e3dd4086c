"""One result model, printed in several ways. Pure: values in, text out."""

from __future__ import annotations

from typing import Any

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what ``--report FILE.json`` writes."""
    # Loaded on use: it needs the classes that it describes, and they need numpy.
    from bnfold.report import as_json

    return as_json.schema()
