"""A logarithmic axis that also has a place for 0 and for what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BAND = 13.0  # height of the rows of zeros and of what is not finite
_TICKS = 5


@dataclass(frozen=True, slots=True)
class LogAxis:
    """Decades ``low`` to ``high`` on the heights ``top`` to ``bottom``.

    Attributes:
        low: The lowest decade.
        high: The highest.
        top: Height of the highest decade.
        bottom: Height of the lowest.
        zero: Height of what is 0, below the lowest decade.
        beyond: Height of what is not finite, above the highest.
    """

    low: int
    high: int
    top: float
    bottom: float
    zero: float
    beyond: float

    @classmethod
    def around(cls, values: Iterable[float], top: float, bottom: float) -> LogAxis:
        """The axis on which all ``values`` find a place."""
        shown = list(values)
        logs = [math.log10(v) for v in shown if math.isfinite(v) and v > 0] or [0.0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        high += low == high
        inner_top = top + _BAND * any(not math.isfinite(v) for v in shown)
        inner_bottom = bottom - _BAND * any(math.isfinite(v) and v <= 0 for v in shown)
        return cls(low, high, inner_top, inner_bottom, bottom, top)

    def at(self, value: float) -> float:
        """The height of ``value``."""
        if not math.isfinite(value):
            return self.beyond
        if value <= 0:
            return self.zero
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.bottom - part * (self.bottom - self.top), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and labels of the marks on the axis, from below."""
        step = max(1, math.ceil((self.high - self.low) / _TICKS))
        marks = [(self.at(10.0**d), decade(d)) for d in range(self.low, self.high + 1, step)]
        if self.zero != self.bottom:
            marks.insert(0, (self.zero, "0"))
        if self.beyond != self.top:
            marks.append((self.beyond, "inf"))
        return marks


def decade(power: int) -> str:
    """``10⁻⁶``; plain numbers where they are as short."""
    plain = {-1: "0.1", 0: "1", 1: "10", 2: "100"}
    return plain.get(power) or "10" + str(power).translate(_SUPERSCRIPTS)


def grid(axis: LogAxis, left: float, right: float) -> str:
    """The marks of ``axis`` with their lines, from ``left`` to ``right``."""
    parts = []
    for height, label in axis.ticks():
        parts.append(f'<path class="grid" d="M{left:g} {height:g}H{right:g}"/>')
        parts.append(f'<text x="{left - 6:g}" y="{height + 4:g}" text-anchor="end">{label}</text>')
    return "".join(parts)
