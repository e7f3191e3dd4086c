"""``y = s (x - z)`` and ``q = saturate(round(x / s) + z)`` in float64, in every version.

The reference has no version before 19, and computes in float32, where an int32 bias of more than
24 bits loses digits.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference.op_run import OpRun

from bnfold.verify.windows import F64

_INTEGERS = frozenset({
    TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT4,
    TensorProto.INT4, TensorProto.UINT2, TensorProto.INT2,
})  # fmt: skip


class DequantizeLinear(OpRun):
    """Integers to the numbers that they stand for."""

    def _run(
        self,
        x: NDArray[Any],
        scale: F64,
        zero_point: NDArray[Any] | None = None,
        *,
        axis: int | None = None,
        block_size: int | None = None,
        **_: Any,
    ) -> tuple[F64]:
        wide = x.astype(np.float64)
        if zero_point is not None:
            wide = wide - beside(zero_point.astype(np.float64), x.shape, axis, block_size)
        return (wide * beside(scale, x.shape, axis, block_size),)


class QuantizeLinear(OpRun):
    """Numbers to the nearest integers that stand for them, ties to even."""

    def _run(
        self,
        x: NDArray[Any],
        scale: F64,
        zero_point: NDArray[Any] | None = None,
        *,
        axis: int | None = None,
        block_size: int | None = None,
        output_dtype: int | None = None,
        saturate: int | None = None,
        **_: Any,
    ) -> tuple[NDArray[Any]]:
        number = output_dtype or TensorProto.UINT8
        if zero_point is not None:
            number = helper.np_dtype_to_tensor_dtype(zero_point.dtype)
        dtype = helper.tensor_dtype_to_np_dtype(number)
        wide = x.astype(np.float64) / beside(scale, x.shape, axis, block_size)
        if number not in _INTEGERS:
            kept = saturate is None or bool(saturate)
            stored: NDArray[Any] = (
                numpy_helper.saturate_cast(wide, dtype=dtype) if kept else wide.astype(dtype)
            )
            return (stored,)
        wide = np.rint(wide)
        if zero_point is not None:
            wide = wide + beside(zero_point.astype(np.float64), x.shape, axis, block_size)
        info = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
        # A number that is none is 0, as a cast in C makes it of most.
        return (np.nan_to_num(np.clip(wide, int(info.min), int(info.max))).astype(dtype),)


def beside(
    values: NDArray[Any], shape: tuple[int, ...], axis: int | None, block_size: int | None
) -> NDArray[Any]:
    """Scales or zero points, shaped to broadcast against what they belong to."""
    if values.size == 1:
        return values.reshape(())
    place = (1 if axis is None else axis) % len(shape)
    if block_size:
        return np.repeat(values, block_size, axis=place)[tuple(slice(0, size) for size in shape)]
    return values.reshape([-1 if k == place else 1 for k in range(len(shape))])
