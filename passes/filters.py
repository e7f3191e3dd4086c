"""What one value is of another: channels, groups and the positions read, without the weights.

    first, then second     o reads  second.stride' o + ...  :  positions add up, strides multiply
    one beside the other   the union of what both read

Two filters that are put after one another are exact at the border where the second pads no zeros,
or where what it pads is what the first would give there: no shift, and only zeros read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

from bnfold.channel_graph import POINT, Taps


@dataclass(frozen=True, slots=True)
class Filter:
    """A linear map from channels and positions of a source to those of a value.

    Attributes:
        ins: Channels of the source.
        outs: Channels of the value.
        groups: Into how many blocks the channels fall on both sides.
        taps: What is read along each spatial axis.
        shifted: Whether something is added that may not be 0.
    """

    ins: int
    outs: int
    groups: int
    taps: tuple[Taps, ...]
    shifted: bool = False

    @classmethod
    def identity(cls, channels: int, axes: int) -> Filter:
        """Every channel and every position for itself."""
        return cls(channels, channels, channels, (POINT,) * axes)

    @property
    def weights(self) -> int:
        """How many weights an operator with this filter has."""
        return self.outs * (self.ins // self.groups) * prod(taps.count for taps in self.taps)

    @property
    def thinning(self) -> int:
        """To how many positions of the source there is one of the value."""
        return prod(taps.stride for taps in self.taps)

    def shift(self) -> Filter:
        """This, and something added."""
        return replace(self, shifted=True)

    def then(self, other: Filter) -> Filter:
        """``other`` of what this gives."""
        taps = tuple(map(after_one_another, self.taps, other.taps))
        groups = gcd(self.groups, other.groups)
        return Filter(self.ins, other.outs, groups, taps, self.shifted or other.shifted)

    def meets_border(self, other: Filter) -> bool:
        """Whether ``other`` of what this gives is one filter at the border of the source too."""
        return all(map(self._meets, self.taps, other.taps))

    def _meets(self, mine: Taps, other: Taps) -> bool:
        before = other.begin <= 0 or (not self.shifted and mine.last < mine.stride)
        after = other.end <= 0 or (not self.shifted and mine.first + mine.slack + 1 >= 0)
        return before and after

    def runnable(self, *, symmetric: bool = False) -> Filter:
        """The same with zeros as weights where it would begin, or end, inside of the source.

        Args:
            symmetric: Also where it would pad more zeros on one side of an axis than on the other.
        """
        return replace(self, taps=tuple(_reaching(taps, symmetric) for taps in self.taps))


def beside(filters: Sequence[Filter]) -> Filter | None:
    """The sum of ``filters``; None where they do not give the same positions and channels."""
    first = filters[0]
    taps = tuple(map(union, zip(*(f.taps for f in filters), strict=True)))
    alike = all((f.ins, f.outs) == (first.ins, first.outs) for f in filters)
    if not alike or None in taps:
        return None
    groups = gcd(*(f.groups for f in filters))
    known = tuple(found for found in taps if found is not None)
    return Filter(first.ins, first.outs, groups, known, any(f.shifted for f in filters))


def after_one_another(first: Taps, second: Taps) -> Taps:
    """What ``second`` reads of the source that ``first`` reads."""
    start, end = (
        first.stride * outer + inner
        for outer, inner in ((second.first, first.first), (second.last, first.last))
    )
    steps = (first.stride * _between(second), _between(first))
    slack = first.slack + first.stride * (1 + second.slack)
    return _spanning(start, end, steps, first.stride * second.stride, slack)


def union(several: tuple[Taps, ...]) -> Taps | None:
    """What any of ``several`` reads; None where they do not make the same positions."""
    one = several[0]
    if any((taps.stride, taps.slack) != (one.stride, one.slack) for taps in several):
        return None
    start = min(taps.first for taps in several)
    steps = (distance for t in several for distance in (t.first - start, _between(t)))
    return _spanning(start, max(t.last for t in several), steps, one.stride, one.slack)


def _between(taps: Taps) -> int:
    """How far apart the positions are; 0 for a single one."""
    return taps.step if taps.count > 1 else 0


def _spanning(first: int, last: int, steps: Iterable[int], stride: int, slack: int) -> Taps:
    step = gcd(*steps) or 1
    return Taps((last - first) // step + 1, first, step, stride, slack)


def _reaching(taps: Taps, symmetric: bool) -> Taps:
    begin, end = max(taps.begin, 0), max(taps.end, 0)
    if symmetric:
        taps = _in_steps_of(taps, gcd(taps.step, taps.begin - taps.end))
        begin = end = max(begin, end)
    before = -(-max(0, begin - taps.begin) // taps.step)
    after = -(-max(0, end - taps.end) // taps.step)
    return replace(taps, count=taps.count + before + after, first=taps.first - before * taps.step)


def _in_steps_of(taps: Taps, step: int) -> Taps:
    """The same with steps that are smaller by a whole factor."""
    return replace(taps, count=(taps.count - 1) * (taps.step // step) + 1, step=step)
