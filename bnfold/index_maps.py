"""Where channels go: links for the operators that move elements about.

    Transpose        axis perm[k] of the input is axis k of the output
    Reshape          a group of neighbouring axes is a group of neighbouring axes, row-major
    broadcasting     axes are counted from the back; one of size 1 has the same units throughout

Sizes may be symbols or unknown: what can't be matched by name or by number is left to what is
known on both sides of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfold.channel_graph import Dim, Link

Shape = Sequence[Dim]


def same_axes(rank: int, but: Sequence[int] = ()) -> tuple[Link, ...]:
    """Every axis is the same axis, except those that are pooled over or otherwise changed.

    Args:
        rank: The rank of both values.
        but: Axes in no link, counted from the front.
    """
    return tuple(Link((axis,), (axis,)) for axis in range(rank) if axis not in but)


def permuted(permutation: Sequence[int]) -> tuple[Link, ...]:
    """Axis ``permutation[k]`` of the source is axis ``k`` of the target."""
    return tuple(Link((axis,), (k,)) for k, axis in enumerate(permutation))


def along(
    rank: int, axis: int, source: ArrayLike | None = None, target: ArrayLike | None = None
) -> tuple[Link, ...]:
    """All axes are the same, and on ``axis`` entry ``source[i]`` is entry ``target[i]``.

    Args:
        rank: The rank of both values.
        axis: Counted from the front.
        source: Indices into the source; None: all, in order.
        target: Indices into the target; None: all, in order.
    """
    pairs = (None if v is None else np.asarray(v, dtype=np.int64) for v in (source, target))
    moved = Link((axis,), (axis,), *pairs)
    return (*same_axes(rank, (axis,)), moved)


def reduced(rank: int, axes: Sequence[int], *, keep: bool) -> tuple[Link, ...]:
    """``axes`` are reduced to one entry, which stays as an axis of size 1 when ``keep``."""
    left = [axis for axis in range(rank) if axis not in axes]
    return tuple(Link((a,), (a if keep else k,)) for k, a in enumerate(left))


def picked(rank: int, indices: Mapping[int, NDArray[np.int64] | None]) -> tuple[Link, ...]:
    """Along each axis in ``indices`` these entries of the source are taken, in this order.

    Args:
        rank: The rank of both values.
        indices: By axis; None: it is not known which are taken.
    """
    known = {axis: index for axis, index in indices.items() if index is not None and index.size}
    taken = (Link((axis,), (axis,), index) for axis, index in known.items())
    return (*same_axes(rank, tuple(indices)), *taken)


def repeated(size: Dim, times: int) -> NDArray[np.int64] | None:
    """Which entry each one is where an axis is repeated as a whole; None: it is not known."""
    return np.tile(np.arange(size), times) if isinstance(size, int) else None


def bordered(size: Dim, before: int, after: int) -> NDArray[np.int64] | None:
    """Which entry shares its units with each one where an axis is padded; None: it is not known.

    A zero is a zero in any units: those of the entry at the border are as good as others, and
    true ones would bind what has them along the whole axis.
    """
    if not isinstance(size, int) or size == 0:
        return None
    return np.clip(np.arange(-before, size + after), 0, size - 1)


def broadcast(source: Shape, target: Shape) -> tuple[Link, ...]:
    """The source is repeated along axes where it has size 1 and the target has not, or none.

    An axis whose size is unknown in either is linked only where both are the same symbol.
    """
    shift = len(target) - len(source)
    pairs = ((k, k + shift) for k in range(len(source)))
    return tuple(Link((a,), (b,)) for a, b in pairs if _alike(source[a], target[b]))


def _alike(one: Dim, other: Dim) -> bool:
    return one is not None and one == other


# ---- Reshape ----


_FACTOR = re.compile(r"[0-9]+|[A-Za-z_][\w.@]*")


@dataclass(slots=True)
class _Size:
    """A product of numbers and symbols; ``known`` is False once an unknown size is in it."""

    number: int = 1
    symbols: Counter[str] = field(default_factory=Counter)
    known: bool = True

    def times(self, dim: Dim) -> None:
        if isinstance(dim, int):
            self.number *= dim
        elif dim is None:
            self.known = False
        else:
            self._times_factors(dim.split("*"))

    def _times_factors(self, factors: list[str]) -> None:
        """A product of numbers and names, factor by factor; any other expression as a whole."""
        if not all(_FACTOR.fullmatch(factor) for factor in factors):
            factors = ["*".join(factors)]
        for factor in factors:
            if factor.isdigit():
                self.number *= int(factor)
            else:
                self.symbols[factor] += 1

    def equals(self, other: _Size) -> bool:
        known = self.known and other.known
        return known and (self.number, self.symbols) == (other.number, other.symbols)


def reshaped(source: Shape, target: Shape) -> tuple[Link, ...]:
    """The groups of axes that hold the same elements before and after a Reshape.

    Groups are closed as soon as their sizes are equal, from the front, then from the back; what
    is left between is one group.
    """
    if 0 in source or 0 in target:
        return ()
    front = _groups(source, target)
    start, begin = (front[-1][0].stop, front[-1][1].stop) if front else (0, 0)
    back = _groups(source[start:][::-1], target[begin:][::-1])
    ends = [
        (range(len(source) - s.stop, len(source) - s.start),
         range(len(target) - t.stop, len(target) - t.start)) for s, t in back
    ]  # fmt: skip
    stop, end = (ends[-1][0].start, ends[-1][1].start) if ends else (len(source), len(target))
    middle = [(range(start, stop), range(begin, end))]
    groups = [*front, *middle, *reversed(ends)]
    return tuple(Link(tuple(s), tuple(t)) for s, t in groups if s and t)


def _groups(source: Shape, target: Shape) -> list[tuple[range, range]]:
    """The smallest groups of leading axes of equal size, as far as sizes are known."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        first, second = _Size(), _Size()
        a, b = i, j
        first.times(source[a])
        second.times(target[b])
        while not first.equals(second):
            if not (first.known and second.known):
                return groups
            if _behind(first, second) and a + 1 < len(source):
                a += 1
                first.times(source[a])
            elif _behind(second, first) and b + 1 < len(target):
                b += 1
                second.times(target[b])
            else:
                return groups
        groups.append((range(i, a + 1), range(j, b + 1)))
        i, j = a + 1, b + 1
    return groups


def _behind(one: _Size, other: _Size) -> bool:
    """Whether ``one`` could still become ``other`` by further factors."""
    return other.number % one.number == 0 and one.symbols <= other.symbols
