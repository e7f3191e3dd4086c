"""How far rounding the stored constants of one operator can move its outputs, channel by channel.

Each constant is off by at most ``u`` of its size. By Young's inequality a kernel moves the norm of
a channel by no more than its absolute sum times the norm of what it reads, so that for weights that
were cast once (what bnfold makes)

    ||y_fold - y_unf|| <= u (sum_c ||W_mc||_1 ||x_c|| + ||b_m||)                       (rigorous)

on each channel m; norms are Euclidean, over all elements of a channel. Other tools compute in the
stored type: up to three roundings of the scale, common to the channel, and one of each weight,
which are independent, so that they add up like a random walk; six standard deviations of that are

    ||y_fold - y_unf|| <= 3.5 u sqrt(sum_c ||W_mc||_2^2 ||x_c||^2) + 3 u ||W x||
                          + 4 u (||b_m|| + o_m)

with ``o_m`` what the unfolded steps add up on the way, though their sum may be small. Weights of
few distinct values are rounded alike; for these the absolute sum is taken, four times.

A bias that is stored as integers is off by up to half of one on each element, whatever ``u`` is.

Where there is no constant there is nothing to round, and the bound is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
DEVIATIONS, COMMON, ROUNDINGS = 3.5, 3.0, 4.0


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator with the values of its inputs.

    Attributes:
        op_type: Its type.
        inputs: Its inputs, None where one is left out; floats are float64.
        constant: Which of them are constants of the model.
        attributes: Its attributes.
        bias_step: The unit of a bias that was rounded to integers, one for each channel or one.
    """

    op_type: str
    inputs: Sequence[Any]
    constant: Sequence[bool]
    attributes: Mapping[str, Any]
    bias_step: F64 | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a linear operator with a constant weight, which a fold may change."""
        return self.op_type in LINEAR and any(self.constant[:2])

    def bias(self) -> F64 | None:
        """What it adds, if it can."""
        if self.op_type in ("Add", "Sub"):
            return next((x for x, c in zip(self.inputs, self.constant, strict=True) if c), None)
        takes = self.op_type in ("Conv", "ConvTranspose", "Gemm") and len(self.inputs) > 2
        return self.inputs[2] if takes else None


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding does to each channel of an output, in units of ``u``.

    Attributes:
        absolute: The absolute sum over the weights.
        random: The root of the sum of squares over them.
        added: The norm of what is added.
    """

    absolute: F64
    random: F64
    added: F64

    def once(self) -> F64:
        """The bound for constants that were cast once."""
        return self.absolute + self.added

    def several(self, linear: F64) -> F64:
        """The bound for constants that were computed in the stored type.

        Args:
            linear: The norm of each channel without what is added.
        """
        walked = DEVIATIONS * self.random + COMMON * linear
        return np.minimum(ROUNDINGS * self.absolute, walked) + ROUNDINGS * self.added


NOTHING = np.zeros(1)
MANY = 256


def channel_axis(op_type: str, rank: int) -> int | None:
    """Which axis of an output of ``rank`` axes has the channels; None where there is none."""
    if rank < 2:
        return 0 if rank else None
    return rank - 1 if op_type in ("Gemm", "MatMul") else 1


def norms(value: F64, axis: int | None) -> F64:
    """The Euclidean norm of each channel."""
    if axis is None or not value.size:
        return np.atleast_1d(np.linalg.norm(value))
    before, behind = prod(value.shape[:axis]), prod(value.shape[axis + 1 :])
    flat = value.reshape(before, value.shape[axis], behind)
    squares: F64 = np.sqrt(np.einsum("bcs,bcs->c", flat, flat))
    return squares


def fitting(bound: F64, channels: int) -> F64:
    """A bound on each of so many channels; where it is on others, all of it for each of them."""
    return bound if bound.size in (1, channels) else np.atleast_1d(np.linalg.norm(bound))


def rounding(
    operation: Operation, y: F64, axis: int | None, *, once: bool | None = None
) -> Rounding:
    """What rounding the constants of an operator does to its output ``y``.

    Args:
        operation: The operator that computed ``y``.
        y: Its output.
        axis: The channel axis of ``y``.
        once: Whether `Rounding.once` will be asked for or `Rounding.several`; None for both.
    """
    if operation.op_type in LINEAR and not any(operation.constant):
        return Rounding(NOTHING, NOTHING, NOTHING)
    if operation.op_type in ("Conv", "ConvTranspose"):
        return _conv(operation, y, axis, once)
    return _RULES.get(operation.op_type, _elementwise)(operation, y, axis)


def _conv(operation: Operation, y: F64, axis: int | None, once: bool | None) -> Rounding:
    x, w = operation.inputs[:2]
    groups = int(operation.attributes.get("group") or 1)
    flat = w.reshape(*w.shape[:2], -1)
    inner = norms(x, 1).reshape(groups, -1)
    added = _added(operation.bias(), y, axis)

    def absolute() -> F64:
        return _summed(operation.op_type, np.abs(flat).sum(axis=2), inner, groups)

    if once or _few_values(w):
        sums = absolute()
        return Rounding(sums, sums, added)
    sizes = np.einsum("mck,mck->mc", flat, flat)
    random = np.sqrt(_summed(operation.op_type, sizes, np.square(inner), groups))
    # Of many weights the absolute sum is far above what a walk of them comes to.
    many = once is False and w[0].size > MANY
    return Rounding(np.full_like(random, np.inf) if many else absolute(), random, added)


def half_steps(operation: Operation, y: F64, axis: int | None) -> F64:
    """What rounding a bias to integers does to each channel of an output ``y``."""
    if operation.bias_step is None:
        return NOTHING
    return _added(operation.bias_step / 2, y, axis)


def carried(operation: Operation, noise: F64, axis: int | None, *, once: bool) -> F64 | None:
    """What the noise of each channel of its input is on each channel of a linear operator's output.

    Args:
        operation: The operator.
        noise: The norm on each channel, or one of all.
        axis: The channel axis of the input; None where it has none.
        once: Whether the worst is asked for, or what independent roundings come to.

    Returns:
        A norm for each channel; None where it can't be told.
    """
    if operation.op_type not in LINEAR or not operation.constant[1]:
        return None
    w, rank = operation.inputs[1], np.ndim(operation.inputs[0])
    if operation.op_type in ("Conv", "ConvTranspose"):
        flat, expected = w.reshape(*w.shape[:2], -1), 1
    else:
        turned = w.T if operation.attributes.get("transB") else w
        flat, expected = turned.T[:, :, None], rank - 1
    if w.ndim < 2 or (operation.op_type in ("Gemm", "MatMul") and w.ndim > 2):
        return None
    groups = int(operation.attributes.get("group") or 1)
    transposed = operation.op_type == "ConvTranspose"
    inputs = flat.shape[0] if transposed else flat.shape[1] * groups
    if noise.size != inputs or axis != expected:
        return None
    sizes = np.abs(flat).sum(axis=2) if once else np.square(flat).sum(axis=2)
    inner = (noise if once else np.square(noise)).reshape(groups, -1)
    summed = _summed("ConvTranspose" if transposed else "Conv", sizes, inner, groups)
    alpha = abs(float(operation.attributes.get("alpha", 1.0)))
    return alpha * (summed if once else np.sqrt(summed))


def _summed(op_type: str, sizes: F64, inner: F64, groups: int) -> F64:
    """Over the input channels of each group, for each output channel."""
    if op_type == "Conv":
        summed = np.einsum("gmc,gc->gm", sizes.reshape(groups, -1, sizes.shape[1]), inner)
    else:
        summed = np.einsum("gcm,gc->gm", sizes.reshape(groups, inner.shape[1], -1), inner)
    flat: F64 = summed.ravel()
    return flat


def _few_values(w: F64) -> bool:
    """Whether many of the weights of a channel are of one size, so that they are rounded alike."""
    some = np.abs(w[0]).ravel()[:1024]
    return bool(np.unique(some).size < 0.5 * some.size)


def _gemm(operation: Operation, y: F64, axis: int | None) -> Rounding:
    a, b = operation.inputs[:2]
    attributes = operation.attributes
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    alpha, beta = (abs(float(attributes.get(name, 1.0))) for name in ("alpha", "beta"))
    bias = operation.bias()
    added = beta * norms(np.broadcast_to(bias, y.shape), axis) if bias is not None else NOTHING
    return _product(alpha * a, b, axis, constant=operation.constant[1], added=added)


def _matmul(operation: Operation, _: F64, axis: int | None) -> Rounding:
    a, b = operation.inputs[:2]
    return _product(a, b, axis, constant=operation.constant[1], added=NOTHING)


def _product(a: F64, b: F64, axis: int | None, *, constant: bool, added: F64) -> Rounding:
    if constant and b.ndim == 2 and a.ndim >= 2:
        inner = norms(a, a.ndim - 1)
        absolute: F64 = inner @ np.abs(b)
        random = absolute if _few_values(b.T) else np.sqrt(np.square(inner) @ np.square(b))
        return Rounding(absolute, random, added)
    absolute = norms(np.abs(a) @ np.abs(b), axis)
    return Rounding(absolute, absolute, added)


def _batch_norm(operation: Operation, y: F64, _: int | None) -> Rounding:
    x, gamma, beta, mean, variance = operation.inputs[:5]
    scale = np.abs(gamma) / np.sqrt(variance + float(operation.attributes.get("epsilon", 1e-5)))
    count = np.sqrt(y.size / max(len(gamma), 1))
    read = scale * norms(x, 1)
    return Rounding(read, read, scale * np.abs(mean) * count + np.abs(beta) * count)


def _elementwise(operation: Operation, y: F64, axis: int | None) -> Rounding:
    """Any other operator: its output's size and that of its constants, where it has some."""
    consts = [
        value
        for value, constant in zip(operation.inputs, operation.constant, strict=False)
        if constant and isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size
    ]
    if not consts:
        return Rounding(NOTHING, NOTHING, NOTHING)
    size = norms(y, axis)
    return Rounding(size, size, sum((_added(value, y, axis) for value in consts), NOTHING))


def _added(constant: F64 | None, y: F64, axis: int | None) -> F64:
    """The norm of a constant that is added to each channel of ``y``."""
    if constant is None:
        return NOTHING
    if axis is not None and constant.ndim == 1 and constant.size == y.shape[axis]:
        along: F64 = np.abs(constant) * np.sqrt(y.size / max(y.shape[axis], 1))
        return along
    try:
        return norms(np.broadcast_to(constant, y.shape), axis)
    except ValueError:
        # It does not broadcast: a table, a list of sizes. Its largest entry, everywhere.
        return np.full(1, float(np.abs(constant).max()) * np.sqrt(prod(y.shape)))


_RULES = {
    "Gemm": _gemm, "MatMul": _matmul, "BatchNormalization": _batch_norm,
}  # fmt: skip
