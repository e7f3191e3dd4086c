"""What ONNX Runtime says on stderr while a provider starts, which its exceptions leave out."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
# From the most telling to the least; the part in brackets is the reason.
_REASONS = (
    re.compile(r"with error: (.+)"),
    re.compile(r"(CUDA failure \d+: [^;]+)"),
    re.compile(r"\[ERROR\] (?:\[\w+\] )?(.+)"),
    re.compile(r"(Please install [^.]+)"),
    re.compile(r"\[E:onnxruntime:[^\]]*\] (.+)"),
)
_COLOR = re.compile(r"\x1b\[[\d;]*m")


class Heard:
    """What was said; empty until the ``with`` block is left."""

    text: str = ""

    @property
    def reason(self) -> str:
        """Why a provider did not start, in one line; empty where nothing was said of it."""
        text = _COLOR.sub("", self.text)
        for pattern in _REASONS:
            if found := pattern.search(text):
                return found[1].strip()[:300]
        return ""


@contextmanager
def heard() -> Iterator[Heard]:
    """Keeps what the process writes to stderr, native code included.

    For the short time in which a session is made: it is the only place where ONNX Runtime names
    the library that is missing.
    """
    said = Heard()
    try:
        kept = os.dup(_STDERR)
    except OSError:  # no stderr at all
        yield said
        return
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), _STDERR)
        try:
            yield said
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
