"""Operators that ONNX Runtime puts in the place of several, so that what it wrote can be judged.

Source: the contributed operators of ONNX Runtime (domain ``com.microsoft``), version 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from bnfold.verify.oracle_conv import Conv
from bnfold.verify.windows import F64


class FusedConv(OpRun):
    """``activation(Conv(x, w, b) + z)``."""

    op_domain = "com.microsoft"

    def _run(
        self, x: F64, w: F64, bias: F64 | None = None, z: F64 | None = None, *,
        activation: str = "", activation_params: Sequence[float] | None = None, **window: Any,
    ) -> tuple[F64]:  # fmt: skip
        (y,) = Conv._run(self, x, w, bias, **window)  # type: ignore[arg-type]
        if z is not None:
            y = y + z
        return (activated(y, activation, tuple(activation_params or ())),)


class FusedGemm(OpRun):
    """``activation(alpha A' B' + beta C)``."""

    op_domain = "com.microsoft"

    def _run(
        self, a: F64, b: F64, c: F64 | None = None, *, alpha: float = 1.0, beta: float = 1.0,
        transA: int = 0, transB: int = 0, activation: str = "", **parameters: Any,  # noqa: N803
    ) -> tuple[F64]:  # fmt: skip
        y: F64 = alpha * ((a.T if transA else a) @ (b.T if transB else b))
        y = y if c is None else y + beta * c
        given = tuple(parameters[f"activation_{name}"] for name in ("alpha", "beta", "gamma")
                      if parameters.get(f"activation_{name}") is not None)  # fmt: skip
        return (activated(y, activation, given),)


class FusedMatMul(OpRun):
    """``alpha A' B'``, where a prime swaps the last two axes, and the first with those between."""

    op_domain = "com.microsoft"

    def _run(
        self, a: F64, b: F64, *, alpha: float = 1.0, transA: int = 0, transB: int = 0,  # noqa: N803
        transBatchA: int = 0, transBatchB: int = 0,  # noqa: N803
    ) -> tuple[F64]:  # fmt: skip
        left, right = _turned(a, transA, transBatchA), _turned(b, transB, transBatchB)
        return (alpha * (left @ right),)


def _turned(x: F64, last: int, batch: int) -> F64:
    if batch and x.ndim > 2:
        x = np.moveaxis(x, 0, -2)
    return np.swapaxes(x, -1, -2) if last and x.ndim > 1 else x


class Gelu(OpRun):
    """``x (1 + erf(x / sqrt(2))) / 2``."""

    op_domain = "com.microsoft"

    def _run(self, x: F64, **_: Any) -> tuple[F64]:
        # The evaluator hands over the attributes of the standard's operator of that name.
        return (gelu(x),)


class BiasGelu(OpRun):
    """``Gelu(x + b)``."""

    op_domain = "com.microsoft"

    def _run(self, x: F64, bias: F64) -> tuple[F64]:
        return (gelu(x + bias),)


class QuickGelu(OpRun):
    """``x sigmoid(alpha x)``."""

    op_domain = "com.microsoft"

    def _run(self, x: F64, *, alpha: float = 1.702) -> tuple[F64]:
        return (x / (1 + np.exp(-alpha * x)),)


class SkipLayerNormalization(OpRun):
    """Layer normalization over the last axis of ``x + skip + bias``."""

    op_domain = "com.microsoft"

    def _run(
        self, x: F64, skip: F64, gamma: F64, beta: F64 | None = None, bias: F64 | None = None, *,
        epsilon: float = 1e-12,
    ) -> tuple[F64, ...]:  # fmt: skip
        total = x + skip if bias is None else x + skip + bias
        mean = total.mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(total.var(axis=-1, keepdims=True) + epsilon)
        y = (total - mean) * inverse * gamma
        y = y if beta is None else y + beta
        return (y, mean, inverse, total)[: len(self.output)]


def gelu(x: F64) -> F64:
    """``x`` times the normal distribution of ``x``."""
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), np.float64, x.size)
    return 0.5 * x * (1 + erf.reshape(x.shape))


def activated(y: F64, name: str, given: Sequence[float]) -> F64:
    """The activation that a fused operator names, with its parameters.

    Raises:
        NotImplementedError: It is none of the known ones.
    """
    if name in ("", "Relu"):
        return np.maximum(y, 0.0) if name else y
    if name == "LeakyRelu":
        return np.where(y < 0, y * (given[0] if given else 0.01), y)
    if name == "Clip":
        return np.clip(y, given[0], given[1])
    if name == "HardSigmoid":
        return np.clip(y * given[0] + given[1], 0.0, 1.0)
    if name in ("Sigmoid", "Tanh"):
        return 1 / (1 + np.exp(-y)) if name == "Sigmoid" else np.tanh(y)
    raise NotImplementedError(f"activation {name}")


FUSED: tuple[type[OpRun], ...] = (
    BiasGelu, FusedConv, FusedGemm, FusedMatMul, Gelu, QuickGelu, SkipLayerNormalization,
)  # fmt: skip
