"""Fold algebra: per-channel affine maps, and what a linear operator becomes when it absorbs one.

    m(x) = a x + b                         on each channel
    m2 o m1                                a = a2 a1,  b = a2 b1 + b2
    m(W x + c) = (a W) x + (a c + b)       output side: rows of W scaled
    W m(x) + c = (W a) x + (c + W b)       input side: columns of W scaled

Everything is computed in float64 and cast once, at the end. Knows arrays, and no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfold.rounding import cast_once, round_into

Array = NDArray[Any]
F64 = NDArray[np.float64]

_SLAB = 1 << 16  # elements computed at a time: float64 of that many stay in the cache

__all__ = [
    "F64",
    "AffineMap",
    "Layout",
    "RangeFault",
    "RangeGuard",
    "cast_once",
    "fold_weight",
    "in_channels",
    "out_channels",
    "range_fault",
    "scale_factors",
    "scale_rows",
    "shift_through",
    "vector_fault",
]


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``x -> scale * x + shift`` per channel.

    Only data: values that are not finite are carried along, and never warned of.

    Args:
        scale: Shape (C,), or (1,) when it is the same on every channel; float64.
        shift: Of the same shape; either of the two is widened to the other.

    Raises:
        ValueError: The two have different lengths, and neither has length 1.
    """

    scale: F64
    shift: F64

    def __post_init__(self) -> None:
        # Copies: the caller's array may change, or be a mapped file that is to be closed.
        scale, shift = (np.array(v, dtype=np.float64).ravel() for v in (self.scale, self.shift))
        size = max(scale.size, shift.size)
        object.__setattr__(self, "scale", np.broadcast_to(scale, (size,)))
        object.__setattr__(self, "shift", np.broadcast_to(shift, (size,)))

    @classmethod
    def identity(cls) -> AffineMap:
        """``x -> x``."""
        return cls.of([1.0], [0.0])

    @classmethod
    def scaling(cls, scale: ArrayLike) -> AffineMap:
        """``x -> scale * x``."""
        return cls.of(scale, [0.0])

    @classmethod
    def shifting(cls, shift: ArrayLike) -> AffineMap:
        """``x -> x + shift``."""
        return cls.of([1.0], shift)

    @classmethod
    def of(cls, scale: ArrayLike, shift: ArrayLike) -> AffineMap:
        """``x -> scale * x + shift`` from anything array-like."""
        return cls(np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64))

    @classmethod
    def batch_norm(
        cls, gamma: ArrayLike, beta: ArrayLike, mean: ArrayLike, variance: ArrayLike, epsilon: float
    ) -> AffineMap:
        """Batch normalisation in inference: ``gamma (x - mean) / sqrt(variance + epsilon) + beta``.

        Args:
            gamma: Shape (C,) or (1,), as all four; the learned scale.
            beta: The learned shift.
            mean: The running mean.
            variance: The running variance; not the standard deviation.
            epsilon: What is added to the variance.

        Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 2, steps 10 and 11.
        """
        g, b, m, v = (np.asarray(p, dtype=np.float64) for p in (gamma, beta, mean, variance))
        with np.errstate(all="ignore"):
            scale = g / np.sqrt(v + epsilon)
            return cls(scale, b - m * scale)

    @property
    def channels(self) -> int:
        """C, or 1."""
        return int(self.scale.size)

    @property
    def is_scaling(self) -> bool:
        """Whether the shift is 0 everywhere."""
        return not self.shift.any()

    @property
    def is_shifting(self) -> bool:
        """Whether the scale is 1 everywhere."""
        return bool((self.scale == 1).all())

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return self.is_scaling and self.is_shifting

    @property
    def finite(self) -> bool:
        """Whether all scales and shifts are finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    def after(self, first: AffineMap) -> AffineMap:
        """``self o first``: apply ``first``, then this."""
        with np.errstate(all="ignore"):
            return AffineMap(self.scale * first.scale, self.scale * first.shift + self.shift)

    def expand(self, channels: int) -> AffineMap:
        """The same map with one scale and shift for each of ``channels``."""
        size = (channels,)
        return AffineMap(np.broadcast_to(self.scale, size), np.broadcast_to(self.shift, size))

    def take(self, index: ArrayLike) -> AffineMap:
        """The map of the channels ``index``; of length 1 still when it is the same on all."""
        if self.channels == 1:
            return self
        picked = np.asarray(index)
        return AffineMap(self.scale[picked], self.shift[picked])

    def inverse(self) -> AffineMap:
        """The map that undoes this one.

        Raises:
            ZeroDivisionError: A scale is 0.
        """
        if not self.scale.all():
            channel = int(np.argmin(self.scale != 0))
            raise ZeroDivisionError(f"the scale of channel {channel} is 0")
        with np.errstate(all="ignore"):
            return AffineMap(1 / self.scale, -self.shift / self.scale)

    def apply(self, x: Array, axis: int) -> F64:
        """The map applied to ``x`` with channels on ``axis``, in float64."""
        shape = [1] * x.ndim
        shape[axis] = self.channels
        with np.errstate(all="ignore"):
            return x.astype(np.float64) * self.scale.reshape(shape) + self.shift.reshape(shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels of a linear operator's weight are: on two axes that are neighbours.

    With groups, the first of the two axes counts all channels of its side and the second those
    of one group: Conv (M, C/g, ...) is ``Layout(0, 1, g)``, ConvTranspose (C, M/g, ...) is
    ``Layout(1, 0, g)``. Gemm and MatMul have no groups: (K, N) is ``Layout(1, 0)``, (N, K) is
    ``Layout(0, 1)``; with leading batch axes count from the back: ``Layout(-1, -2)``.
    Axes after the two are positions of the kernel, axes before them are batches.
    """

    out_axis: int
    in_axis: int
    groups: int = 1


def out_channels(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of output channels of a weight of ``shape``."""
    axis = layout.out_axis % len(shape)
    return int(shape[axis]) * (1 if axis < layout.in_axis % len(shape) else layout.groups)


def in_channels(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of input channels of a weight of ``shape``."""
    return out_channels(shape, Layout(layout.in_axis, layout.out_axis, layout.groups))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A weight seen as ``(batches * groups, rows, columns * taps)``, whatever its layout.

    Rows are the first channel axis within a group, columns the second one, taps the positions of
    the kernel. Conv has its output channels on the rows, ConvTranspose on the columns.
    """

    batches: int
    groups: int
    rows: int
    columns: int
    taps: int
    out_on_rows: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: Layout) -> _Blocks:
        out_axis, in_axis = layout.out_axis % len(shape), layout.in_axis % len(shape)
        first = min(out_axis, in_axis)
        if abs(out_axis - in_axis) != 1 or shape[first] % layout.groups:
            raise ValueError(f"a weight of shape {shape} does not have {layout}")
        return cls(
            prod(shape[:first]), layout.groups, shape[first] // layout.groups,
            shape[first + 1], prod(shape[first + 2 :]), out_axis == first,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batches * self.groups, self.rows, self.columns * self.taps

    def spread(self, values: F64, *, on_rows: bool) -> F64:
        """Per-channel ``values`` of one side, broadcast to ``shape`` without a copy of it."""
        count = self.rows if on_rows else self.columns
        values = np.broadcast_to(values, (self.groups * count,)).reshape(self.groups, count)
        along = values[:, :, None] if on_rows else np.repeat(values, self.taps, axis=1)[:, None, :]
        return np.broadcast_to(along, self.shape)

    @property
    def reduced(self) -> int:
        """The axis of ``shape`` to sum over, or to take the largest of, for the output side."""
        return 2 if self.out_on_rows else 1

    def outputs(self, dtype: DTypeLike) -> Array:
        """Zeros to reduce into: ``shape`` without its reduced axis."""
        blocks, rows, inner = self.shape
        return np.zeros((blocks, rows if self.out_on_rows else inner), dtype=dtype)

    def per_channel(self, outputs: Array) -> Array:
        """What was reduced, as ``(batches, M, taps or 1)``."""
        taps = 1 if self.out_on_rows else self.taps
        return outputs.reshape(self.batches, -1, taps)

    def slabs(self) -> Iterator[tuple[slice, slice]]:
        """Blocks and rows to compute at a time: many small blocks, or some rows of a large one."""
        blocks, rows, inner = self.shape
        some_blocks = max(1, _SLAB // max(1, rows * inner))
        some_rows = max(1, _SLAB // max(1, inner))
        for block in range(0, blocks, some_blocks):
            for row in range(0, rows, some_rows):
                yield slice(block, block + some_blocks), slice(row, row + some_rows)

    def wide_slabs(self, weight: Array) -> Iterator[tuple[tuple[slice, slice], F64]]:
        """The slabs of ``weight`` in float64, one after the other in the same memory."""
        view = weight.reshape(self.shape)
        memory = np.empty(min(weight.size, max(_SLAB, self.shape[2])))
        for place in self.slabs():
            slab = view[place]
            wide = memory[: slab.size].reshape(slab.shape)
            wide[...] = slab
            yield place, wide


def _beside(shape: tuple[int, ...], layout: Layout, axis: int, values: F64) -> F64:
    """Per-channel ``values`` of the side on ``axis``, shaped to broadcast against the weight."""
    along = [1] * len(shape)
    along[axis] = shape[axis]
    if layout.groups == 1 or axis == 0:
        return np.broadcast_to(values, (shape[axis],)).reshape(along)
    along[0] = shape[0]  # each row of axis 0 meets the channels of its own group
    values = np.broadcast_to(values, (layout.groups * shape[1],)).reshape(layout.groups, -1)
    return np.repeat(values, shape[0] // layout.groups, axis=0).reshape(along)


def scale_factors(
    shape: tuple[int, ...],
    layout: Layout,
    *,
    output_scale: F64 | None = None,
    input_scale: F64 | None = None,
) -> list[F64]:
    """What a weight of ``shape`` is multiplied by, shaped to broadcast against it.

    Args:
        shape: The weight's shape.
        layout: Where its channels are.
        output_scale: Shape (M,) or (1,), float64.
        input_scale: Shape (C,) or (1,), float64.
    """
    sides = ((layout.out_axis, output_scale), (layout.in_axis, input_scale))
    return [_beside(shape, layout, axis, scale) for axis, scale in sides if scale is not None]


def scale_rows(
    block: Array, factors: list[F64], start: int, rows: int, into: Array | None = None
) -> Array:
    """Rows ``start`` and following of a weight, multiplied by ``factors`` and cast once.

    Args:
        block: These rows, of any float type; not changed.
        factors: Of the whole weight, from `scale_factors`.
        start: The index of the first row of ``block`` in the weight.
        rows: How many rows the whole weight has.
        into: Where to put the result; a new array by default.

    Returns:
        A C-contiguous array of the block's type and shape, correctly rounded.
    """
    result = np.empty(block.shape, dtype=block.dtype) if into is None else into
    if block.ndim > 2 and block.size > 4 * _SLAB * block.shape[0]:  # one row is a large matrix
        for at, (row, target) in enumerate(zip(block, result, strict=True), start):
            inner = [factor[at if factor.shape[0] == rows else 0] for factor in factors]
            scale_rows(row, inner, 0, row.shape[0], target)
        return result
    step = max(1, _SLAB * block.shape[0] // max(1, block.size))
    memory = np.empty((min(step, block.shape[0]), *block.shape[1:]))
    for at in range(0, block.shape[0], step):
        wide = memory[: min(step, block.shape[0] - at)]
        with np.errstate(all="ignore"):  # the range guard looks at the result
            np.copyto(wide, block[at : at + step])
            for factor in factors:
                first = start + at
                part = factor if factor.shape[0] != rows else factor[first : first + wide.shape[0]]
                np.multiply(wide, part, out=wide)
        round_into(result[at : at + step], wide)
    return result


def fold_weight(
    weight: Array,
    layout: Layout,
    *,
    output_scale: F64 | None = None,
    input_scale: F64 | None = None,
) -> Array:
    """``output_scale * weight * input_scale`` per channel, in float64, cast once.

    Args:
        weight: Any float type; it is not changed.
        layout: Where its channels are.
        output_scale: Shape (M,) or (1,), float64.
        input_scale: Shape (C,) or (1,), float64.

    Returns:
        A new C-contiguous array of the weight's type and shape, correctly rounded.
    """
    factors = scale_factors(
        weight.shape, layout, output_scale=output_scale, input_scale=input_scale
    )
    return scale_rows(weight, factors, 0, weight.shape[0])


def shift_through(weight: Array, layout: Layout, shift: F64) -> F64:
    """What a shift of the input adds to each output channel.

    Args:
        weight: Any float type.
        layout: Where its channels are.
        shift: Shape (C,) or (1,), float64.

    Returns:
        Shape (M,), float64: the sum over the input channels of the group and all positions of
        the kernel of ``weight * shift``.

    Raises:
        ValueError: The weight has leading batch axes, and the batches would have different
            shifts; or the shift has not C values, or the weight not the layout.
    """
    blocks = _Blocks.of(weight.shape, layout)
    along = blocks.spread(shift, on_rows=not blocks.out_on_rows)
    total = blocks.outputs(np.float64)
    with np.errstate(all="ignore"):
        for place, wide in blocks.wide_slabs(weight):
            wide *= along[place]
            total[place if blocks.out_on_rows else place[0]] += wide.sum(axis=blocks.reduced)
        first, *others = blocks.per_channel(total).sum(axis=2)
    if not all(np.array_equal(first, other, equal_nan=True) for other in others):
        raise ValueError(f"a weight of shape {weight.shape} has no one shift for all batches")
    return np.asarray(first, dtype=np.float64)


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
