"""Where the channels of a weight are: views of it, and values per channel brought beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
F64 = NDArray[np.float64]

SLAB = 1 << 16  # elements computed at a time: float64 of that many stay in the cache


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
class Blocks:
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
    def of(cls, shape: tuple[int, ...], layout: Layout) -> Blocks:
        """A weight of ``shape``, seen so.

        Raises:
            ValueError: The weight does not have the layout.
        """
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
        """``(batches * groups, rows, columns * taps)``."""
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
        some_blocks = max(1, SLAB // max(1, rows * inner))
        some_rows = max(1, SLAB // max(1, inner))
        for block in range(0, blocks, some_blocks):
            for row in range(0, rows, some_rows):
                yield slice(block, block + some_blocks), slice(row, row + some_rows)

    def wide_slabs(self, weight: Array) -> Iterator[tuple[tuple[slice, slice], F64]]:
        """The slabs of ``weight`` in float64, one after the other in the same memory."""
        view = weight.reshape(self.shape)
        memory = np.empty(min(weight.size, max(SLAB, self.shape[2])))
        for place in self.slabs():
            slab = view[place]
            wide = memory[: slab.size].reshape(slab.shape)
            wide[...] = slab
            yield place, wide


def beside(shape: tuple[int, ...], layout: Layout, axis: int, values: F64) -> F64:
    """Per-channel ``values`` of the side on ``axis``, shaped to broadcast against the weight."""
    along = [1] * len(shape)
    along[axis] = shape[axis]
    if layout.groups == 1 or axis == 0:
        return np.broadcast_to(values, (shape[axis],)).reshape(along)
    along[0] = shape[0]  # each row of axis 0 meets the channels of its own group
    values = np.broadcast_to(values, (layout.groups * shape[1],)).reshape(layout.groups, -1)
    return np.repeat(values, shape[0] // layout.groups, axis=0).reshape(along)
