"""``y[m] = b[m] + sum over c, k of W[m, c, k] * x[c, k]``: convolution in float64.

A convolution is one matrix product per block of outputs: the block's input windows are copied
side by side into a buffer that stays in the cache, and the kernel is multiplied with it. That
holds for any rank, stride, dilation, padding and number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from bnfold.verify.windows import F64, Window, on_channels, window

# Doubles in the buffer of a block: 4 MB, which stays in the last-level cache.
BLOCK = 1 << 19


class Conv(OpRun):
    """Convolution of an (N, C, spatial...) input with an (M, C/group, kernel...) weight."""

    def _run(
        self,
        x: F64,
        w: F64,
        bias: F64 | None = None,
        *,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[F64]:
        win = window(
            x.shape[2:], w.shape[2:], strides=strides, dilations=dilations, pads=pads,
            auto_pad=auto_pad,
        )  # fmt: skip
        return (convolve(x, w, bias, win, group or 1),)


def convolve(x: F64, w: F64, bias: F64 | None, win: Window, groups: int) -> F64:
    """Convolves (N, C, spatial...) with (M, C/groups, kernel...) to (N, M, win.out...)."""
    y = np.empty((x.shape[0], w.shape[0], *win.out))
    padded = win.padded(x)
    if math.prod(win.kernel) == 1 and padded.shape[2:] == win.out:
        _pointwise(padded, w, groups, y)
    elif max(win.strides) == 1:
        _by_runs(padded, w, win, groups, y)
    else:
        _by_blocks(padded, w, win, groups, y)
    if bias is not None:
        y += on_channels(bias, y.ndim)
    return y


def _pointwise(x: F64, w: F64, groups: int, y: F64) -> None:
    n, m = y.shape[:2]
    np.matmul(
        w.reshape(groups, m // groups, -1),
        x.reshape(n, groups, w.shape[1], -1),
        out=y.reshape(n, groups, m // groups, -1),
    )


def _by_runs(x: F64, w: F64, win: Window, groups: int, y: F64) -> None:
    """Stride 1: in the flattened padded image each kernel offset is one shifted run of values.

    The outputs are computed in rows as wide as the padded input (so that no copy is shorter than
    a block), and the values at the rows' ends, which wrap around, are dropped.
    """
    wide = (win.out[0], *x.shape[3:])
    steps = [math.prod(wide[axis + 1 :]) for axis in range(len(wide))]
    shifts = [
        sum(i * d * s for i, d, s in zip(offset, win.dilations, steps, strict=True))
        for offset in win.offsets()
    ]
    length = sum((o - 1) * s for o, s in zip(win.out, steps, strict=True)) + 1
    rows = np.empty((y.shape[1], math.prod(wide)))
    for image, target in zip(x.reshape(*x.shape[:2], -1), y, strict=True):
        if w.shape[1] == 1 and groups == w.shape[0]:
            _sum_runs(image, w.reshape(groups, -1), shifts, rows[:, :length])
        else:
            _multiply_runs(image, w.reshape(groups, w.shape[0] // groups, -1), shifts, rows, length)
        target[...] = rows.reshape(-1, *wide)[(slice(None), *map(slice, win.out))]


def _sum_runs(image: F64, w: F64, shifts: Sequence[int], rows: F64) -> None:
    """Depthwise: a sum of shifted runs, some channels at a time."""
    length = rows.shape[1]
    step = max(1, BLOCK // 16 // length)
    term = np.empty((step, length))
    for first in range(0, w.shape[0], step):
        some = slice(first, min(first + step, w.shape[0]))
        total, product = rows[some], term[: some.stop - first]
        np.multiply(image[some, shifts[0] : shifts[0] + length], w[some, :1], out=total)
        for k, shift in enumerate(shifts[1:], start=1):
            np.multiply(image[some, shift : shift + length], w[some, k, None], out=product)
            total += product


def _multiply_runs(image: F64, w: F64, shifts: Sequence[int], rows: F64, length: int) -> None:
    """Dense or grouped: the runs of a block side by side, times the kernel matrix."""
    groups, m, depth = w.shape
    channels = image.shape[0]
    step = min(length, max(BLOCK // (channels * len(shifts)), 64))
    buffer = np.empty(channels * len(shifts) * step)
    for first in range(0, length, step):
        count = min(step, length - first)
        columns = buffer[: channels * len(shifts) * count].reshape(channels, len(shifts), count)
        for k, shift in enumerate(shifts):
            columns[:, k] = image[:, first + shift : first + shift + count]
        np.matmul(
            w,
            columns.reshape(groups, depth, count),
            out=rows.reshape(groups, m, -1)[:, :, first : first + count],
        )


def _by_blocks(x: F64, w: F64, win: Window, groups: int, y: F64) -> None:
    """Any stride: the windows of some output rows side by side, times the kernel matrix."""
    n, m = y.shape[:2]
    matrix = w.reshape(groups, m // groups, -1)
    for image, target in zip(x, y.reshape(n, groups, m // groups, *win.out), strict=True):
        for rows in _row_blocks(win, x.shape[1]):
            columns = _columns(image, win, rows).reshape(groups, matrix.shape[2], -1)
            block = target[:, :, rows]
            block[...] = np.matmul(matrix, columns).reshape(block.shape)


def _row_blocks(win: Window, channels: int) -> Iterator[slice]:
    """Ranges of the first output axis whose windows fill about one block."""
    row = channels * math.prod(win.kernel) * math.prod(win.out[1:])
    step = max(1, BLOCK // max(1, row))
    return (slice(r, min(r + step, win.out[0])) for r in range(0, win.out[0], step))


def _columns(image: F64, win: Window, rows: slice) -> F64:
    """The windows of some output rows side by side: (C, kernel positions, rows, rest...)."""
    count = rows.stop - rows.start
    columns = np.empty((image.shape[0], math.prod(win.kernel), count, *win.out[1:]))
    for k, offset in enumerate(win.offsets()):
        first, *rest = win.reads(offset)
        start = first.start + rows.start * win.strides[0]
        stop = start + (count - 1) * win.strides[0] + 1
        columns[:, k] = image[(slice(None), slice(start, stop, win.strides[0]), *rest)]
    return columns
