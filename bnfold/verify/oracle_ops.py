"""Small operators of the oracle, where the reference implementation is wrong, narrow or slow.

``BatchNormalization``: y = scale * x + shift with scale = gamma / sqrt(var + eps) and
shift = beta - scale * mean, in every version of the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op

from bnfold.verify.oracle_conv import Conv
from bnfold.verify.oracle_loop import Loop
from bnfold.verify.oracle_pool import AveragePool, GlobalAveragePool, MaxPool
from bnfold.verify.oracle_quantised import DequantizeLinear, QuantizeLinear
from bnfold.verify.oracle_transposed import ConvTranspose
from bnfold.verify.windows import F64, on_channels, pad_constant

LIFTED = frozenset({"float16", "bfloat16", "float32"})
_LIFTED_ONNX = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)


class BatchNormalization(OpRun):
    """Batch normalization over axis 1; the reference takes opset 9 for training."""

    def _run(
        self,
        x: F64,
        gamma: F64,
        beta: F64,
        mean: F64,
        variance: F64,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        spatial: int = 1,
        training_mode: int | None = None,
        **_: Any,
    ) -> tuple[F64, ...]:
        if self._trains(training_mode):
            return self._train(x, gamma, beta, mean, variance, float(epsilon), float(momentum))
        scale = gamma / np.sqrt(variance + float(epsilon))
        # spatial = 0 (before opset 9): statistics for each place, not only for each channel.
        shape = (1, *x.shape[1:]) if not spatial else (1, -1, *(1,) * (x.ndim - 2))
        y = x * scale.reshape(shape)
        y += (beta - scale * mean).reshape(shape)
        return (y,)

    def _trains(self, training_mode: int | None) -> bool:
        if self.run_params["opsets"].get("", 0) >= 14:
            return bool(training_mode)
        # Before opset 14, more than one output is what asks for training.
        return sum(map(bool, self.output)) > 1

    def _train(
        self, x: F64, gamma: F64, beta: F64, mean: F64, var: F64, epsilon: float, momentum: float
    ) -> tuple[F64, ...]:
        axes = (0, *range(2, x.ndim))
        now_mean, now_var = x.mean(axis=axes), x.var(axis=axes)
        scale = gamma / np.sqrt(now_var + epsilon)
        y = (x - on_channels(now_mean, x.ndim)) * on_channels(scale, x.ndim)
        y += on_channels(beta, x.ndim)
        running = (
            mean * momentum + now_mean * (1 - momentum),
            var * momentum + now_var * (1 - momentum),
        )
        return (y, *running, now_mean, now_var)[: len(self.output)]


class Gemm(OpRun):
    """``alpha * A' @ B' + beta * C``, in every version of the operator."""

    def _run(
        self,
        a: F64,
        b: F64,
        c: F64 | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,  # noqa: N803 - the attribute's name
        transB: int = 0,  # noqa: N803 - the attribute's name
        **_: Any,
    ) -> tuple[F64]:
        y: F64 = (a.T if transA else a) @ (b.T if transB else b)
        if alpha != 1:
            y *= alpha
        # beta = 0 leaves C out, even where C is not finite.
        return (y if c is None or beta == 0 else y + beta * c,)


class Pad(OpRun):
    """Pads, and crops where a pad is negative, in every version of the operator."""

    def _run(
        self,
        data: NDArray[Any],
        pads_in: NDArray[np.int64] | None = None,
        value_in: NDArray[Any] | None = None,
        axes: NDArray[np.int64] | None = None,
        *,
        mode: str = "constant",
        pads: Sequence[int] | None = None,
        paddings: Sequence[int] | None = None,
        value: float = 0.0,
    ) -> tuple[NDArray[Any]]:
        widths = pads_in if pads_in is not None else (pads or paddings)
        before, after = _pads_per_axis(data.ndim, np.asarray(widths), axes)
        if mode == "constant":
            fill = value_in.item() if value_in is not None and value_in.size else value
            return (pad_constant(data, before, after, fill),)
        cropped = pad_constant(data, [min(0, b) for b in before], [min(0, a) for a in after])
        around = [(max(0, b), max(0, a)) for b, a in zip(before, after, strict=True)]
        padded: NDArray[Any] = np.pad(cropped, around, mode=mode)  # type: ignore[call-overload]
        return (padded,)


def _pads_per_axis(
    rank: int, pads: NDArray[np.int64], axes: NDArray[np.int64] | None
) -> tuple[list[int], list[int]]:
    named = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    before, after = [0] * rank, [0] * rank
    for axis, b, a in zip(named, pads[: len(named)], pads[len(named) :], strict=True):
        before[axis], after[axis] = int(b), int(a)
    return before, after


class Cast(OpRun):
    """A cast between float types is the identity in real arithmetic; others are done."""

    def _run(self, x: NDArray[Any], *, to: int, **attributes: Any) -> tuple[NDArray[Any]]:
        if to in _LIFTED_ONNX:
            return (x.astype(np.float64),)
        cls = load_op("", "Cast", self.run_params["opsets"].get("", None))
        delegate = cls(self.onnx_node, self.run_params)
        kept = {name: attributes[name] for name in delegate.attributes_names_ if name in attributes}
        result: tuple[NDArray[Any]] = delegate._run(x, to=to, **kept)
        return result


class Erf(OpRun):
    """The error function; the reference rounds it to float32."""

    def _run(self, x: F64) -> tuple[F64]:
        values = np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size)
        return (values.reshape(x.shape),)


class Relu(OpRun):
    """``max(x, 0)`` without the reference's second copy."""

    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (np.maximum(x, x.dtype.type(0)),)


OPS: tuple[type[OpRun], ...] = (
    AveragePool, BatchNormalization, Cast, Conv, ConvTranspose, DequantizeLinear, Erf, Gemm,
    GlobalAveragePool, Loop, MaxPool, Pad, QuantizeLinear, Relu,
)  # fmt: skip
