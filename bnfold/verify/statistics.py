"""Inputs for which the first linear operator gives what the BatchNorm behind it has seen.

With ``z = a x + b`` the input after its normalisation and ``y_o = bias_o + sum_ck W_ock z_c(k)``,
``z_c`` is given a mean ``m_c`` and three independent kinds of noise of unit correlation at 0:
white of variance ``p_c``, smooth of variance ``q_c`` and one that all channels share, ``r``. Then

    E y_o   = bias_o + sum_c m_c sum_k W_ock
    Var y_o = sum_c p_c sum_k W_ock^2 + sum_c q_c R(W_oc) + r R(sum_c W_oc)

where ``R(w) = sum_kl w_k w_l rho(k - l)`` and ``rho`` is the smooth noise's correlation. The means
are fitted to the running means by least squares, the variances by non-negative least squares.
Borders, where a Conv pads, are left out of account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

SWEEPS = 300
# Of the smooth noise: its width in pixels, at most an eighth of the image.
WIDTH = 3.0
# A fit explains the running variances when the median channel's is off by less than this factor.
CLOSE = 3.0
_MOST_FEATURES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """How the values of one input are distributed.

    Attributes:
        axis: Its channel axis; axis 0 is the batch unless it is this one.
        mean: Of each channel.
        white: Standard deviation of each channel's white noise.
        smooth: The same of its smooth noise.
        shared: What each channel takes of the smooth noise that all share; may be negative.
    """

    axis: int
    mean: F64
    white: F64
    smooth: F64
    shared: F64

    def draw(self, rng: np.random.Generator, shape: Sequence[int], *, even: bool = False) -> F64:
        """An array of ``shape``; an even one has one value for each sample and channel."""
        sizes = list(shape)
        if even:
            sizes = [n if i in (0, self.axis) else 1 for i, n in enumerate(shape)]
        spatial = [i for i in range(1, len(sizes)) if i != self.axis]
        single = [1 if i == self.axis else n for i, n in enumerate(sizes)]
        drawn = self._placed(self.mean, len(sizes)) + sum(
            self._placed(scale, len(sizes)) * noise
            for scale, noise in (
                (self.white, rng.standard_normal(sizes)),
                (self.smooth, smoothed(rng.standard_normal(sizes), spatial)),
                (self.shared, smoothed(rng.standard_normal(single), spatial)),
            )
        )
        return np.broadcast_to(drawn, tuple(shape)).copy()

    def _placed(self, vector: F64, rank: int) -> F64:
        return vector.reshape([-1 if i == self.axis else 1 for i in range(rank)])


@dataclass(frozen=True, slots=True, eq=False)
class FirstLayer:
    """A linear operator on the input, and what the BatchNorm behind it has seen.

    Attributes:
        weight: ``(O, C / groups, kernel...)``, in float64.
        bias: ``(O,)``.
        groups: Of a grouped Conv; 1 otherwise.
        scale: ``a``, of each of the ``C`` input channels.
        shift: ``b``, the same.
        mean: Running means ``(O,)``.
        variance: Running variances ``(O,)``.
        dilations: One per spatial axis of the kernel.
        sizes: Spatial sizes of the input, in the kernel's order.
    """

    weight: F64
    bias: F64
    groups: int
    scale: F64
    shift: F64
    mean: F64
    variance: F64
    dilations: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def fit(layer: FirstLayer, axis: int) -> InputStatistics | None:
    """The distribution of an input that gives a layer's running statistics; None without a fit.

    Args:
        layer: The first layer.
        axis: The input's channel axis.
    """
    parts = (layer.weight, layer.bias, layer.scale, layer.shift, layer.mean, layer.variance)
    if not all(np.isfinite(part).all() for part in parts) or not layer.scale.all():
        return None
    # Fresh statistics know nothing of any input.
    if (layer.variance <= 0).any() or _fresh(layer) or layer.scale.size > _MOST_FEATURES:
        return None
    dense = _ungrouped(layer)
    mean = _means(dense.sum(axis=2), layer)
    columns = _variance_columns(dense, layer)
    found = nonnegative(columns / layer.variance[:, None], np.ones(len(layer.variance)))
    explained = columns @ found
    if not _explains(explained, layer.variance, columns):
        return None
    channels = dense.shape[1]
    white, smooth, shared = found[:channels], found[channels : 2 * channels], found[-1]
    return InputStatistics(
        axis, (mean - layer.shift) / layer.scale, np.sqrt(white) / abs(layer.scale),
        np.sqrt(smooth) / abs(layer.scale), np.sqrt(shared) / layer.scale,
    )  # fmt: skip


def seen_directly(layer: FirstLayer, axis: int, *, spatial: bool) -> InputStatistics | None:
    """The distribution of an input that a BatchNorm takes at once, half of its noise smooth.

    Args:
        layer: Scale, shift and the running statistics count; all may be of one number.
        axis: The input's channel axis.
        spatial: Whether there are axes along which it could be smooth.
    """
    if _fresh(layer) or not layer.scale.all() or not (layer.variance >= 0).all():
        return None
    if layer.scale.size not in (1, layer.mean.size):
        return None
    deviation = np.sqrt(layer.variance) / abs(layer.scale)
    part = deviation * (np.sqrt(0.5) if spatial else 1.0)
    mean = (layer.mean - layer.shift) / layer.scale
    return InputStatistics(axis, mean, part, part * spatial, np.zeros(layer.mean.size))


def _fresh(layer: FirstLayer) -> bool:
    return not layer.mean.any() and bool((layer.variance == 1).all())


def _ungrouped(layer: FirstLayer) -> F64:
    """The weight as ``(O, C, taps)``, zero where an output does not see a channel."""
    outputs, seen = layer.weight.shape[:2]
    taps = layer.weight.reshape(outputs, seen, -1)
    dense = np.zeros((outputs, seen * layer.groups, taps.shape[2]))
    each = outputs // layer.groups
    for group in range(layer.groups):
        rows = slice(group * each, (group + 1) * each)
        dense[rows, group * seen : (group + 1) * seen] = taps[rows]
    return dense


def _means(sums: F64, layer: FirstLayer) -> F64:
    """Least squares in units of each output's deviation, cut where the weights say little."""
    deviation = np.sqrt(layer.variance)
    wanted = (layer.mean - layer.bias) / deviation
    return np.asarray(np.linalg.lstsq(sums / deviation[:, None], wanted, rcond=1e-2)[0])


def _variance_columns(dense: F64, layer: FirstLayer) -> F64:
    """What unit variance of each noise gives in each output: ``(O, 2 C + 1)``."""
    rho = _correlation(layer)
    white = np.square(dense).sum(axis=2)
    # A one-tap kernel can't tell smooth from white noise.
    smooth = np.einsum("ock,kl,ocl->oc", dense, rho, dense, optimize=True)
    summed = dense.sum(axis=1)
    shared = np.einsum("ok,kl,ol->o", summed, rho, summed, optimize=True)
    if dense.shape[2] == 1:
        smooth = np.zeros_like(smooth)
    return np.concatenate([white, np.maximum(smooth, 0), np.maximum(shared, 0)[:, None]], axis=1)


def _correlation(layer: FirstLayer) -> F64:
    """``rho`` between every two taps of the kernel."""
    total = np.ones((1, 1))
    for taps, dilation, size in zip(
        layer.weight.shape[2:], layer.dilations, layer.sizes, strict=True
    ):
        spectrum = np.square(_transfer(size))
        along = np.fft.irfft(spectrum, size) / np.fft.irfft(spectrum, size)[0]
        steps = np.arange(taps) * dilation
        total = np.kron(total, along[abs(steps[:, None] - steps[None, :]) % size])
    return total


def _transfer(size: int) -> F64:
    width = min(WIDTH, size / 8)
    return np.asarray(np.exp(-0.5 * np.square(2 * np.pi * np.fft.rfftfreq(size) * width)))


def smoothed(noise: F64, axes: Sequence[int]) -> F64:
    """White noise made smooth along ``axes`` (periodically), its variance kept."""
    for axis in axes:
        size = noise.shape[axis]
        kept = _transfer(size)
        gain = np.sqrt(np.fft.irfft(np.square(kept), size)[0])
        along = kept.reshape([-1 if i == axis else 1 for i in range(noise.ndim)])
        noise = np.fft.irfft(np.fft.rfft(noise, axis=axis) * along / gain, size, axis=axis)
    return noise


def nonnegative(matrix: F64, wanted: F64) -> F64:
    """Non-negative least squares: ``|matrix x - wanted|`` least with ``x >= 0``.

    By coordinate descent on the normal equations, each step of which is exact.
    """
    gram, target = matrix.T @ matrix, matrix.T @ wanted
    used = np.flatnonzero(np.diag(gram) > 0)
    found = np.zeros(matrix.shape[1])
    slope = -target
    for _ in range(SWEEPS):
        moved = 0.0
        for i in used:
            step = max(-found[i], -slope[i] / gram[i, i])
            if step:
                found[i] += step
                slope += step * gram[i]
                moved = max(moved, abs(step) * float(np.sqrt(gram[i, i])))
        if moved < 1e-6:
            break
    return found


def _explains(explained: F64, variance: F64, columns: F64) -> bool:
    """Whether the fit is close on the median channel, and closer than standard normal noise."""
    if (explained <= 0).any():
        return False
    channels = (columns.shape[1] - 1) // 2
    normal = np.maximum(columns[:, :channels].sum(axis=1), np.finfo(np.float64).tiny)
    off = float(np.median(abs(np.log(explained / variance))))
    return off < np.log(CLOSE) and off < float(np.median(abs(np.log(normal / variance))))
