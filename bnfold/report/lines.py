"""Lines of text from a model's names, which may hold anything: printable, wrapped, painted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TextIO

UNCUT = 1 << 20
LISTED = 20  # lines of one kind that are shown; the report file has them all


def one_line(text: str) -> str:
    """``text`` without line ends, escape sequences or anything else that does not print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def encodable(text: str, stream: TextIO) -> str:
    """``text`` as ``stream`` can take it, whose encoding may lack what a node is called."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def wrap(line: str, width: int) -> str:
    """``line`` made printable and no wider than ``width`` where its words allow."""
    line = one_line(line)
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(
        line, max(width, 40), subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def paint(text: str, style: str, color: bool) -> str:
    """``text`` in an ANSI style, where there are colors."""
    return f"\x1b[{style}m{text}\x1b[0m" if color else text


def counted(number: int, noun: str) -> str:
    """``1,000 steps``, and ``1 step``."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def human_bytes(count: int) -> str:
    """``count`` in decimal units: 106240 is ``106.2 kB``."""
    if abs(count) < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if abs(size) < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def share(old: int, new: int) -> str:
    """By how much ``new`` differs from ``old``, in percent; empty where there is no telling."""
    if not old or old == new:
        return ""
    percent = f"{100 * (new - old) / old:+.1f} %"
    return "~0 %" if percent in ("+0.0 %", "-0.0 %") else percent


def more(lines: Sequence[object]) -> list[str]:
    """How many of ``lines`` are not shown; nothing where all are."""
    hidden = len(lines) - LISTED
    return [f"  ... and {hidden} more, see --report"] if hidden > 0 else []
