"""Operations that surround a tensor with entries of its own, or with a constant.

reflection_pad replication_pad    other entries of the same axis: units are the same along it
constant_pad_nd                   a constant: zeros are the same in any units without a shift
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, isnan

import numpy as np
from numpy.typing import NDArray

from bnfold.channel_graph import Dim, Operator, ShiftRule, Sign
from bnfold.index_maps import bordered, picked, same_axes
from bnfold.torch_moves import listed, moved
from bnfold.torch_rules import Asked, Rule, UnstatedError, Way
from bnfold.torch_taps import bordering_taps

_COPIES = frozenset({"reflect", "replicate", "circular"})


def _pad(asked: Asked) -> Operator:
    mode = asked.argument("mode", "constant")
    if mode in _COPIES:
        return _copied(asked, "pad")
    if mode != "constant":
        raise UnstatedError
    return _constant_pad(asked)


def _around(asked: Asked, name: str) -> tuple[int, dict[int, tuple[int, int]]]:
    """The rank, and what is added before and after each axis: the last axis is listed first."""
    rank, listed_pads = asked.rank(), listed(asked, name)
    if listed_pads is None or len(listed_pads) % 2 or len(listed_pads) > 2 * rank:
        raise UnstatedError
    pairs = zip(listed_pads[::2], listed_pads[1::2], strict=True)
    around = {rank - 1 - k: pair for k, pair in enumerate(pairs)}
    return rank, {axis: pair for axis, pair in around.items() if pair != (0, 0)}


def _copied(asked: Asked, name: str) -> Operator:
    rank, around = _around(asked, name)
    return moved(asked, Way(0, same_axes(rank, tuple(around))))


def _constant_pad(asked: Asked) -> Operator:
    rank, around = _around(asked, "pad")
    value = asked.argument("value")
    fill = 0.0 if value is None else float(value)
    if isnan(fill):
        raise UnstatedError
    if not isfinite(fill):  # an infinity is the same in any units of a positive scale
        way = Way(0, same_axes(rank, tuple(around)))
        return asked.tie(Sign.POSITIVE, ShiftRule.EQUAL, way)
    shape = asked.facts.shape(asked.value()) or (None,) * rank
    indices = {axis: _edges(shape[axis], *pair) for axis, pair in around.items()}
    tie = asked.tie(Sign.ANY, ShiftRule.ZERO, Way(0, picked(rank, indices)))
    return replace(tie, fill=fill, taps=None if fill else bordering_taps(rank, around))


def _edges(size: Dim, before: object, after: object) -> NDArray[np.int64] | None:
    if not isinstance(before, int) or not isinstance(after, int):
        return None
    return bordered(size, before, after)


def _padding(asked: Asked) -> Operator:
    return _copied(asked, "pad" if "pad" in asked.call.arguments else "padding")


PADS: Mapping[str, Rule] = {
    "pad": _pad, "constant_pad_nd": _constant_pad, "_pad_circular": _padding,
    **{f"{kind}_pad{n}d": _padding for kind in ("reflection", "replication") for n in (1, 2, 3)},
}  # fmt: skip
