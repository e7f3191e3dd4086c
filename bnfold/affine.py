"""Fold algebra: per-channel affine maps, and what a linear operator becomes when it absorbs one.

    m(x) = a x + b                         on each channel
    m2 o m1                                a = a2 a1,  b = a2 b1 + b2
    m(W x + c) = (a W) x + (a c + b)       output side: rows of W scaled
    W m(x) + c = (W a) x + (c + W b)       input side: columns of W scaled

Everything is computed in float64 and cast once, at the end. Knows arrays, and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfold.rounding import cast_once

Array = NDArray[Any]
F64 = NDArray[np.float64]

_SLAB = 1 << 15  # elements computed at a time: float64 of that many stay in the cache

__all__ = [
    "F64", "AffineMap", "Layout", "RangeFault", "cast_once", "fold_weight", "in_channels",
    "out_channels", "range_fault", "shift_through", "vector_fault",
]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``x -> scale * x + shift`` per channel.

    Args:
        scale: Shape (C,), or (1,) when it is the same on every channel; float64.
        shift: Of the same shape; either of the two is widened to the other.
    """

    scale: F64
    shift: F64

    def __post_init__(self) -> None:
        scale, shift = (np.asarray(v, dtype=np.float64).ravel() for v in (self.scale, self.shift))
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

        Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 2, steps 10 and 11.
        """
        g, b, m, v = (np.asarray(p, dtype=np.float64) for p in (gamma, beta, mean, variance))
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
        return AffineMap(self.scale * first.scale, self.scale * first.shift + self.shift)

    def expand(self, channels: int) -> AffineMap:
        """The same map with one scale and shift for each of ``channels``."""
        size = (channels,)
        return AffineMap(np.broadcast_to(self.scale, size), np.broadcast_to(self.shift, size))

    def take(self, index: ArrayLike) -> AffineMap:
        """The map of the channels ``index``."""
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
        return AffineMap(1 / self.scale, -self.shift / self.scale)

    def apply(self, x: Array, axis: int) -> F64:
        """The map applied to ``x`` with channels on ``axis``, in float64."""
        shape = [1] * x.ndim
        shape[axis] = self.channels
        return x.astype(np.float64) * self.scale.reshape(shape) + self.shift.reshape(shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels of a linear operator's weight are.

    With groups, the axis that is 0 counts all channels of its side and the axis that is 1 those
    of one group: Conv (M, C/g, ...) is ``Layout(0, 1, g)``, ConvTranspose (C, M/g, ...) is
    ``Layout(1, 0, g)``. Gemm and MatMul have no groups: (K, N) is ``Layout(1, 0)``, (N, K) is
    ``Layout(0, 1)``; with leading batch axes count from the back: ``Layout(-1, -2)``.
    """

    out_axis: int
    in_axis: int
    groups: int = 1


def out_channels(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of output channels of a weight of ``shape``."""
    return _counted(shape, layout, layout.out_axis)


def in_channels(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of input channels of a weight of ``shape``."""
    return _counted(shape, layout, layout.in_axis)


def _counted(shape: tuple[int, ...], layout: Layout, axis: int) -> int:
    return int(shape[axis]) * (layout.groups if axis == 1 else 1)


def _beside(shape: tuple[int, ...], layout: Layout, axis: int, values: F64) -> F64:
    """Per-channel ``values`` of the side on ``axis``, shaped to broadcast against the weight."""
    values = np.broadcast_to(values, (_counted(shape, layout, axis),))
    along = [1] * len(shape)
    along[axis] = shape[axis]
    if layout.groups == 1 or axis == 0:
        return values.reshape(along)
    along[0] = shape[0]  # each row of axis 0 meets the channels of its own group
    rows = np.repeat(values.reshape(layout.groups, shape[1]), shape[0] // layout.groups, axis=0)
    return rows.reshape(along)


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
    scales = []
    for axis, scale in ((layout.out_axis, output_scale), (layout.in_axis, input_scale)):
        if scale is not None:
            scales.append(_beside(weight.shape, layout, axis, scale))
    result = np.empty(weight.shape, dtype=weight.dtype)
    if not scales:
        result[...] = weight
        return result
    inner = max(1, weight.size // max(1, weight.shape[0]))
    step = max(1, _SLAB // inner)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        wide = weight[rows].astype(np.float64)
        for scale in scales:
            wide *= scale[rows] if scale.shape[0] == weight.shape[0] else scale
        result[rows] = cast_once(wide, weight.dtype)
    return result


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
        ValueError: The weight has leading batch axes of a size other than 1: each batch would
            have a shift of its own.
    """
    if layout.out_axis < 0:
        if any(size != 1 for size in weight.shape[:-2]):
            raise ValueError(f"a weight of shape {weight.shape} has no one shift for all batches")
        weight = weight.reshape(weight.shape[-2:])
    beside = _beside(weight.shape, layout, layout.in_axis, shift)
    product = weight.astype(np.float64) * beside
    if layout.groups > 1 and layout.out_axis == 1:
        shape = (layout.groups, weight.shape[0] // layout.groups, weight.shape[1], -1)
        return product.reshape(shape).sum(axis=(1, 3)).ravel()
    others = tuple(a for a in range(weight.ndim) if a != layout.out_axis % weight.ndim)
    result: F64 = product.sum(axis=others)
    return result


@dataclass(frozen=True, slots=True)
class RangeFault:
    """Output channel ``channel`` leaves the range of its type: it "overflows" or "underflows"."""

    channel: int
    what: str


def _largest(weight: Array, layout: Layout) -> F64:
    """The largest magnitude of each output channel, (M,); NaN where there is one."""
    with np.errstate(invalid="ignore"):
        if layout.groups > 1 and layout.out_axis == 1:
            shape = (layout.groups, weight.shape[0] // layout.groups, weight.shape[1], -1)
            grouped = weight.reshape(shape)
            return _magnitude(grouped, (1, 3)).ravel()
        others = tuple(a for a in range(weight.ndim) if a != layout.out_axis % weight.ndim)
        return _magnitude(weight, others)


def _magnitude(weight: Array, axes: tuple[int, ...]) -> F64:
    high = np.max(weight, axis=axes, initial=0).astype(np.float64)
    low = np.min(weight, axis=axes, initial=0).astype(np.float64)
    result: F64 = np.maximum(high, -low)
    return result


def _smallest_normal(dtype: DTypeLike) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


def range_fault(
    before: Array, after: Array, layout: Layout, *, zeroed: NDArray[np.bool_] | None = None
) -> RangeFault | None:
    """Whether folding took a channel of the weight out of the range of its type.

    A channel overflows when it holds a value that is not finite and held none before. It
    underflows when its largest magnitude was a normal number before and is not one after: then
    its weights have lost digits that they had.

    Args:
        before: The weight as it was.
        after: The folded weight, in its stored type.
        layout: Where the channels are.
        zeroed: Shape (M,): channels that a scale of 0 empties on purpose.
    """
    was, now = _largest(before, layout), _largest(after, layout)
    over = np.isfinite(was) & ~np.isfinite(now)
    if over.any():
        return RangeFault(int(np.argmax(over)), "overflows")
    least = _smallest_normal(after.dtype)
    under = (was >= least) & (now < least)
    if zeroed is not None:
        under &= ~zeroed
    return RangeFault(int(np.argmax(under)), "underflows") if under.any() else None


def vector_fault(wide: F64, stored: Array) -> RangeFault | None:
    """Whether casting ``wide`` to ``stored`` made a finite value infinite; channels come last."""
    over = np.isfinite(wide) & ~np.isfinite(stored.astype(np.float64))
    if not over.any():
        return None
    channel = int(np.flatnonzero(over.reshape(-1, over.shape[-1] if over.ndim else 1).any(0))[0])
    return RangeFault(channel, "overflows")
