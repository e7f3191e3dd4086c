"""One envelope for every command, as JSON; ``schema.json`` beside this file describes it.

Strict JSON in ASCII: it parses everywhere, whatever a model calls its nodes. A number that is not
finite becomes a string (``"inf"``, ``"-inf"``, ``"nan"``), because JSON has no word for it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope


def render_json(found: Envelope) -> str:
    """``found`` as JSON."""
    return json.dumps(found.to_dict(), indent=2, allow_nan=False)
