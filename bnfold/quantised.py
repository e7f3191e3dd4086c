"""A weight stored as integers times a scale, and what it becomes when its channels are scaled.

    w = s (q - z)          the scale s > 0 and the zero point z vary along one axis, or not at all
    a w = (a s) (q - z)    a > 0: the scale alone changes
    a w = (|a| s) (q' - z) a < 0: q' = 2 z - q; or (|a| s) (q' - z') with q' = c - q, z' = c - z,
                           where c = lowest + highest, so that q' always fits
    0 w = s' (z - z)       a = 0: the integers become the zero point

Arrays only, in float64 and int64; knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bnfold.channel_graph import Side
from bnfold.layout import F64, Array, Layout, beside, out_channels

I64 = NDArray[np.int64]

# What numbers that are the same in real arithmetic may be apart, after sums and products along a
# path of float64.
_ROUNDING = 2.0**-36


def line(shape: tuple[int, ...], layout: Layout, axis: int) -> int | None:
    """Along which axis of a weight the channels of the side on ``axis`` lie one by one.

    Where there are groups the second of the two axes counts the channels of one group, so that no
    axis of the weight tells all of them apart; one channel a group lies with the groups.
    """
    first = min(layout.out_axis % len(shape), layout.in_axis % len(shape))
    axis %= len(shape)
    if axis == first or layout.groups == 1:
        return axis
    return first if shape[axis] == 1 else None


def varies(
    shape: tuple[int, ...], layout: Layout, axis: int | None, *, widened: bool, summed: bool = True
) -> tuple[Side, ...]:
    """Along the channels of which sides what the weight is multiplied by may vary.

    Args:
        shape: The weight's shape.
        layout: Where its channels are.
        axis: The axis along which its scale varies; None where there is a single scale.
        widened: Whether a single scale may become one for each entry of an axis.
        summed: Whether that may be an axis that is summed over. Kernels that compute with integers
            multiply by the scale behind the sum.
    """
    lines = {Side.OUTPUT: line(shape, layout, layout.out_axis),
             Side.INPUT: line(shape, layout, layout.in_axis)}  # fmt: skip
    if axis is not None:
        places = [axis]
    else:
        found = [place for place in lines.values() if place is not None]
        places = list(dict.fromkeys(found)) if widened else []
        places = places if summed else [place for place in places if place == lines[Side.OUTPUT]]
    sides = []
    for place in places:
        held = Side.NONE
        for side, lies in lines.items():
            held |= side if lies == place else Side.NONE
        sides.append(held)
    return tuple(sides) or (Side.NONE,)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What a weight is multiplied by along ``axis``: one number for each entry, or (None) one."""

    axis: int | None
    values: F64

    def per_output(self, shape: tuple[int, ...], layout: Layout) -> F64 | None:
        """The same for each output channel; None where it is not one number for each."""
        channels = out_channels(shape, layout)
        if self.axis is None:
            return np.broadcast_to(self.values, (channels,))
        if self.axis != line(shape, layout, layout.out_axis):
            return None
        if self.values.size == channels:
            return self.values
        rows = self.values.reshape(channels, -1)
        return rows[:, 0] if (rows == rows[:, :1]).all() else None


def factor(
    shape: tuple[int, ...], layout: Layout, axis: int | None, output: F64 | None, inputs: F64 | None
) -> Factor:
    """The scales of both sides as one factor.

    Args:
        shape: The weight's shape.
        layout: Where its channels are.
        axis: The axis along which the weight's scale varies; None where there is a single one.
        output: What the output channels are scaled by; None: nothing.
        inputs: What the input channels are scaled by; None: nothing.

    Raises:
        ValueError: There is no one axis along which all of it lies.
    """
    whole = Factor(axis, np.ones(1 if axis is None else shape[axis]))
    for side, values in ((layout.out_axis, output), (layout.in_axis, inputs)):
        if values is not None:
            whole = _times(shape, layout, whole, side, values)
    return whole


def _times(shape: tuple[int, ...], layout: Layout, whole: Factor, side: int, values: F64) -> Factor:
    apart = np.abs(values - values[0]).max()
    if apart <= _ROUNDING * np.abs(values[0]):
        return Factor(whole.axis, whole.values * values[0])
    lies = line(shape, layout, side)
    if lies is None or whole.axis not in (None, lies):
        raise ValueError(f"a scale for each channel on axis {side} does not lie on {whole.axis}")
    return Factor(lies, whole.values * beside(shape, layout, side % len(shape), values).ravel())


def steady(values: F64) -> F64:
    """The sizes of ``values``, with the largest of the others in the place of 0.

    A scale of 0 is none that integers can be stored with; with a large one a bias in its units
    does not overflow.
    """
    sizes = np.abs(values)
    return np.where(sizes > 0, sizes, sizes.max() or 1.0)


def scale_fault(wide: F64, made: Array) -> str:
    """Why scales do not fit the type that they are stored in; empty if they do.

    Args:
        wide: The scales in float64; none of them is 0.
        made: The same in their type.
    """
    sizes = np.abs(made.astype(np.float64))
    least = float(ml_dtypes.finfo(made.dtype).smallest_normal)  # type: ignore[no-untyped-call]
    over, under = np.isfinite(wide) & ~np.isfinite(sizes), sizes < least
    if over.any():
        return f"the scale overflows on channel {int(np.argmax(over))}"
    return f"the scale underflows on channel {int(np.argmax(under))}" if under.any() else ""


class UnnegatableError(Exception):
    """The integers of ``entry`` along the axis can't be negated about their zero point."""

    def __init__(self, entry: int) -> None:
        super().__init__(entry)
        self.entry = entry


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """How integers are to change, entry by entry along ``axis`` (None: all of them alike).

    Attributes:
        axis: The axis.
        centre: Where an entry is negated, ``q' = centre - q``.
        negated: Which entries are.
        emptied: Which entries become their zero point.
        zero_point: The zero points afterwards.
    """

    axis: int | None
    centre: I64
    negated: NDArray[np.bool_]
    emptied: NDArray[np.bool_]
    zero_point: I64

    @property
    def changes(self) -> bool:
        """Whether any integer changes."""
        return bool(self.negated.any() or self.emptied.any())

    def of(self, integers: Array) -> Array:
        """The integers as they are to be stored, in their type."""
        shape = [1] * integers.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        negated, emptied, centre, zero = (
            v.reshape(shape) for v in (self.negated, self.emptied, self.centre, self.zero_point)
        )
        wide = integers.astype(np.int64)
        wide = np.where(negated, centre - wide, wide)
        return np.where(emptied, zero, wide).astype(integers.dtype)


def turned(
    integers: Array, axis: int | None, zero_point: I64, values: F64,
    limits: tuple[int, int], *, keep_zero: bool,
) -> Turned:  # fmt: skip
    """How integers change when what they stand for is multiplied by ``values``.

    Args:
        integers: The integers.
        axis: The axis along which ``values`` lie; None: there is one.
        zero_point: Of the shape of ``values``.
        values: Entry by entry.
        limits: The lowest and the highest number of the integers' type.
        keep_zero: Whether the zero points must not come to differ: kernels that compute with
            integers take one for all channels.

    Raises:
        UnnegatableError: Integers would leave their type.
    """
    negated, emptied = values < 0, values == 0
    low, high = _extremes(integers, axis)
    mirror = 2 * zero_point
    unfit = negated & ((mirror - high < limits[0]) | (mirror - low > limits[1]))
    if not unfit.any():
        return Turned(axis, mirror, negated, emptied, zero_point)
    whole = np.full_like(zero_point, sum(limits))
    every = bool((negated | emptied).all())
    moved = np.ones_like(negated) if every else unfit
    if keep_zero and not (every and (zero_point == zero_point[0]).all()):
        raise UnnegatableError(int(np.argmax(unfit)))
    centre = np.where(moved, whole, mirror)
    return Turned(axis, centre, negated, emptied, np.where(moved, whole - zero_point, zero_point))


def _extremes(integers: Array, axis: int | None) -> tuple[I64, I64]:
    wide = integers.astype(np.int64)
    if axis is None:
        return np.array([wide.min(initial=0)]), np.array([wide.max(initial=0)])
    others = tuple(k for k in range(wide.ndim) if k != axis)
    return wide.min(axis=others), wide.max(axis=others)


# ---- biases ----

INT32 = np.iinfo(np.int32)
SHARE = 0.01
"""How much of the noise of integer activations the rounding of a bias may add to it.

Rounding the activation to its scale has an error of variance s_x^2 / 12 on each input, which is
(s_x s_w)^2 / 12 times the sum of squares of a channel's integers on its output. Rounding the bias
to s_x s_w adds (s_x s_w)^2 / 12 at most on average, a hundredth of which is 0.04 dB.
"""


@dataclass(frozen=True, slots=True, eq=False)
class RoundedBias:
    """A bias as integers of ``step``; ``fault`` says why it can't be one."""

    integers: NDArray[np.int32]
    fault: str = ""


def rounded_bias(wide: F64, step: F64, power: F64) -> RoundedBias:
    """``wide`` in integers of ``step``, rounded once.

    Args:
        wide: The bias, shape (M,).
        step: The scale as it is stored, shape (M,).
        power: The sum of squares of the weight's integers on each output channel, shape (M,).
    """
    with np.errstate(all="ignore"):
        exact = np.rint(wide / step)
    over = ~(np.abs(exact) <= INT32.max)
    if over.any():
        channel = int(np.argmax(over))
        return RoundedBias(np.zeros(0, np.int32), f"overflows int32 on channel {channel}")
    error = wide - exact * step
    if np.square(error).sum() > SHARE / 12 * (np.square(step) * power).sum() and not _exact(
        error, wide
    ):
        worst = int(np.argmax(np.abs(error)))
        return RoundedBias(np.zeros(0, np.int32), f"is too coarse in int32 on channel {worst}")
    return RoundedBias(exact.astype(np.int32))


def _exact(error: F64, wide: F64) -> bool:
    """Whether what is rounded off is what storing a scale in float32 rounds off anyway."""
    return bool((np.abs(error) <= 2.0**-23 * np.abs(wide)).all())


def power(integers: Array, zero_point: I64, axis: int | None, layout: Layout) -> F64:
    """The sum of squares of ``integers - zero_point`` on each output channel, shape (M,)."""
    shape = [1] * integers.ndim
    if axis is not None:
        shape[axis] = -1
    centred = integers.astype(np.float64) - zero_point.reshape(shape)
    out_axis, in_axis = layout.out_axis % integers.ndim, layout.in_axis % integers.ndim
    squares = np.square(centred)
    if out_axis < in_axis or layout.groups == 1:
        return np.asarray(squares.sum(axis=tuple(k for k in range(squares.ndim) if k != out_axis)))
    taps = tuple(range(2, squares.ndim))
    grouped = squares.sum(axis=taps).reshape(layout.groups, -1, integers.shape[out_axis])
    return np.asarray(grouped.sum(axis=1).ravel())
