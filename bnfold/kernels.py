"""Linear maps with their numbers: put after one another, added up, stored as a weight.

    second(first(x))      W[o + s p] = sum over channels of  W2[p] W1[o]     b = W2 b1 + b2
    first(x) + second(x)  W[o] = W1[o] + W2[o]                               b = b1 + b2

Everything is float64. A kernel has the shape (groups, outs per group, ins per group, *positions).
That all of it is exact at borders is for the planner to have made sure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Any

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import POINT, Taps
from bnfold.layout import F64, Array, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A linear map from channels and positions to channels and positions.

    Attributes:
        weight: Shape (groups, outs / groups, ins / groups, *counts of the taps).
        bias: Shape (outs,).
        taps: Which positions are read.
    """

    weight: F64
    bias: F64
    taps: tuple[Taps, ...]

    # ---- making ----

    @classmethod
    def of(cls, stored: Array, layout: Layout, taps: tuple[Taps, ...], bias: F64 | None) -> Kernel:
        """That of an operator with the weight ``stored``; ``bias`` has shape (outs,) or (1,)."""
        outs_first = layout.out_axis % stored.ndim < layout.in_axis % stored.ndim
        wide = stored.astype(np.float64)
        blocks = wide.reshape(layout.groups, wide.shape[0] // layout.groups, *wide.shape[1:])
        weight = blocks if outs_first else np.swapaxes(blocks, 1, 2)
        outs = weight.shape[0] * weight.shape[1]
        return cls(weight, np.zeros(outs) + (0.0 if bias is None else bias), taps)

    @classmethod
    def constant(cls, channels: int, taps: tuple[Taps, ...]) -> Kernel:
        """The mean of what ``taps`` read, channel by channel."""
        counts = tuple(t.count for t in taps)
        weight = np.full((channels, 1, 1, *counts), 1 / np.prod(counts, initial=1.0))
        return cls(weight, np.zeros(channels), taps)

    @classmethod
    def identity(cls, channels: int, axes: int) -> Kernel:
        """Every channel and position for itself."""
        return cls.constant(channels, (POINT,) * axes)

    # ---- reading ----

    @property
    def groups(self) -> int:
        """Into how many blocks the channels fall."""
        return int(self.weight.shape[0])

    @property
    def outs(self) -> int:
        """How many channels are made."""
        return int(self.weight.shape[0] * self.weight.shape[1])

    def stored(self, layout: Layout) -> F64:
        """The weight as an operator with that layout holds it."""
        outs_first = layout.out_axis < layout.in_axis
        weight = self.weight if outs_first else np.swapaxes(self.weight, 1, 2)
        return np.ascontiguousarray(weight).reshape(-1, *weight.shape[2:])

    # ---- computing ----

    def on_axes(self, count: int) -> Kernel:
        """The same on so many axes of positions, of which it reads one if it has none."""
        if len(self.taps) == count:
            return self
        weight = self.weight.reshape(self.weight.shape[:3] + (1,) * count)
        return replace(self, weight=weight, taps=(POINT,) * count)

    def mapped(self, taken: AffineMap) -> Kernel:
        """``taken`` of what this gives."""
        scale = np.broadcast_to(taken.scale, (self.outs,))
        per_row = scale.reshape(self.weight.shape[:2] + (1,) * (self.weight.ndim - 2))
        with np.errstate(all="ignore"):  # what is not finite is met when it is stored
            return replace(self, weight=self.weight * per_row,
                           bias=self.bias * scale + taken.shift)  # fmt: skip

    def of_mapped(self, taken: AffineMap) -> Kernel:
        """This of what ``taken`` gives; a shift only where no zeros are padded in."""
        ins = self.groups * self.weight.shape[2]
        wide = taken.expand(ins)
        shape = (self.groups, 1, -1) + (1,) * (self.weight.ndim - 3)
        with np.errstate(all="ignore"):
            reads = self.weight * wide.shift.reshape(shape)
            shift = reads.sum(axis=tuple(range(2, reads.ndim))).ravel()
            return replace(self, weight=self.weight * wide.scale.reshape(shape),
                           bias=self.bias + shift)  # fmt: skip

    def scaled(self, factor: float) -> Kernel:
        """``factor`` times this."""
        return self.mapped(AffineMap.scaling([factor]))

    def in_groups(self, groups: int) -> Kernel:
        """The same with fewer groups: zeros stand between the blocks."""
        if groups == self.groups:
            return self
        each = self.groups // groups
        _, rows, columns, *counts = self.weight.shape
        wide = np.zeros((groups, each * rows, each * columns, *counts))
        blocks = self.weight.reshape(groups, each, rows, columns, *counts)
        for k in range(each):
            there = slice(k * rows, (k + 1) * rows), slice(k * columns, (k + 1) * columns)
            wide[:, *there] = blocks[:, k]
        return replace(self, weight=wide)

    def reading(self, taps: tuple[Taps, ...]) -> Kernel:
        """The same with ``taps``, which have to read all that is read: zeros for what is more."""
        if taps == self.taps:
            return self
        wide = np.zeros(self.weight.shape[:3] + tuple(t.count for t in taps))
        wide[_last(map(_places, self.taps, taps))] = self.weight
        return replace(self, weight=wide, taps=taps)

    def then(self, second: Kernel, taps: tuple[Taps, ...]) -> Kernel:
        """``second`` of what this gives, which reads ``taps``."""
        if self._is_diagonal and all(t.count == 1 for t in self.taps):
            scale = self.weight.ravel()
            return replace(second.of_mapped(AffineMap(scale, self.bias)), taps=taps)
        groups = self.groups if second._is_diagonal else gcd(self.groups, second.groups)
        one = self.in_groups(groups)
        second = second if second._is_diagonal else second.in_groups(groups)
        outs = second.outs
        shape = (groups, outs // groups, one.weight.shape[2], *(t.count for t in taps))
        weight = np.zeros(shape)
        for at in product(*(range(t.count) for t in second.taps)):
            for n in product(*(range(t.count) for t in one.taps)):
                place = tuple(map(_place, one.taps, second.taps, taps, n, at))
                weight[_last(place)] += second._times(one.weight[_last(n)], at)
        axes = tuple(range(3, second.weight.ndim))
        whole = replace(second, weight=second.weight.sum(axis=axes, keepdims=True))
        shift = whole._times(one.bias.reshape(groups, -1, 1), (0,) * len(axes))
        return Kernel(weight, shift.ravel() + second.bias, taps)

    @property
    def _is_diagonal(self) -> bool:
        """Whether every channel is made of itself alone."""
        return self.weight.shape[1:3] == (1, 1)

    def _times(self, matrix: F64, at: tuple[int, ...]) -> F64:
        """The weights at position ``at`` times ``matrix``, block by block."""
        if self._is_diagonal:
            return self._rows(at).reshape(matrix.shape[0], -1, 1) * matrix
        return self._rows(at) @ matrix

    def _rows(self, at: tuple[int, ...]) -> F64:
        here: F64 = self.weight[_last(at)]
        return here


def added(kernels: Sequence[Kernel], taps: tuple[Taps, ...]) -> Kernel:
    """The sum of ``kernels``, which reads ``taps``."""
    groups = gcd(*(kernel.groups for kernel in kernels))
    wide = [kernel.in_groups(groups).reading(taps) for kernel in kernels]
    weight = np.add.reduce([kernel.weight for kernel in wide])
    return Kernel(weight, np.add.reduce([kernel.bias for kernel in wide]), taps)


def stacked(kernels: Sequence[Kernel]) -> Kernel:
    """The outputs of ``kernels`` one after the other; all of them read the same."""
    one = kernels[0]
    weight = np.concatenate([kernel.in_groups(1).weight for kernel in kernels], axis=1)
    return Kernel(weight, np.concatenate([kernel.bias for kernel in kernels]), one.taps)


def _last(index: Iterable[Any]) -> Any:
    """An index of the last axes: positions of the kernel."""
    return (..., *index)


def _places(mine: Taps, taps: Taps) -> slice:
    start, step = (mine.first - taps.first) // taps.step, mine.step // taps.step or 1
    return slice(start, start + (mine.count - 1) * step + 1, step)


def _place(first: Taps, second: Taps, taps: Taps, n: int, k: int) -> int:
    read = first.stride * (second.first + k * second.step) + first.first + n * first.step
    return (read - taps.first) // taps.step
