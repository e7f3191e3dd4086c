"""``y[p] = max or mean over k of x[stride * p + dilation * k]``: pooling in float64.

One pass over the input per kernel offset, for any rank, in place of one Python call per output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_max_pool import MaxPool as ReferenceMaxPool

from bnfold.verify.windows import F64, Window, window


class MaxPool(ReferenceMaxPool):
    """Maximum over a window; pads never win."""

    def _run(  # type: ignore[override]
        self,
        x: NDArray[Any],
        *,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        storage_order: int | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[NDArray[Any], ...]:
        if len(self.output) > 1:  # the indices of the maxima: rare, left to the reference
            whole: tuple[NDArray[Any], ...] = super()._run(  # type: ignore[no-untyped-call]
                x, auto_pad=auto_pad, ceil_mode=ceil_mode, dilations=dilations, pads=pads,
                kernel_shape=kernel_shape, storage_order=storage_order, strides=strides,
            )  # fmt: skip
            return whole
        win = window(
            x.shape[2:], kernel_shape or (), strides=strides, dilations=dilations, pads=pads,
            auto_pad=auto_pad, ceil_mode=bool(ceil_mode),
        )  # fmt: skip
        lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        padded = win.padded(x, lowest)
        y = np.full((*x.shape[:2], *win.out), lowest, dtype=x.dtype)
        for offset in win.offsets():
            np.maximum(y, padded[(slice(None), slice(None), *win.reads(offset))], out=y)
        return (y,)


class AveragePool(OpRun):
    """Mean over a window, with the pads counted or not."""

    def _run(
        self,
        x: F64,
        *,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[F64]:
        win = window(
            x.shape[2:], kernel_shape or (), strides=strides, dilations=dilations, pads=pads,
            auto_pad=auto_pad, ceil_mode=bool(ceil_mode),
        )  # fmt: skip
        padded = win.padded(x)
        y = np.zeros((*x.shape[:2], *win.out))
        for offset in win.offsets():
            y += padded[(slice(None), slice(None), *win.reads(offset))]
        y /= _counts(win, include_pads=bool(count_include_pad))
        return (y,)


class GlobalAveragePool(OpRun):
    """Mean over all spatial axes."""

    def _run(self, x: F64) -> tuple[F64]:
        mean = x.reshape(*x.shape[:2], -1).mean(axis=2)
        return (mean.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)),)


def _counts(win: Window, *, include_pads: bool) -> F64:
    """How many values each window averages: (out...). What only ceil_mode adds never counts."""
    counts = np.ones(win.out)
    for axis, out in enumerate(win.out):
        low = 0 if include_pads else max(0, win.before[axis])
        high = win.before[axis] + win.size[axis] + (
            win.after[axis] if include_pads else min(0, win.after[axis])
        )  # fmt: skip
        starts = np.arange(out)[:, None] * win.strides[axis]
        places = starts + np.arange(win.kernel[axis]) * win.dilations[axis]
        seen = ((places >= low) & (places < high)).sum(axis=1)
        counts *= seen.reshape(-1, *(1,) * (len(win.out) - axis - 1))
    return counts
