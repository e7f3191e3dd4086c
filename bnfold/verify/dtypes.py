"""Numpy's types by what they hold; ``ml_dtypes`` calls all of its own ones ``V``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Dtype = np.dtype[Any]

# The package is untyped there.
_finfo: Callable[[Dtype], Any] = ml_dtypes.finfo
_iinfo: Callable[[Dtype], Any] = ml_dtypes.iinfo

# From narrow to wide: a value of one family can be a value of the next.
FAMILIES = ("bool", "integer", "float", "complex")
_BY_KIND = {"b": "bool", "i": "integer", "u": "integer", "f": "float", "c": "complex",
            "U": "string", "S": "string", "O": "string"}  # fmt: skip


def family(dtype: Dtype) -> str:
    """``bool``, ``integer``, ``float``, ``complex`` or ``string``; else numpy's own kind."""
    if dtype.kind in _BY_KIND:
        return _BY_KIND[dtype.kind]
    try:
        _iinfo(dtype)
    except ValueError:
        return "float" if _is_float(dtype) else dtype.kind
    return "integer"


def _is_float(dtype: Dtype) -> bool:
    try:
        _finfo(dtype)
    except ValueError:
        return False
    return True


def largest(dtype: Dtype) -> float:
    """The largest finite value of a float type."""
    return float(_finfo(dtype).max)


def integer_bounds(dtype: Dtype) -> tuple[int, int]:
    """The smallest and the largest value of an integer type."""
    info = _iinfo(dtype)
    return int(info.min), int(info.max)
