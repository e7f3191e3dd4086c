"""One result model, printed in several ways. Pure: values in, text out."""

from __future__ import annotations

from typing import Any

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what ``--report FILE.json`` writes."""
    import json  # both on use: the command line starts by importing this package
    from importlib.resources import files

    text = files("bnfold.report").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
