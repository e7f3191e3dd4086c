"""float64 to the stored type, rounded once.

A cast from float64 to bfloat16 by way of float32 rounds twice and can end one unit off: halfway
cases are made by the first rounding. Rounding to odd in between keeps the information that the
second rounding needs (Boldo and Melquiond, "When double rounding is odd", 2004).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray


def cast_once(values: NDArray[np.float64], dtype: DTypeLike) -> NDArray[Any]:
    """``values`` rounded to the nearest ``dtype``, ties to even.

    Args:
        values: float64, any shape.
        dtype: float16, bfloat16 (of ml_dtypes), float32 or float64.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if np.dtype(dtype) == np.dtype(ml_dtypes.bfloat16):
            return _rounded_to_odd(values).astype(dtype)
        return np.asarray(values).astype(dtype)


def _rounded_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 with the last bit set wherever the cast was not exact, rounded towards zero."""
    near = np.asarray(values, dtype=np.float64).astype(np.float32)
    wide = near.astype(np.float64)
    away = np.isfinite(near) & (np.abs(wide) > np.abs(values))
    down = np.where(away, np.nextafter(near, np.float32(0)), near)
    inexact = np.isfinite(down) & (down.astype(np.float64) != values)
    bits = down.view(np.int32) | inexact.astype(np.int32)
    result: NDArray[np.float32] = np.asarray(bits, dtype=np.int32).view(np.float32)
    return result
