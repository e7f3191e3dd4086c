"""What ONNX Runtime says on stderr while a provider starts, which its exceptions leave out."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_ONE = threading.RLock()
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
        return reason_in(self.text)


def reason_in(text: str) -> str:
    """The part of what ONNX Runtime says that tells why a provider did not start."""
    text = _COLOR.sub("", text)
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
    # One at a time, or the second would give back what the first has put in its place.
    with _ONE, tempfile.TemporaryFile() as file:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # no stderr at all
            yield said
            return
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(file.fileno(), _STDERR)
        try:
            yield said
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
