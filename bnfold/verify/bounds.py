"""``||y_fold - y_unf|| <= k u (sum_c ||W'_mc||_1 ||x_c||_2 + ||b'_m||_2)`` on each channel m.

How far rounding the stored constants of one operator can move its outputs: each of them is off by
at most ``u`` of its size, and by Young's inequality a kernel moves the norm of a channel by no more
than its absolute sum times the norm of what it reads. Norms are Euclidean, over all elements of a
channel; ``k`` counts roundings (1 for weights that were cast once).

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


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator with the values of its inputs.

    Attributes:
        op_type: Its type.
        inputs: Its inputs, None where one is left out; floats are float64.
        constant: Which of them are constants of the model.
        attributes: Its attributes.
    """

    op_type: str
    inputs: Sequence[Any]
    constant: Sequence[bool]
    attributes: Mapping[str, Any]

    @property
    def linear(self) -> bool:
        """Whether it is a linear operator with a constant weight, which a fold may change."""
        return self.op_type in LINEAR and any(self.constant[:2])

    def bias(self) -> F64 | None:
        """What it adds, if it can."""
        if self.op_type in ("Add", "Sub"):
            return next((x for x, c in zip(self.inputs, self.constant, strict=True) if c), None)
        found = self.inputs[2] if len(self.inputs) > 2 else None
        return None if self.op_type == "MatMul" else found


def channel_axis(op_type: str, rank: int) -> int | None:
    """Which axis of an output of ``rank`` axes has the channels; None where there is none."""
    if rank < 2:
        return 0 if rank else None
    return rank - 1 if op_type in ("Gemm", "MatMul") else 1


def norms(value: F64, axis: int | None) -> F64:
    """The Euclidean norm of each channel."""
    if axis is None or not value.size:
        return np.atleast_1d(np.linalg.norm(value))
    others = tuple(i for i in range(value.ndim) if i != axis)
    squares: F64 = np.sqrt(np.square(value).sum(axis=others))
    return squares


def rounding_norms(operation: Operation, y: F64, axis: int | None) -> F64:
    """The bound for ``k u = 1``, of each channel of the output ``y``.

    Args:
        operation: The operator that computed ``y``.
        y: Its output.
        axis: The channel axis of ``y``.
    """
    rule = _RULES.get(operation.op_type, _elementwise)
    if operation.op_type in LINEAR and not any(operation.constant):
        return np.zeros(1)
    return rule(operation, y, axis)


def _conv(operation: Operation, y: F64, axis: int | None) -> F64:
    x, w = operation.inputs[:2]
    groups = int(operation.attributes.get("group") or 1)
    sizes = np.abs(w).reshape(*w.shape[:2], -1).sum(axis=2)
    inner = norms(x, 1).reshape(groups, -1)
    if operation.op_type == "Conv":
        per_group = sizes.reshape(groups, -1, w.shape[1])
        summed = np.einsum("gmc,gc->gm", per_group, inner)
    else:
        per_group = sizes.reshape(groups, inner.shape[1], -1)
        summed = np.einsum("gcm,gc->gm", per_group, inner)
    total: F64 = summed.ravel() + _added(operation.bias(), y, axis)
    return total


def _gemm(operation: Operation, y: F64, axis: int | None) -> F64:
    a, b = operation.inputs[:2]
    attributes = operation.attributes
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    alpha, beta = (float(attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    bias = operation.bias()
    added = abs(beta) * norms(np.broadcast_to(bias, y.shape), axis) if bias is not None else 0.0
    if operation.constant[1] or not operation.constant[0]:
        summed: F64 = abs(alpha) * norms(a, 1) @ np.abs(b) + added
        return summed
    return norms(np.abs(a) @ np.abs(b), axis) * abs(alpha) + added


def _matmul(operation: Operation, y: F64, axis: int | None) -> F64:
    a, b = operation.inputs[:2]
    if operation.constant[1] and b.ndim == 2 and a.ndim >= 2:
        summed: F64 = norms(a, a.ndim - 1) @ np.abs(b)
        return summed
    return norms(np.abs(a) @ np.abs(b), axis)


def _batch_norm(operation: Operation, y: F64, axis: int | None) -> F64:
    x, gamma, beta, mean, variance = operation.inputs[:5]
    scale = np.abs(gamma) / np.sqrt(variance + float(operation.attributes.get("epsilon", 1e-5)))
    count = np.sqrt(y.size / max(len(gamma), 1))
    moved: F64 = scale * (norms(x, 1) + np.abs(mean) * count) + np.abs(beta) * count
    return moved


def _elementwise(operation: Operation, y: F64, axis: int | None) -> F64:
    """Any other operator: its output's size and that of its constants, where it has some."""
    consts = [
        value
        for value, constant in zip(operation.inputs, operation.constant, strict=False)
        if constant and isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size
    ]
    if not consts:
        return np.zeros(1)
    return norms(y, axis) + sum((_added(value, y, axis) for value in consts), np.zeros(1))


def _added(constant: F64 | None, y: F64, axis: int | None) -> F64:
    """The norm of a constant that is added to each channel of ``y``."""
    if constant is None:
        return np.zeros(1)
    if axis is not None and constant.ndim == 1 and constant.size == y.shape[axis]:
        along: F64 = np.abs(constant) * np.sqrt(y.size / max(y.shape[axis], 1))
        return along
    try:
        return norms(np.broadcast_to(constant, y.shape), axis)
    except ValueError:
        # It does not broadcast: a table, a list of sizes. Its largest entry, everywhere.
        return np.full(1, float(np.abs(constant).max()) * np.sqrt(prod(y.shape)))


_RULES = {
    "Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
}  # fmt: skip
