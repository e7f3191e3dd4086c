"""Operations that put tensors together, take them apart or repeat them.

cat stack chunk split unbind      part by part
expand repeat roll flip           entries of the source, several times or elsewhere
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bnfold.channel_graph import Dim, Link, Operator
from bnfold.index_maps import along, broadcast, picked, repeated, same_axes
from bnfold.torch_facts import Shape
from bnfold.torch_moves import listed, moved, shaped, whole
from bnfold.torch_pads import PADS
from bnfold.torch_rules import Asked, Rule, UnstatedError, Way, axis_of
from bnfold.torch_slices import SLICES

# ---- together ----


def _tensors(asked: Asked) -> tuple[int, list[int]]:
    """The rank of all operands, and the positions of those that are activations."""
    if not isinstance(asked.call["tensors"], list | tuple):
        raise UnstatedError
    every = range(len(asked.sources))
    ranks = {len(asked.shape(k)) for k in every}
    live = [k for k in every if not asked.is_constant(k)]
    if len(ranks) != 1 or not live:
        raise UnstatedError  # an empty tensor may have another rank
    return ranks.pop(), live


def _cat(asked: Asked) -> Operator:
    rank, live = _tensors(asked)
    axis = axis_of(whole(asked, "dim", 0), rank)
    sizes = [asked.shape(k)[axis] for k in range(len(asked.sources))]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        if len(live) < len(sizes):
            raise UnstatedError  # constants lie somewhere on an axis of unknown size
        return moved(asked, *(Way(k, same_axes(rank, (axis,))) for k in live))
    starts = np.cumsum([0, *known])
    ranges = [np.arange(*pair) for pair in pairwise(starts)]
    tie = moved(asked, *(Way(k, along(rank, axis, None, ranges[k])) for k in live))
    return replace(tie, joins=axis if len(live) == len(sizes) else None)


def _stack(asked: Asked) -> Operator:
    rank, live = _tensors(asked)
    axis = axis_of(whole(asked, "dim", 0), rank + 1)
    kept = tuple(Link((k,), (k + (k >= axis),)) for k in range(rank))
    place = {k: Link((), (axis,), None, np.array([k])) for k in live}
    return moved(asked, *(Way(k, (*kept, place[k])) for k in live))


# ---- apart ----


def _apart(asked: Asked, axis: int, pieces: list[tuple[int, int]] | None) -> Operator:
    """Each result is a range of one axis; without ``pieces`` it is not known which."""
    rank = len(asked.shape())
    ways: list[Way] = []
    for position, node in asked.results.items():
        if node is asked.call.node:
            raise UnstatedError  # somebody takes all of them at once
        links = same_axes(rank, (axis,))
        if pieces is not None and position < len(pieces):
            links = along(rank, axis, np.arange(*pieces[position]))
        ways.append(Way(0, links, position))
    return moved(asked, *ways)


def _axis(asked: Asked) -> tuple[int, Dim]:
    shape = asked.shape()
    axis = axis_of(whole(asked, "dim", 0), len(shape))
    return axis, shape[axis]


def _split(asked: Asked) -> Operator:
    axis, size = _axis(asked)
    sizes = listed(asked, "split_sizes", "split_size")
    alone = isinstance(asked.call["split_size"], int)
    if sizes is None or not all(isinstance(part, int) for part in sizes):
        return _apart(asked, axis, None)
    if alone:
        return _apart(asked, axis, _steps(size, sizes[0]))
    return _apart(asked, axis, list(pairwise([0, *np.cumsum(sizes).tolist()])))


def _chunk(asked: Asked) -> Operator:
    axis, size = _axis(asked)
    count = whole(asked, "chunks")
    step = -(-size // count) if isinstance(size, int) and count > 0 else 0
    return _apart(asked, axis, _steps(size, step))


def _steps(size: Dim, step: int) -> list[tuple[int, int]] | None:
    """Ranges of one length, but for the last."""
    if not isinstance(size, int) or step < 1:
        return None
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _tensor_split(asked: Asked) -> Operator:
    axis, size = _axis(asked)
    if not isinstance(size, int):
        return _apart(asked, axis, None)
    if "sections" in asked.call.arguments:
        count = whole(asked, "sections")
        if count < 1:
            raise UnstatedError
        ends = [k * (size // count) + min(k, size % count) for k in range(count + 1)]
        return _apart(asked, axis, list(pairwise(ends)))
    places = asked.integers("indices")
    if places is None:
        raise UnstatedError
    ends = [slice(None, place).indices(size)[1] for place in places]
    return _apart(asked, axis, [*pairwise([0, *ends]), (ends[-1] if ends else 0, size)])


def _unbind(asked: Asked) -> Operator:
    axis, _ = _axis(asked)
    rank = len(asked.shape())
    kept = tuple(Link((k,), (k - (k > axis),)) for k in range(rank) if k != axis)
    ways: list[Way] = []
    for position, node in asked.results.items():
        if node is asked.call.node:
            raise UnstatedError
        ways.append(Way(0, (*kept, Link((axis,), (), np.array([position]))), position))
    return moved(asked, *ways)


# ---- several times ----


def _expand(asked: Asked) -> Operator:
    source, made = asked.shape(), asked.made()
    if made is None:
        made = _expanded(source, listed(asked, "size"))
    return moved(asked, Way(0, broadcast(source, made)))


def _expanded(source: Shape, sizes: list[object] | None) -> Shape:
    if sizes is None or len(sizes) < len(source):
        raise UnstatedError
    new = len(sizes) - len(source)
    grown = (_grown(*pair) for pair in zip(source, sizes[new:], strict=True))
    return (*(None,) * new, *grown)


def _grown(own: Dim, wanted: object) -> Dim:
    """The size that an axis gets: only one of size 1 can grow."""
    if wanted == -1 or (isinstance(own, int) and own != 1):
        return own
    return wanted if isinstance(wanted, int) else None


def _expand_as(asked: Asked) -> Operator:
    made = asked.made()
    return shaped(asked, broadcast(asked.shape(), asked.shape(1) if made is None else made))


def _repeat(asked: Asked) -> Operator:
    shape, times = asked.shape(), listed(asked, "repeats", "dims")
    if times is None or (asked.op == "repeat" and len(times) < len(shape)):
        raise UnstatedError
    times = [1] * (len(shape) - len(times)) + times
    new = len(times) - len(shape)
    links = [_again(axis, axis + new, shape[axis], times[axis + new]) for axis in range(len(shape))]
    return moved(asked, Way(0, tuple(link for link in links if link is not None)))


def _again(source: int, target: int, size: Dim, times: object) -> Link | None:
    if times == 1:
        return Link((source,), (target,))
    index = repeated(size, times) if isinstance(times, int) and times > 0 else None
    return None if index is None else Link((source,), (target,), index)


def _repeat_interleave(asked: Asked) -> Operator:
    times = asked.argument("repeats")
    if asked.argument("dim") is None or not isinstance(times, int) or times < 0:
        raise UnstatedError
    axis, size = _axis(asked)
    index = np.repeat(np.arange(size), times) if isinstance(size, int) else None
    return moved(asked, Way(0, picked(len(asked.shape()), {axis: index})))


# ---- elsewhere ----


def _roll(asked: Asked) -> Operator:
    shape, shifts, axes = asked.shape(), listed(asked, "shifts"), asked.integers("dims")
    if not axes:
        return moved(asked, Way(0, ()))
    axes = tuple(axis_of(axis, len(shape)) for axis in axes)
    if shifts is None or len(shifts) != len(axes) or len(set(axes)) != len(axes):
        return moved(asked, Way(0, same_axes(len(shape), axes)))
    pairs = zip(axes, shifts, strict=True)
    return moved(asked, Way(0, picked(len(shape), {a: _rolled(shape[a], s) for a, s in pairs})))


def _rolled(size: Dim, shift: object) -> NDArray[np.int64] | None:
    if not isinstance(size, int) or not isinstance(shift, int):
        return None
    return np.roll(np.arange(size), shift)


def _flip(asked: Asked) -> Operator:
    axes = asked.axes("dims")
    return _flipped(asked, *(axes or ()))


def _flipped(asked: Asked, *axes: int) -> Operator:
    shape = asked.shape()
    sizes = {axis_of(axis, len(shape)): shape[axis] for axis in axes}
    turned = {a: np.arange(n)[::-1] if isinstance(n, int) else None for a, n in sizes.items()}
    return moved(asked, Way(0, picked(len(shape), turned)))


PARTS: Mapping[str, Rule] = {
    "cat": _cat, "concat": _cat, "concatenate": _cat, "stack": _stack,
    "chunk": _chunk, "unsafe_chunk": _chunk, "tensor_split": _tensor_split,
    "split": _split, "split_with_sizes": _split, "split_copy": _split,
    "split_with_sizes_copy": _split, "unsafe_split": _split, "unsafe_split_with_sizes": _split,
    "unbind": _unbind, "unbind_copy": _unbind,
    "expand": _expand, "expand_copy": _expand, "broadcast_to": _expand, "expand_as": _expand_as,
    "repeat": _repeat, "tile": _repeat, "repeat_interleave": _repeat_interleave,
    "roll": _roll, "flip": _flip,
    "fliplr": lambda asked: _flipped(asked, 1), "flipud": lambda asked: _flipped(asked, 0),
    **SLICES, **PADS,
}  # fmt: skip
