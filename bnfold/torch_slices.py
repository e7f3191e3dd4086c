"""Operations that take entries along axes: all of them are one indexing expression.

select(x, 1, 2)         x[:, 2]
slice narrow            x[:, a:b:step]
index_select index      x[:, indices]
unfold                  windows along an axis, or patches of images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from bnfold.channel_graph import Dim, Link, Operator, ShiftRule, Sign
from bnfold.index_maps import same_axes
from bnfold.torch_facts import Shape, type_name
from bnfold.torch_moves import moved, whole
from bnfold.torch_rules import Asked, Links, Rule, UnstatedError, Way, axis_of

_END = 2**31 - 1  # as the end of a slice, this and everything above is the end of the axis
_INDEX_TYPES = ("int64", "int32", "int16", "int8")


@dataclass(frozen=True, slots=True, eq=False)
class _Picks:
    """Entries of an axis by number, in an array of ``rank`` axes.

    Without ``index`` it is not known which; ``node`` holds it then.
    """

    index: NDArray[np.int64] | None
    rank: int
    node: fx.Node | None = None


_Entry = slice | int | _Picks | None
_EVERY = slice(None)


# ---- an indexing expression as links ----


def _indexed(asked: Asked, entries: Sequence[_Entry]) -> Operator:
    """``input[entries]`` as Python writes it; None is a new axis."""
    shape = asked.shape()
    read = sum(entry is not None for entry in entries)
    if read > len(shape):
        raise UnstatedError
    tie = moved(asked, Way(0, _links(shape, [*entries, *[_EVERY] * (len(shape) - read)])))
    arrays = [e.node for e in entries if isinstance(e, _Picks) and e.node is not None]
    more = dict.fromkeys(asked.number(node) for node in arrays)
    return replace(tie, inputs=tuple(dict.fromkeys((*tie.inputs, *more))))


def _links(shape: Shape, entries: Sequence[_Entry]) -> Links:
    front, wide = _block_place(entries)
    found: list[Link] = []
    arrays: dict[int, _Picks] = {}
    source = target = block = 0
    for place, entry in enumerate(entries):
        if place == front:
            block, target = target, target + wide
        if isinstance(entry, slice):
            found += _range(source, target, entry, shape[source])
        elif isinstance(entry, int):
            found += _one(source, entry, shape[source])
        elif entry is not None:
            arrays[source] = entry
        source += entry is not None
        target += entry is None or isinstance(entry, slice)
    return (*found, *_block(shape, arrays, tuple(range(block, block + wide))))


def _block_place(entries: Sequence[_Entry]) -> tuple[int | None, int]:
    """Before which entry the axes of index arrays lie in the result, and how many there are."""
    places = [k for k, entry in enumerate(entries) if isinstance(entry, _Picks)]
    if not places:
        return None, 0
    plain = all(isinstance(entry, slice | _Picks) for entry in entries)
    if len(places) > 1 and not plain:
        raise UnstatedError  # what lies between two arrays decides where their axes go
    wide = max(entry.rank for entry in entries if isinstance(entry, _Picks))
    return places[0] if places[-1] - places[0] == len(places) - 1 else 0, wide


def _range(source: int, target: int, cut: slice, size: Dim) -> Links:
    if _is_whole(cut, size):
        return (Link((source,), (target,)),)
    parts = (cut.start, cut.stop, cut.step)
    if not isinstance(size, int) or any(isinstance(part, fx.Node) for part in parts):
        return ()
    index = np.arange(size)[cut]
    return (Link((source,), (target,), index),) if index.size else ()


def _is_whole(cut: slice, size: Dim) -> bool:
    end = size if isinstance(size, int) else _END
    begins = cut.start is None or cut.start == 0
    every = cut.step is None or cut.step == 1
    return (
        begins and every and (cut.stop is None or (isinstance(cut.stop, int) and cut.stop >= end))
    )


def _one(source: int, place: int, size: Dim) -> Links:
    if place < 0 and not isinstance(size, int):
        return ()
    place = place + size if place < 0 and isinstance(size, int) else place
    return (Link((source,), (), np.array([place])),)


def _block(shape: Shape, arrays: Mapping[int, _Picks], target: tuple[int, ...]) -> Links:
    """Where the entries that index arrays take together go."""
    known = [_counted(picks.index, shape[axis]) for axis, picks in arrays.items()]
    indices = [index for index in known if index is not None]
    if not indices or len(indices) < len(known):
        return ()
    if len(indices) == 1:
        return (Link(tuple(arrays), target, indices[0].ravel()),)
    sizes = tuple(size for size in (shape[axis] for axis in arrays) if isinstance(size, int))
    if len(sizes) < len(arrays):
        return ()
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*indices)), sizes)
    return (Link(tuple(arrays), target, flat.ravel()),)


def _counted(index: NDArray[np.int64] | None, size: Dim) -> NDArray[np.int64] | None:
    """Numbers of entries counted from the front."""
    if index is None or not index.size or (isinstance(size, int) and index.max() >= size):
        return None
    if isinstance(size, int):
        return np.where(index < 0, index + size, index)
    return index if index.min() >= 0 else None


# ---- what asks for it ----


def _at(asked: Asked, *entries: _Entry) -> Operator:
    """``entries`` on the axis ``dim``."""
    axis = axis_of(whole(asked, "dim", 0), len(asked.shape()))
    return _indexed(asked, [*[_EVERY] * axis, *entries])


def _select(asked: Asked) -> Operator:
    place = asked.call["index"]
    return _at(asked, place if isinstance(place, int) else _Picks(None, 0))


def _slice(asked: Asked) -> Operator:
    return _at(asked, slice(asked.call["start"], asked.call["end"], asked.call["step"]))


def _narrow(asked: Asked) -> Operator:
    start, length = asked.call["start"], asked.call["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        return _at(asked, slice(start, length))  # with a node in it nobody reads it
    end = start + length
    return _at(asked, slice(start, end if start >= 0 or end < 0 else None))


def _index_select(asked: Asked) -> Operator:
    picks = _array(asked, asked.call["index"])
    flat = None if picks.index is None else picks.index.reshape(-1)
    return _at(asked, replace(picks, index=flat, rank=1))


def _index(asked: Asked) -> Operator:
    indices = asked.call["indices"]
    if not isinstance(indices, list | tuple):
        raise UnstatedError
    return _indexed(asked, [_EVERY if i is None else _array(asked, i) for i in indices])


def _array(asked: Asked, value: Any) -> _Picks:
    """An index array, whose rank has to be known."""
    constants = asked.facts.constants
    if isinstance(value, list) and value and all(type(entry) is int for entry in value):
        return _Picks(np.array(value, np.int64), 1)
    if not isinstance(value, fx.Node | torch.Tensor):
        raise UnstatedError
    if isinstance(value, torch.Tensor) or constants.is_constant(value):
        index = constants.tensor(value)
        if type_name(index.dtype) not in _INDEX_TYPES:
            raise UnstatedError  # a mask picks as many entries as it likes
        return _Picks(index.cpu().numpy().astype(np.int64), index.dim())
    shape = asked.facts.shape(value)
    if shape is None or asked.facts.dtype(value) not in _INDEX_TYPES:
        raise UnstatedError
    return _Picks(None, len(shape), value)


def _getitem(asked: Asked) -> Operator:
    index, rank = asked.call["index"], len(asked.shape())
    given = list(index) if isinstance(index, tuple) else [index]
    dots = [k for k, entry in enumerate(given) if entry is Ellipsis]
    rest = rank - sum(entry is not None and entry is not Ellipsis for entry in given)
    if len(dots) > 1 or rest < 0:
        raise UnstatedError
    for k in dots:
        given[k : k + 1] = [_EVERY] * rest
    return _indexed(asked, [_entry(asked, entry) for entry in given])


def _entry(asked: Asked, entry: Any) -> _Entry:
    if entry is None or isinstance(entry, slice):
        return entry
    return entry if type(entry) is int else _array(asked, entry)


# ---- windows ----


def _unfold(asked: Asked) -> Operator:
    return _windows(asked) if "dimension" in asked.call.arguments else _patches(asked)


def _windows(asked: Asked) -> Operator:
    """Windows along an axis, whose entries are a new last axis."""
    shape = asked.shape()
    rank = len(shape)
    axis = axis_of(whole(asked, "dimension"), rank)
    wide, step, size = whole(asked, "size"), whole(asked, "step"), shape[axis]
    links = same_axes(rank, (axis,))
    if isinstance(size, int) and 0 < wide <= size and step > 0:
        starts = np.arange(0, size - wide + 1, step)
        index = (starts[:, None] + np.arange(wide)).ravel()
        links = (*links, Link((axis,), (axis, rank), index))
    return moved(asked, Way(0, links))


def _patches(asked: Asked) -> Operator:
    """Patches of images, whose entries are channels: those of one channel are neighbours."""
    shape = asked.shape()
    sizes, padding = asked.integers("kernel_size"), asked.integers("padding")
    if len(shape) not in (3, 4) or sizes is None or padding is None:
        raise UnstatedError
    axis, area = len(shape) - 3, prod(sizes) if len(sizes) == 2 else sizes[0] ** 2
    links, count = same_axes(axis), shape[axis]
    if isinstance(count, int):
        links = (*links, Link((axis,), (axis,), np.repeat(np.arange(count), area)))
    shift = ShiftRule.ZERO if any(padding) else ShiftRule.EQUAL
    return asked.tie(Sign.ANY, shift, Way(0, links))


SLICES: Mapping[str, Rule] = {
    "select": _select, "select_copy": _select, "slice": _slice, "slice_copy": _slice,
    "narrow": _narrow, "narrow_copy": _narrow, "index_select": _index_select,
    "index": _index, "getitem": _getitem, "unfold": _unfold, "unfold_copy": _unfold,
    "im2col": _unfold,
}  # fmt: skip
