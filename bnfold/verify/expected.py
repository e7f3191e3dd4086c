"""What a fold by bnfold should have given: the weights, and which tensor holds which value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

# Some roundings of float64, relative.
FLOAT64 = 2.0**-48


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor ``u`` of the folded model, where the unfolded one has ``v = scale * u + shift``.

    Attributes:
        reference: What ``v`` is called.
        axes: The axes that the channels lie on, in row-major order; none where there is one.
        scale: One for each channel, or a single one; not finite where nobody knows.
        shift: Likewise.
    """

    reference: str
    axes: tuple[int, ...] = ()
    scale: F64 | None = None
    shift: F64 | None = None

    def stored(self, value: F64) -> F64:
        """``u`` of ``v``; NaN on channels of which it is not known, or that hold nothing."""
        if self.scale is None or self.shift is None:
            return value
        scale, shift = self._shaped(self.scale, value), self._shaped(self.shift, value)
        with np.errstate(all="ignore"):
            u: F64 = (value - shift) / np.where(scale == 0, np.nan, scale)
        return u

    def blur(self, value: F64) -> F64:
        """What float64 leaves of `stored`, where ``value - shift`` cancels."""
        if self.scale is None or self.shift is None:
            return np.zeros(())
        scale, shift = self._shaped(self.scale, value), self._shaped(self.shift, value)
        with np.errstate(all="ignore"):
            lost = FLOAT64 * (np.abs(value) + np.abs(shift)) / np.abs(scale)
        return np.where(np.isfinite(lost), lost, 0.0)

    def _shaped(self, channels: F64, value: F64) -> F64:
        if channels.size == 1:
            return channels.reshape(())
        sizes = [n if axis in self.axes else 1 for axis, n in enumerate(value.shape)]
        if prod(sizes) != channels.size:
            return np.full((), np.nan)
        return channels.reshape(sizes)


@dataclass(frozen=True, slots=True)
class Expected:
    """What folding the reference with bnfold gives.

    Attributes:
        weights: Computes the tensors that the fold changes, as they are to be stored, by name.
        held: For each tensor of the folded model, by name, the value that it holds; None where
            the reference is not what was folded (onnxsim stood between).
    """

    weights: Callable[[], Mapping[str, NDArray[Any]]]
    held: Mapping[str, Held] | None
