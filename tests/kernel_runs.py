"""Runs linear maps on arrays as their definition says, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from bnfold.affine import F64
from bnfold.channel_graph import Taps
from bnfold.kernels import Kernel


def made(size: int, taps: Taps) -> int:
    """How many positions there are of ``size``, by the definition of `Taps`."""
    return (size + taps.slack) // taps.stride + 1


def run(kernel: Kernel, x: F64) -> F64:
    """What ``kernel`` makes of ``x``: (batch, channels, *positions)."""
    groups, rows, columns, *counts = kernel.weight.shape
    sizes = [made(size, taps) for size, taps in zip(x.shape[2:], kernel.taps, strict=True)]
    blocks = x.reshape(x.shape[0], groups, columns, *x.shape[2:])
    out = np.zeros((x.shape[0], groups, rows, *sizes))
    for at in product(*map(range, counts)):
        read = _read(blocks, sizes, kernel.taps, at)
        weight = kernel.weight.reshape(*kernel.weight.shape[:3], -1)[
            ..., np.ravel_multi_index(at, counts) if at else 0
        ]
        out += np.einsum("goi,ngi...->ngo...", weight, read)
    bias = kernel.bias.reshape(-1, *[1] * len(counts))
    return out.reshape(x.shape[0], groups * rows, *sizes) + bias


def _read(x: F64, sizes: Sequence[int], taps: Sequence[Taps], at: tuple[int, ...]) -> F64:
    """What tap ``at`` reads for every output; 0 beyond the border."""
    for axis, (size, one, k) in enumerate(zip(sizes, taps, at, strict=True), start=3):
        places = one.stride * np.arange(size) + one.first + one.step * k
        inside = (places >= 0) & (places < x.shape[axis])
        taken = np.take(x, np.where(inside, places, 0), axis=axis)
        x = taken * inside.reshape(-1, *[1] * (x.ndim - axis - 1))
    return x


def random_kernel(
    rng: np.random.Generator, ins: int, outs: int, taps: Sequence[Taps], groups: int = 1,
    *, biased: bool = True,
) -> Kernel:  # fmt: skip
    """A kernel with random numbers."""
    shape = (groups, outs // groups, ins // groups, *(t.count for t in taps))
    bias = rng.normal(size=outs) if biased else np.zeros(outs)
    return Kernel(rng.normal(size=shape), bias, tuple(taps))
