"""Fold algebra: per-channel affine maps, and what a linear operator becomes when it absorbs one.

    m(x) = a x + b                         on each channel
    m2 o m1                                a = a2 a1,  b = a2 b1 + b2
    m(W x + c) = (a W) x + (a c + b)       output side: rows of W scaled
    W m(x) + c = (W a) x + (c + W b)       input side: columns of W scaled

Everything is computed in float64 and cast once, at the end. Knows arrays, and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bnfold.layout import (
    F64,
    SLAB,
    Array,
    Blocks,
    Layout,
    beside,
    in_channels,
    out_channels,
)
from bnfold.range_guard import RangeFault, RangeGuard, range_fault, vector_fault
from bnfold.rounding import cast_once, round_into

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
        for name, values in (("scale", scale), ("shift", shift)):
            wide = values if values.size == size else np.broadcast_to(values, (size,))
            wide.flags.writeable = False
            object.__setattr__(self, name, wide)

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
    return [beside(shape, layout, axis, scale) for axis, scale in sides if scale is not None]


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
    if block.ndim > 2 and block.size > 4 * SLAB * block.shape[0]:  # one row is a large matrix
        for at, (row, target) in enumerate(zip(block, result, strict=True), start):
            inner = [factor[at if factor.shape[0] == rows else 0] for factor in factors]
            scale_rows(row, inner, 0, row.shape[0], target)
        return result
    step = max(1, SLAB * block.shape[0] // max(1, block.size))
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
    blocks = Blocks.of(weight.shape, layout)
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
