"""Does a folded weight still fit its type? Judged channel by channel, while it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfold.layout import F64, Array, Layout, out_channels


@dataclass(frozen=True, slots=True)
class RangeFault:
    """Output channel ``channel`` leaves the range of its type.

    ``what`` is "overflows", "underflows", or, of NaN, "is not finite".
    """

    channel: int
    what: str


class RangeGuard:
    """Watches a weight being folded, block by block, for channels that leave their type's range.

    A channel overflows when it holds a value that is not finite and held none before. It
    underflows when its largest magnitude was a normal number before and is not one after: then
    its weights have lost digits that they had.

    Args:
        shape: The shape of the whole weight.
        layout: Where its channels are.
    """

    def __init__(self, shape: tuple[int, ...], layout: Layout, dtype: DTypeLike) -> None:
        self._rows = shape[0]
        self._axis = layout.out_axis % len(shape)
        self._grouped = layout.groups if self._axis == 1 else 1
        size = (self._grouped, out_channels(shape, layout) // self._grouped)
        self._was, self._now = np.zeros(size), np.zeros(size)
        self._least = _smallest_normal(dtype)

    def see(self, start: int, before: Array, after: Array) -> None:
        """Rows ``start`` and following, as they were and as they are."""
        now = self._note(self._now, start, after)
        # Only a channel that is suspicious in every block where it counts can be at fault, so
        # that the weight as it was is looked at where the folded one is suspicious.
        if not (np.isfinite(now) & (now >= self._least)).all():
            self._note(self._was, start, before)

    def _note(self, largest: F64, start: int, block: Array) -> F64:
        """Enter the largest magnitudes of ``block``; also returned."""
        if self._axis == 0:
            found = _magnitude(block.reshape(block.shape[0], -1), (1,))
            largest[0, start : start + block.shape[0]] = found
        elif self._grouped == 1:
            others = tuple(axis for axis in range(block.ndim) if axis != self._axis)
            found = _magnitude(block, others)
            np.maximum(largest[0], found, out=largest[0])
        else:
            group = np.arange(start, start + block.shape[0]) * self._grouped // self._rows
            found = _magnitude(block.reshape(*block.shape[:2], -1), (2,))
            np.maximum.at(largest, group, found)
        return found

    def fault(self, zeroed: NDArray[np.bool_] | None = None) -> RangeFault | None:
        """The first channel that left the range, if any.

        Args:
            zeroed: Shape (M,): channels that a scale of 0 empties on purpose.
        """
        was, now = self._was.ravel(), self._now.ravel()
        over = np.isfinite(was) & ~np.isfinite(now)
        if over.any():
            return RangeFault(int(np.argmax(over)), "overflows")
        under = (was >= self._least) & (now < self._least)
        if zeroed is not None:
            under &= ~zeroed
        return RangeFault(int(np.argmax(under)), "underflows") if under.any() else None


def _magnitude(block: Array, axes: tuple[int, ...]) -> F64:
    """The largest magnitude over ``axes``; NaN where there is one.

    Without their sign, the bits of floats are in the order of the floats: infinity is larger
    than any number and NaN is larger than infinity. Of 16-bit floats, and in parts of rows,
    integers are many times as quick to compare.
    """
    unsigned = np.dtype(f"u{block.dtype.itemsize}")
    bits = np.bitwise_and(block.view(unsigned), np.iinfo(unsigned).max >> 1)
    if 0 in axes:
        bits = bits.max(axis=0, keepdims=True, initial=0)
    largest = bits.max(axis=axes, initial=0)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        result: F64 = largest.view(block.dtype).astype(np.float64)
    return result


def _smallest_normal(dtype: DTypeLike) -> float:
    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


def range_fault(
    before: Array, after: Array, layout: Layout, *, zeroed: NDArray[np.bool_] | None = None
) -> RangeFault | None:
    """`RangeGuard` on a whole weight at once."""
    guard = RangeGuard(before.shape, layout, after.dtype)
    guard.see(0, before, after)
    return guard.fault(zeroed)


def vector_fault(before: Array | None, after: Array) -> RangeFault | None:
    """Whether folding took a bias out of the range of its type.

    A bias that becomes small is no fault: what matters is its size beside the sum it joins.

    Args:
        before: The values as they were, or in float64 before the cast; None when there were none.
        after: The values in their stored type, of the same shape; channels on the last axis.
    """
    stored = np.atleast_1d(after).astype(np.float64)
    bad = ~np.isfinite(stored)
    if before is not None:
        bad &= np.isfinite(before.astype(np.float64))
    if not bad.any():
        return None
    places = np.argwhere(bad)
    first = places[np.argmin(places[:, -1])]
    what = "is not finite" if np.isnan(stored[tuple(first)]) else "overflows"
    return RangeFault(int(first[-1]), what)


_LARGE = 2.0**16  # as large as what a scale is applied to may well be


def scale_fault(before: F64, after: Array) -> RangeFault | None:
    """Whether the scale of a channel lost digits since it is too small for its type.

    It is no fault where what comes of it is so small that it loses them as well.

    Args:
        before: The scale of each channel, in float64.
        after: The same in its stored type.
    """
    least, stored = _smallest_normal(after.dtype), after.astype(np.float64)
    bad = (np.abs(stored) < least) & (np.abs(stored - before) * _LARGE >= least)
    return RangeFault(int(np.argmax(bad)), "underflows") if bad.any() else None
