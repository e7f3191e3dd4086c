"""Where a sliding window looks: ``out = floor((in + pads - effective_kernel) / stride) + 1``.

The geometry shared by the oracle's Conv and pooling operators: attribute defaults, ``auto_pad``,
``ceil_mode`` and the slice of the padded input that each kernel offset reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """A window over the spatial axes of an (N, C, spatial...) array; every field has a value each.

    ``before`` and ``after`` are the pads that the attributes ask for (negative ones crop), and
    ``tail`` is what the output needs behind them: more than ``after`` under ``ceil_mode``.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def tail(self) -> tuple[int, ...]:
        """Padding behind each axis so that every kernel offset can be read as a plain slice."""
        return tuple(
            max(a, (o - 1) * s + (k - 1) * d + 1 - n - b)
            for a, o, s, k, d, n, b in zip(
                self.after, self.out, self.strides, self.kernel, self.dilations, self.size,
                self.before, strict=True,
            )
        )  # fmt: skip

    def padded(self, x: F64, value: float = 0.0) -> F64:
        """The input with this window's pads around it, itself where there are none."""
        return pad_constant(x, (0, 0, *self.before), (0, 0, *self.tail), value)

    def offsets(self) -> Iterator[tuple[int, ...]]:
        """Every kernel position, in the order in which the weight stores them."""
        return itertools.product(*map(range, self.kernel))

    def reads(self, offset: Sequence[int]) -> tuple[slice, ...]:
        """What a kernel offset reads of the padded spatial axes, one value per output."""
        return tuple(
            slice(i * d, i * d + (o - 1) * s + 1, s)
            for i, d, o, s in zip(offset, self.dilations, self.out, self.strides, strict=True)
        )


def window(
    size: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str | None = None,
    ceil_mode: bool = False,
) -> Window:
    """The window that an operator's attributes describe, absent ones at their defaults.

    Args:
        size: Spatial sizes of the input.
        kernel: Spatial sizes of the kernel.
        strides: One per spatial axis.
        dilations: One per spatial axis.
        pads: All begins, then all ends; ignored where ``auto_pad`` decides.
        auto_pad: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
        ceil_mode: Whether a last window that starts inside the input or its front pad counts.

    Source: ONNX operators Conv (opset 11) and MaxPool (opset 22).
    """
    rank = len(kernel)
    steps = tuple(strides or (1,) * rank)
    spread = tuple(dilations or (1,) * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    before, after = _pads(size, reach, steps, pads, auto_pad or "NOTSET")
    out = tuple(
        _outputs(n, b, a, r, s, ceil_mode)
        for n, b, a, r, s in zip(size, before, after, reach, steps, strict=True)
    )
    return Window(tuple(size), tuple(kernel), steps, spread, before, after, out)


def _pads(
    size: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank = len(size)
    if auto_pad == "NOTSET":
        both = tuple(pads or (0,) * (2 * rank))
        return both[:rank], both[rank:]
    if auto_pad == "VALID":
        return (0,) * rank, (0,) * rank
    total = [
        max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)
    ]
    return split_pads(total, upper=auto_pad == "SAME_UPPER")


def split_pads(total: Sequence[int], *, upper: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Halves each total; the odd one goes behind when ``upper``, in front otherwise."""
    front = tuple(t // 2 if upper else t - t // 2 for t in total)
    return front, tuple(t - f for t, f in zip(total, front, strict=True))


def _outputs(size: int, before: int, after: int, reach: int, stride: int, ceil_mode: bool) -> int:
    room = size + before + after - reach
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    # A window that would start in the pad behind the input sees nothing of it.
    if ceil_mode and (count - 1) * stride >= size + before:
        count -= 1
    return max(count, 0)


def pad_constant(x: F64, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> F64:
    """Pads with a constant; negative pads crop. Returns ``x`` or a view where nothing is added."""
    cropped = x[
        tuple(
            slice(max(0, -b), n + min(0, a)) for b, a, n in zip(before, after, x.shape, strict=True)
        )
    ]
    front = [max(0, b) for b in before]
    behind = [max(0, a) for a in after]
    if not any(front) and not any(behind):
        return cropped
    shape = [f + n + b for f, n, b in zip(front, cropped.shape, behind, strict=True)]
    padded = np.full(shape, value, dtype=x.dtype)
    padded[tuple(slice(f, f + n) for f, n in zip(front, cropped.shape, strict=True))] = cropped
    return padded


def on_channels(vector: F64, rank: int) -> F64:
    """A vector of channels so that it broadcasts over an (N, C, spatial...) array."""
    return vector.reshape(1, -1, *(1,) * (rank - 2))
