"""float64 to the stored type, rounded once.

A cast from float64 to bfloat16 by way of float32 rounds twice and can end one unit off: halfway
cases are made by the first rounding. Rounding to odd in between keeps the information that the
second rounding needs (Boldo and Melquiond, "When double rounding is odd", 2004).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def cast_once(values: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
    """``values`` rounded to the nearest ``dtype``, ties to even.

    Args:
        values: float64, any shape.
        dtype: float16, bfloat16 (of ml_dtypes), float32 or float64.

    Returns:
        A new C-contiguous array; what is too large for ``dtype`` is infinite in it.
    """
    wide = np.asarray(values, dtype=np.float64)
    result = np.empty(wide.shape, dtype=dtype)
    round_into(result, wide)
    return result


def round_into(target: NDArray[Any], values: NDArray[np.float64]) -> None:
    """``cast_once`` into an array that is there already.

    Args:
        target: Of one of the four types; overwritten.
        values: float64, of the same shape.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        target[...] = _rounded_to_odd(values) if target.dtype == _BFLOAT16 else values


def _rounded_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 rounded towards zero, with the last bit set wherever that was not exact."""
    near = values.astype(np.float32)
    wide = near.astype(np.float64)
    # One less in the bits is one step towards zero, for either sign, and from infinity to the
    # largest number. NaN is not larger than anything, and stays NaN with its last bit set.
    bits = near.view(np.int32) - (np.abs(wide) > np.abs(values))
    odd: NDArray[np.int32] = bits | (wide != values)
    return odd.astype(np.int32, copy=False).view(np.float32)
