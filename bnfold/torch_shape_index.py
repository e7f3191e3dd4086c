"""Sizes that a graph asks for, and shapes of what indices take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

from bnfold.channel_graph import Dim
from bnfold.torch_shape_asked import (
    Array,
    Asked,
    Known,
    Pieces,
    Rule,
    Shape,
    data_and_axis,
    with_sizes,
)
from bnfold.torch_sizes import product, quotient

_END = 2**63 - 1  # how ATen writes the end of an axis

# ---- sizes ----


def _size(asked: Asked) -> Known:
    data = asked.shape()
    if asked.call["dim"] is None:
        return data
    found = data_and_axis(asked)
    return asked.state.symbol(asked.call.node) if found is None else found[0][found[1]]


def _rank(asked: Asked) -> Known:
    data = asked.shape()
    return None if data is None else len(data)


def _count(asked: Asked) -> Known:
    data = asked.shape()
    return None if data is None else product(data)


def _attribute(asked: Asked) -> Known:
    values = list(asked.call.arguments.values())
    found, name = asked.state.known(values[0]), values[1]
    if isinstance(found, tuple) and name in ("values", "indices"):
        return _entry(found, int(name == "indices"))
    if not isinstance(found, Array):
        return None
    shape = found.shape
    known: Mapping[Any, Known] = {
        "shape": shape, "ndim": len(shape), "data": found, "T": Array(shape[::-1]),
        "mT": Array((*shape[:-2], *shape[-2:][::-1])),
    }  # fmt: skip
    return known.get(name)


# ---- indices ----


def _getitem(asked: Asked) -> Known:
    data, index = asked.known("input"), asked.call["index"]
    if isinstance(data, Pieces):
        return Array(data.shape) if isinstance(index, int) else None
    if isinstance(data, tuple):
        return _entry(data, _cut(asked, index) if isinstance(index, slice) else index)
    if not isinstance(data, Array):
        return None
    return _indexed(asked, data.shape, index if isinstance(index, tuple) else (index,))


def _entry(listed: tuple[Any, ...], index: Any) -> Known:
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        return listed[index] if all(isinstance(v, int | None) for v in bounds) else None
    inside = isinstance(index, int) and -len(listed) <= index < len(listed)
    found: Known = listed[index] if inside else None
    return found


def _cut(asked: Asked, cut: slice) -> slice:
    """A slice whose bounds are what is known of them; False is one that nothing is known of."""
    bounds = (cut.start, cut.stop, cut.step)
    found = (None if v is None else asked.state.known(v) for v in bounds)
    return slice(*(v if isinstance(v, int | str) else None if b is None else False
                   for v, b in zip(found, bounds, strict=True)))  # fmt: skip


def _sliced(size: Dim, cut: slice) -> Dim:
    bounds = [cut.start, cut.stop, cut.step]
    if any(v is False for v in bounds):
        return None
    if isinstance(size, int) and not any(isinstance(v, str) for v in bounds):
        return len(range(*cut.indices(size)))
    whole = cut.start in (None, 0) and cut.stop in (None, _END, size)
    return quotient(size, cut.step or 1) if whole else None


def _indexed(asked: Asked, shape: Shape, index: Sequence[Any]) -> Known:
    """Integers, slices, None and an ellipsis; by tensors nothing is known."""
    taken = sum(entry is not None and not isinstance(entry, EllipsisType) for entry in index)
    rest = len(shape) - taken
    if rest < 0:
        return None
    listed = list(index) if any(isinstance(v, EllipsisType) for v in index) else [*index, ...]
    left, made = list(shape), list[Dim]()
    for entry in listed:
        if entry is None:
            made.append(1)
        elif isinstance(entry, EllipsisType):
            made += left[:rest]
            del left[:rest]
        elif isinstance(entry, slice):
            made.append(_sliced(left.pop(0), _cut(asked, entry)))
        elif isinstance(asked.state.known(entry), int | str):
            left.pop(0)
        else:
            return None
    return Array(tuple(made))


def _slice(asked: Asked) -> Known:
    found = data_and_axis(asked)
    if found is None:
        return None
    data, axis = found
    cut = _cut(asked, slice(asked.call["start"], asked.call["end"], asked.call["step"]))
    return Array(with_sizes(data, axis, _sliced(data[axis], cut)))


def _select(asked: Asked) -> Known:
    found = data_and_axis(asked)
    return Array(with_sizes(*found)) if found else None


def _narrow(asked: Asked) -> Known:
    found = data_and_axis(asked)
    return Array(with_sizes(*found, asked.size("length"))) if found else None


def _index_select(asked: Asked) -> Known:
    found, index = data_and_axis(asked), asked.shape("index")
    if found is None or index is None or len(index) > 1:
        return None
    return Array(with_sizes(*found, product(index)))


def _as_index(asked: Asked) -> Known:
    index = asked.shape("index")
    return None if index is None else Array(index)


def _as_other(asked: Asked) -> Known:
    other = asked.shape("other")
    return None if other is None else Array(other)


INDICES: Mapping[str, Rule] = {
    "size": _size, "sym_size": _size, "dim": _rank, "numel": _count, "sym_numel": _count,
    "getattr": _attribute, "getitem": _getitem,
    "slice": _slice, "select": _select, "narrow": _narrow, "index_select": _index_select,
    "gather": _as_index, "take_along_dim": _as_index,
    "view_as": _as_other, "expand_as": _as_other, "reshape_as": _as_other,
}  # fmt: skip
