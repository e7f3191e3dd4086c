"""Frozen dataclasses to JSON's own types and back, by their annotations."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints


def plain(value: Any) -> Any:
    """``value`` as strings, numbers, lists, mappings and None.

    A number that is not finite becomes a string (``"inf"``, ``"-inf"``, ``"nan"``), since JSON has
    no word for it.
    """
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def restored(kind: Any, stored: Any) -> Any:
    """What ``plain`` made of a value of type ``kind``, made that value again.

    Unknown keys are ignored, so that a newer writer can be read.

    Raises:
        ValueError: ``stored`` does not fit; names the field.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if stored is None:
            return None
        return restored(next(option for option in inner if option is not type(None)), stored)
    if is_dataclass(kind):
        return _dataclass(kind, stored)
    if origin is tuple:
        return _tuple(inner, stored)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: restored(inner[1], value) for key, value in _of(Mapping, stored).items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(stored)
    if kind is float:
        return float(_of((int, float, str), stored))
    return _of(kind, stored)


def _dataclass(kind: Any, stored: Any) -> Any:
    hints = get_type_hints(kind)
    given = _of(Mapping, stored)
    values = {}
    for field in fields(kind):
        if field.name not in given:
            continue  # its default; a field without one is missed below
        try:
            values[field.name] = restored(hints[field.name], given[field.name])
        except ValueError as error:
            raise ValueError(f"{field.name}: {error}") from error
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def _tuple(inner: tuple[Any, ...], stored: Any) -> tuple[Any, ...]:
    items = _of((list, tuple), stored)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(restored(inner[0], item) for item in items)
    if len(items) != len(inner):
        raise ValueError(f"{len(items)} values, not {len(inner)}")
    return tuple(restored(kind, item) for kind, item in zip(inner, items, strict=True))


def _of(kind: Any, stored: Any) -> Any:
    if isinstance(stored, bool) and kind is not bool:
        raise ValueError(f"{stored!r} is out of place")
    if not isinstance(stored, kind):
        raise ValueError(f"{stored!r} is out of place")
    return stored
