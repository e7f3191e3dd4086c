"""Operators that take some elements, or some repeatedly, or put others beside them.

    Expand Tile Gather Slice Split    output entry i is input entry index[i]
    Concat Pad                        input entry i is output entry offset + i

Along an axis on which it is not known what goes where, units have to be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bnfold.channel_graph import Dim, Link, Operator, ShiftRule, Sign, Taps
from bnfold.index_maps import along, bordered, broadcast, picked, repeated, same_axes
from bnfold.onnx_facts import float_attribute
from bnfold.onnx_rules import Asked, Rule, UnstatedError, Way, axis_of
from bnfold.onnx_sizes import DimOf, Size, Sizes, dimension, named, traced_sizes

_END = 2**31 - 1  # as the end of a slice, this and everything above is the end of the axis


def _moved(asked: Asked, *ways: Way) -> Operator:
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, *ways)


def _expand(asked: Asked) -> Operator:
    source, made = named(asked.shape()), asked.made()
    sizes = traced_sizes(asked.facts, asked.value(1))
    if sizes is None and made is None:
        raise UnstatedError
    if sizes is None:
        return _moved(asked, Way(0, broadcast(source, made or ())))
    ones: Sizes = [1] * (len(source) - len(sizes))
    wanted = ones + sizes
    known = made if made is not None and len(made) == len(wanted) else (None,) * len(wanted)
    before = (None,) * (len(wanted) - len(source)) + source
    target = [_expanded(asked, *dims) for dims in zip(before, wanted, known, strict=True)]
    return _moved(asked, Way(0, broadcast(source, target)))


def _expanded(asked: Asked, own: Dim, wanted: Size, known: Dim) -> Dim:
    """The size that an axis of size ``own`` gets."""
    if wanted == 1 and own is not None:
        return own
    if isinstance(wanted, DimOf):
        found = dimension(asked.facts, wanted, asked.value())
        return known if found is None else found
    return wanted if isinstance(wanted, int) and wanted > 1 else known


def _tile(asked: Asked) -> Operator:
    if asked.opset < 6:
        raise UnstatedError
    shape = asked.shape()
    repeats = asked.integers("repeats", 1) if asked.is_constant(1) else None
    if repeats is None or len(repeats) != len(shape) or min(repeats, default=0) < 0:
        raise UnstatedError
    pairs = zip(shape, repeats, strict=True)
    indices = {
        axis: repeated(size, times) for axis, (size, times) in enumerate(pairs) if times != 1
    }
    return _moved(asked, Way(0, picked(len(shape), indices)))


def _slice(asked: Asked) -> Operator:
    shape = asked.shape()
    starts, ends = _when_known(asked, "starts", 1), _when_known(asked, "ends", 2)
    listed = asked.integers("axes", 3)
    if listed is None and starts is None:
        raise UnstatedError
    axes = range(len(starts or ())) if listed is None else [axis_of(a, len(shape)) for a in listed]
    steps = _when_known(asked, "steps", 4) if asked.given(4) else (1,) * len(axes)
    if starts is None or ends is None or steps is None:
        return _moved(asked, Way(0, same_axes(len(shape), tuple(axes))))
    if not len(starts) == len(ends) == len(steps) == len(axes) <= len(shape) or 0 in steps:
        raise UnstatedError
    cuts = {a: slice(starts[k], ends[k], steps[k]) for k, a in enumerate(axes)}
    indices = {a: _cut(shape[a], c) for a, c in cuts.items() if not _is_whole(c, shape[a])}
    return _moved(asked, Way(0, picked(len(shape), indices)))


def _cut(size: Dim, cut: slice) -> NDArray[np.int64] | None:
    return np.arange(size)[cut] if isinstance(size, int) else None


def _when_known(asked: Asked, name: str, position: int) -> tuple[int, ...] | None:
    if name in asked.node.attributes or asked.is_constant(position):
        return asked.integers(name, position)
    return None


def _is_whole(cut: slice, size: Dim) -> bool:
    end = size if isinstance(size, int) else _END
    return (cut.start, cut.step) == (0, 1) and bool(cut.stop >= end)


def _split(asked: Asked) -> Operator:
    rank = len(asked.shape())
    axis = axis_of(asked.integer("axis", 0), rank)
    sizes = _part_sizes(asked, axis)
    ways: list[Way] = []
    start = 0
    for position, output in enumerate(asked.node.outputs):
        links = same_axes(rank, (axis,))
        if sizes is not None:
            links = along(rank, axis, np.arange(start, start + sizes[position]))
            start += sizes[position]
        if output.name:
            ways.append(Way(0, links, position))
    return _moved(asked, *ways)


def _part_sizes(asked: Asked, axis: int) -> list[int] | None:
    count, whole = len(asked.node.outputs), asked.shape()[axis]
    stated = _when_known(asked, "split", 1)
    if stated is not None:
        return list(stated) if len(stated) == count else None
    if not asked.given(1) and isinstance(whole, int):
        part = -(-whole // count)
        return [max(0, min(part, whole - k * part)) for k in range(count)]
    shapes = [asked.made(k) for k in range(count)]
    sizes = [None if s is None or len(s) <= axis else s[axis] for s in shapes]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == count else None


def _gather(asked: Asked) -> Operator:
    shape = asked.shape()
    rank, axis = len(shape), axis_of(asked.integer("axis", 0), len(shape))
    picked = _picks(asked, shape[axis])
    wide = picked.ndim if picked is not None else len(asked.shape(1))
    after = (Link((k,), (k - 1 + wide,)) for k in range(axis + 1, rank))
    links = (*same_axes(axis), *after)
    if picked is not None:
        links += (Link((axis,), tuple(range(axis, axis + wide)), picked.ravel()),)
    return _moved(asked, Way(0, links))


def _picks(asked: Asked, size: Dim) -> NDArray[np.int64] | None:
    if not asked.is_constant(1):
        return None
    index = np.asarray(asked.facts.constants.array(asked.value(1)))
    if index.dtype.kind not in "iu":
        raise UnstatedError
    if not index.size or (index.min() < 0 and not isinstance(size, int)):
        return None
    index = index.astype(np.int64)
    return index % size if isinstance(size, int) and size else index


# ---- and others beside them ----


def _concat(asked: Asked) -> Operator:
    every = range(len(asked.node.inputs))
    live = [k for k in every if not asked.is_constant(k)]
    rank = max((len(asked.shape(k)) for k in live), default=0)
    axis = axis_of(asked.integer("axis", 1), rank)
    sizes = [_size_along(asked, k, axis) for k in every]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        if len(live) < len(sizes):
            raise UnstatedError  # constants lie somewhere on an axis of unknown size
        return _moved(asked, *(Way(k, same_axes(rank, (axis,))) for k in live))
    starts = np.cumsum([0, *known])
    ranges = [np.arange(starts[k], starts[k + 1]) for k in every]
    tie = asked.tie(
        Sign.ANY, ShiftRule.EQUAL, *(Way(k, along(rank, axis, None, ranges[k])) for k in live)
    )
    return replace(tie, joins=axis if len(live) == len(sizes) else None)


def _size_along(asked: Asked, position: int, axis: int) -> int | None:
    constants, value = asked.facts.constants, asked.value(position)
    shape = constants.shape(value) if asked.is_constant(position) else asked.shape(position)
    size = shape[axis] if axis < len(shape) else None
    return size if isinstance(size, int) else None


def _pad(asked: Asked) -> Operator:
    mode = asked.text("mode", "constant")
    rank = asked.rank()
    name = "paddings" if asked.opset < 2 else "pads"
    pads = asked.integers(name, 1)
    listed = asked.integers("axes", 3)
    axes = list(range(rank)) if listed is None else [axis_of(a, rank) for a in listed]
    if pads is None or len(pads) != 2 * len(axes):
        raise UnstatedError
    around = {a: (pads[k], pads[k + len(axes)]) for k, a in enumerate(axes)}
    changed = [axis for axis, ends in around.items() if ends != (0, 0)]
    if mode != "constant":
        return _moved(asked, Way(0, same_axes(rank, changed)))
    fill = _filling(asked)
    if not np.isfinite(fill):  # an infinity is the same in any units of a positive scale
        if np.isnan(fill):
            raise UnstatedError
        return asked.tie(Sign.POSITIVE, ShiftRule.EQUAL, Way(0, same_axes(rank, changed)))
    shape = asked.facts.shape(asked.value()) or (None,) * rank
    indices = {axis: bordered(shape[axis], *around[axis]) for axis in changed}
    tie = asked.tie(Sign.ANY, ShiftRule.ZERO, Way(0, picked(rank, indices)))
    return replace(tie, fill=fill, taps=None if fill else _bordering(rank, around))


def _bordering(rank: int, around: Mapping[int, tuple[int, int]]) -> tuple[Taps, ...] | None:
    """What a Pad by zeros reads, if it pads the axes of positions only."""
    if rank < 3 or any(around.get(axis, (0, 0)) != (0, 0) for axis in (0, 1)):
        return None
    ends = (around.get(axis, (0, 0)) for axis in range(2, rank))
    return tuple(Taps.of(1, begin=before, end=after) for before, after in ends)


def _filling(asked: Asked) -> float:
    if asked.opset < 11:
        return float_attribute(asked.node, "value", 0.0)
    return float(asked.array(2).ravel()[0]) if asked.given(2) else 0.0


PARTS: Mapping[str, Rule] = {
    "Expand": _expand, "Tile": _tile, "Slice": _slice, "Split": _split, "Gather": _gather,
    "Concat": _concat, "Pad": _pad,
}  # fmt: skip
