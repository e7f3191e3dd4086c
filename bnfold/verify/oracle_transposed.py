"""``y[stride * p + dilation * k] += W[c, :, k] * x[c, p]``: transposed convolution in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from bnfold.verify.windows import F64, Window, on_channels, pad_constant, split_pads


class ConvTranspose(OpRun):
    """Transposed convolution of (N, C, spatial...) with a (C, M/group, kernel...) weight."""

    def _run(
        self,
        x: F64,
        w: F64,
        bias: F64 | None = None,
        *,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[F64]:
        rank = x.ndim - 2
        steps = tuple(strides or (1,) * rank)
        spread = tuple(dilations or (1,) * rank)
        full = _spread(x, w, group or 1, steps, spread)
        extra = tuple(output_padding or (0,) * rank)
        natural = [f + e for f, e in zip(full.shape[2:], extra, strict=True)]
        before, out = _transposed_crop(
            x.shape[2:], natural, steps, pads, output_shape, auto_pad or "NOTSET"
        )
        after = [o + b - f for o, b, f in zip(out, before, full.shape[2:], strict=True)]
        y = pad_constant(full, (0, 0, *(-b for b in before)), (0, 0, *after))
        if bias is not None:
            y = y + on_channels(bias, y.ndim)
        return (y,)


def _spread(
    x: F64, w: F64, groups: int, strides: tuple[int, ...], dilations: tuple[int, ...]
) -> F64:
    """Every input value times the kernel, summed where they land; nothing cropped yet."""
    n, c = x.shape[:2]
    kernel = w.shape[2:]
    size = [
        (i - 1) * s + (k - 1) * d + 1
        for i, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    full = np.zeros((n, groups * w.shape[1], *size))
    # One product for all kernel offsets, then one addition each.
    terms = w.reshape(groups, c // groups, -1).swapaxes(1, 2) @ x.reshape(
        n, groups, c // groups, -1
    )
    terms = terms.reshape(n, full.shape[1], *kernel, *x.shape[2:])
    landing = Window(
        tuple(size), kernel, strides, dilations, (0,) * len(size), (0,) * len(size), x.shape[2:]
    )
    both: tuple[Any, ...] = (slice(None), slice(None))
    for offset in landing.offsets():
        place: F64 = full[(*both, *landing.reads(offset))]
        np.add(place, terms[(*both, *offset)], out=place)
    return full


def _transposed_crop(
    size: Sequence[int],
    natural: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] | None,
    output_shape: Sequence[int] | None,
    auto_pad: str,
) -> tuple[Sequence[int], Sequence[int]]:
    """What to take off in front and what size to leave, as (before, out) per spatial axis."""
    rank = len(size)
    if output_shape is not None:
        wanted: Sequence[int] = tuple(output_shape)[-rank:]
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(size, strides, strict=True)]
    else:
        both = (0,) * (2 * rank) if auto_pad == "VALID" or not pads else tuple(pads)
        before, after = both[:rank], both[rank:]
        return before, [n - b - a for n, b, a in zip(natural, before, after, strict=True)]
    total = [max(0, n - o) for n, o in zip(natural, wanted, strict=True)]
    return split_pads(total, upper=auto_pad == "SAME_UPPER")[0], wanted
