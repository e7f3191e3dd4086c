"""Operations whose units go where the elements go, and whose elements keep their order.

view reshape flatten squeeze unsqueeze permute    the same elements, other axes
pixel_shuffle channel_shuffle                     channels and space change places
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from bnfold.channel_graph import Dim, Link, Operator, ShiftRule, Sign, Tie
from bnfold.index_maps import permuted, reduced, reshaped, same_axes
from bnfold.torch_facts import Shape, fake
from bnfold.torch_rules import Asked, Links, Rule, UnstatedError, Way, axis_of


def moved(asked: Asked, *ways: Way) -> Tie:
    """Every element is what it was, elsewhere."""
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, *ways)


def shaped(asked: Asked, links: Links) -> Tie:
    """The first operand moved; of the others only the shape is read."""
    tie = moved(asked, Way(0, links))
    return replace(tie, inputs=tie.inputs[:1])


def listed(asked: Asked, *names: str) -> list[Any] | None:
    """The entries of the list that one of ``names`` is, nodes among them.

    None where the number of entries is not known: a single node may stand for a whole shape.
    """
    value = next((v for v in (asked.call[name] for name in names) if v is not None), None)
    if isinstance(value, int):
        return [value]
    if not isinstance(value, list | tuple):
        return None
    alone = len(value) == 1 and isinstance(value[0], fx.Node) and "val" not in value[0].meta
    return None if alone else list(value)


# ---- other axes, row-major ----


def _reshape(asked: Asked) -> Operator:
    sizes = listed(asked, "size", "shape")
    if "dtype" in asked.call.arguments:
        raise UnstatedError
    stated = None
    if sizes is not None:
        stated = tuple(size if isinstance(size, int) and size >= 0 else None for size in sizes)
    return moved(asked, Way(0, reshaped(asked.shape(), _both(stated, asked.made()))))


def _reshape_as(asked: Asked) -> Operator:
    return shaped(asked, reshaped(asked.shape(), _both(asked.made(), asked.shape(1))))


def _both(one: Shape | None, other: Shape | None) -> Shape:
    """What two descriptions of one shape say together."""
    if one is None or other is None:
        found = other if one is None else one
        if found is None:
            raise UnstatedError
        return found
    if len(one) != len(other):
        raise UnstatedError
    pairs = zip(one, other, strict=True)
    return tuple(a if isinstance(a, int) or b is None else b for a, b in pairs)


def _flatten(asked: Asked) -> Operator:
    rank = len(asked.shape())
    first = axis_of(whole(asked, "start_dim", 0), rank)
    last = axis_of(whole(asked, "end_dim", -1), rank)
    if rank == 0 or first > last:
        raise UnstatedError
    group = Link(tuple(range(first, last + 1)), (first,))
    after = (Link((k,), (k - last + first,)) for k in range(last + 1, rank))
    return moved(asked, Way(0, (*same_axes(first), group, *after)))


def whole(asked: Asked, name: str, default: int | None = None) -> int:
    """A whole number that has to be known."""
    value = asked.argument(name, default)
    if not isinstance(value, int):
        raise UnstatedError
    return value


def _unflatten(asked: Asked) -> Operator:
    rank, sizes = len(asked.shape()), listed(asked, "sizes")
    if not sizes:
        raise UnstatedError
    axis, more = axis_of(whole(asked, "dim"), rank), len(sizes) - 1
    group = Link((axis,), tuple(range(axis, axis + more + 1)))
    after = (Link((k,), (k + more,)) for k in range(axis + 1, rank))
    return moved(asked, Way(0, (*same_axes(axis), group, *after)))


def _squeeze(asked: Asked) -> Operator:
    shape = asked.shape()
    named = asked.axes() if "dim" in asked.call.arguments else tuple(range(len(shape)))
    if named is None:
        raise UnstatedError
    ones = tuple(axis for axis in named if shape[axis] == 1)
    if any(not isinstance(shape[axis], int) for axis in named):
        made = asked.made()  # an unknown size may be 1
        if made is None or len(made) != len(shape) - len(ones):
            raise UnstatedError
    return moved(asked, Way(0, reduced(len(shape), ones, keep=False)))


def _unsqueeze(asked: Asked) -> Operator:
    rank = len(asked.shape())
    new = axis_of(whole(asked, "dim"), rank + 1)
    return moved(asked, Way(0, tuple(Link((k,), (k + (k >= new),)) for k in range(rank))))


# ---- other axes, in another order ----


def _permute(asked: Asked) -> Operator:
    order = asked.integers("dims")
    if order is None:
        raise UnstatedError
    return _ordered(asked, [axis_of(axis, len(order)) for axis in order])


def _ordered(asked: Asked, order: Sequence[int]) -> Operator:
    return moved(asked, Way(0, permuted(order)))


def _swap(first: str, second: str) -> Rule:
    return lambda asked: _swapped(asked, whole(asked, first), whole(asked, second))


def _swapped(asked: Asked, first: int, second: int) -> Operator:
    rank = len(asked.shape())
    order = list(range(rank))
    one, other = axis_of(first, rank), axis_of(second, rank)
    if order:
        order[one], order[other] = other, one
    return _ordered(asked, order)


def _reversed(asked: Asked) -> Operator:
    return _ordered(asked, range(len(asked.shape()))[::-1])


def _transposed(asked: Asked) -> Operator:
    if len(asked.shape()) < 2:
        raise UnstatedError
    return _swapped(asked, -2, -1)


def _move_axes(asked: Asked) -> Operator:
    rank = len(asked.shape())
    given = asked.integers("source"), asked.integers("destination")
    if given[0] is None or given[1] is None or len(given[0]) != len(given[1]):
        raise UnstatedError
    source, target = ([axis_of(axis, rank) for axis in axes] for axes in given if axes is not None)
    order = [axis for axis in range(rank) if axis not in source]
    for place, axis in sorted(zip(target, source, strict=True)):
        order.insert(place, axis)
    return _ordered(asked, order)


# ---- channels and space ----


def _blocks(name: str, *, deep_source: bool) -> Rule:
    """Blocks of space are neighbouring channels."""

    def rule(asked: Asked) -> Operator:
        size = whole(asked, name)
        shape, made = asked.shape(), asked.made()
        rank = len(shape)
        if rank < 3 or size < 1:
            raise UnstatedError
        shallow = made if deep_source else shape
        deep = _times(None if shallow is None else shallow[-3], size * size)
        deep = _sure(shape[-3] if deep_source else None, deep)
        links = same_axes(rank, (rank - 3, rank - 2, rank - 1))
        if deep is not None:
            every = np.arange(deep)
            flat = every // (size * size)
            pair = (every, flat) if deep_source else (flat, every)
            links = (*links, Link((rank - 3,), (rank - 3,), *pair))
        return moved(asked, Way(0, links))

    return rule


def _times(size: Dim, factor: int) -> Dim:
    return size * factor if isinstance(size, int) else None


def _sure(one: Dim, other: Dim) -> int | None:
    return next((size for size in (one, other) if isinstance(size, int) and size > 0), None)


def _channel_shuffle(asked: Asked) -> Operator:
    shape = asked.shape()
    groups = whole(asked, "groups")
    if len(shape) < 3 or groups < 1:
        raise UnstatedError
    count = shape[1]
    links = same_axes(len(shape), (1,))
    if isinstance(count, int) and count > 0 and count % groups == 0:
        links = (*links, Link((1,), (1,), _dealt(count, groups)))
    return moved(asked, Way(0, links))


def _dealt(count: int, groups: int) -> NDArray[np.int64]:
    """From each group its first, then from each its second, and so on."""
    return np.arange(count).reshape(groups, -1).T.ravel()


# ---- by strides ----


def _as_strided(asked: Asked) -> Operator:
    """A view by strides that shows each element where it is anyway."""
    source, sizes = fake(asked.value()), asked.integers("size")
    strides, offset = asked.integers("stride"), asked.argument("storage_offset")
    if source is None or not all(isinstance(size, int) for size in source.shape):
        raise UnstatedError
    plain = source.is_contiguous() and source.storage_offset() == 0 and offset in (None, 0)
    if not plain or (sizes, strides) != (tuple(source.shape), tuple(source.stride())):
        raise UnstatedError
    return moved(asked, Way())


MOVES: Mapping[str, Rule] = {
    "view": _reshape, "reshape": _reshape, "_unsafe_view": _reshape, "view_copy": _reshape,
    "_reshape_alias": _reshape, "_reshape_copy": _reshape,
    "view_as": _reshape_as, "reshape_as": _reshape_as,
    "flatten": _flatten, "ravel": _flatten, "unflatten": _unflatten,
    "squeeze": _squeeze, "squeeze_copy": _squeeze,
    "unsqueeze": _unsqueeze, "unsqueeze_copy": _unsqueeze,
    "permute": _permute, "permute_copy": _permute,
    "transpose": _swap("dim0", "dim1"), "transpose_copy": _swap("dim0", "dim1"),
    "swapdims": _swap("dim0", "dim1"), "swapaxes": _swap("axis0", "axis1"),
    "t": _reversed, "t_copy": _reversed, "numpy_T": _reversed,
    "mT": _transposed, "adjoint": _transposed,
    "movedim": _move_axes, "moveaxis": _move_axes,
    "pixel_shuffle": _blocks("upscale_factor", deep_source=True),
    "pixel_unshuffle": _blocks("downscale_factor", deep_source=False),
    "channel_shuffle": _channel_shuffle, "native_channel_shuffle": _channel_shuffle,
    "as_strided": _as_strided,
}  # fmt: skip
