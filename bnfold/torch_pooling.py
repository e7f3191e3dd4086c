"""Operations that pool, reduce or resample: units pass per channel, and not along what is pooled.

max_pool amax max sort topk       order is kept: positive scale, equal shift
avg_pool mean upsample            weights that sum to one: any scale, equal shift
lp_pool norm                      a norm: positive scale, no shift
sum                               n positions are added up: n times the shift
what counts zeros in              no shift

What is pooled are the last axes: without a batch channels come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, prod

import torch

from bnfold.channel_graph import Operator, ShiftRule, Sign
from bnfold.index_maps import reduced, same_axes
from bnfold.torch_rules import Asked, Links, Rule, UnstatedError, Way, axis_of
from bnfold.torch_taps import averaged_taps

_HIGHEST = (Sign.POSITIVE, ShiftRule.EQUAL)
_MEAN = (Sign.ANY, ShiftRule.EQUAL)
_NORM = (Sign.POSITIVE, ShiftRule.ZERO)
_LINEAR = (Sign.ANY, ShiftRule.ZERO)

_Kind = tuple[Sign, ShiftRule]
_RANKS = (1, 2, 3)


def _one_of_several(asked: Asked) -> None:
    """Refuse an operation of several outputs that somebody takes all at once."""
    if asked.results.get(0) is asked.call.node:
        raise UnstatedError


# ---- pooling ----


def _pool(kind: _Kind, spatial: int) -> Rule:
    return lambda asked: asked.tie(*kind, Way(0, _images(asked, spatial)))


def _images(asked: Asked, spatial: int) -> Links:
    rank = asked.rank()
    if rank < spatial:
        raise UnstatedError
    return same_axes(rank, range(rank - spatial, rank))


def _max_pool(spatial: int, *, several: bool = False) -> Rule:
    def rule(asked: Asked) -> Operator:
        if asked.argument("return_indices", several):
            _one_of_several(asked)
        return asked.tie(*_HIGHEST, Way(0, _images(asked, spatial)))

    return rule


def _average_pool(spatial: int) -> Rule:
    def rule(asked: Asked) -> Operator:
        counted = asked.argument("count_include_pad", True) and any(asked.integers("padding") or ())
        other = asked.argument("divisor_override") is not None
        kind = _LINEAR if counted or other else _MEAN
        tie = asked.tie(*kind, Way(0, _images(asked, spatial)))
        # Without a batch, or where that is not known, channels may stand elsewhere.
        batched = asked.rank() == spatial + 2
        return replace(tie, taps=averaged_taps(asked.call, spatial) if batched else None)

    return rule


def _norm_pool(spatial: int) -> Rule:
    def rule(asked: Asked) -> Operator:
        _order(asked, "norm_type")
        return asked.tie(*_NORM, Way(0, _images(asked, spatial)))

    return rule


def _order(asked: Asked, name: str) -> float:
    """The order of a norm: of order 0 it is a count."""
    order = asked.argument(name)
    if order is None:
        order = 2
    if not isinstance(order, int | float) or order == 0 or order != order:
        raise UnstatedError
    if name == "norm_type" and not (isfinite(order) and order > 0):
        raise UnstatedError
    return float(order)


# ---- reductions ----


def _reduction(kind: _Kind) -> Rule:
    return lambda asked: asked.tie(*kind, Way(0, _without(asked)))


def _without(asked: Asked) -> Links:
    """What is left of the axes; without a list of axes all are reduced."""
    _check_type(asked)
    axes = asked.axes() if asked.integers("dim") else None
    if axes is None:
        return ()
    return reduced(len(asked.shape()), axes, keep=bool(asked.argument("keepdim", False)))


def _check_type(asked: Asked) -> None:
    """The result has to be of a float type."""
    dtype = asked.argument("dtype")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UnstatedError


def _sum(asked: Asked) -> Operator:
    way = Way(0, _without(asked))
    shape = asked.shape()
    axes = asked.axes() if asked.integers("dim") else range(len(shape))
    sizes = [shape[axis] for axis in axes or ()]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return asked.sum((prod(known),), way) if known == sizes else asked.tie(*_LINEAR, way)


def _norm(name: str) -> Rule:
    def rule(asked: Asked) -> Operator:
        _order(asked, name)
        return asked.tie(*_NORM, Way(0, _without(asked)))

    return rule


def _extreme(asked: Asked) -> Operator:
    """The largest of all, or along an axis, with where it is."""
    if "other" in asked.call.arguments:
        raise UnstatedError
    if "dim" in asked.call.arguments:
        _one_of_several(asked)
    return asked.tie(*_HIGHEST, Way(0, _without(asked)))


def _ordered(*, keeps_axis: bool, default: int | None = -1) -> Rule:
    """Values in order, with where they were."""

    def rule(asked: Asked) -> Operator:
        _one_of_several(asked)
        rank = len(asked.shape())
        axis = asked.argument("dim", default)
        if not isinstance(axis, int):
            raise UnstatedError
        kept = keeps_axis or bool(asked.argument("keepdim", False))
        return asked.tie(*_HIGHEST, Way(0, reduced(rank, (axis_of(axis, rank),), keep=kept)))

    return rule


def _median(asked: Asked) -> Operator:
    if "dim" in asked.call.arguments:
        return _ordered(keeps_axis=False)(asked)
    return asked.tie(*_HIGHEST, Way(0, ()))


def _both_extremes(asked: Asked) -> Operator:
    _one_of_several(asked)
    ways = (Way(0, _without(asked), position) for position in asked.results)
    return asked.tie(*_HIGHEST, *ways)


def _cumulated(asked: Asked) -> Operator:
    _check_type(asked)
    axes = asked.axes()
    if not axes:
        raise UnstatedError
    return asked.tie(*_LINEAR, Way(0, same_axes(asked.rank(), axes)))


# ---- resampling ----

_WEIGHTED = frozenset({
    "nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area",
})  # fmt: skip


def _interpolate(asked: Asked) -> Operator:
    if asked.argument("mode", "nearest") not in _WEIGHTED:
        raise UnstatedError
    return _pool(_MEAN, asked.rank() - 2)(asked)


def _grid_sample(asked: Asked) -> Operator:
    default = 0 if asked.op.startswith("grid_sampler") else "zeros"
    zeros = asked.argument("padding_mode", default) in (0, "zeros")
    return asked.tie(*(_LINEAR if zeros else _MEAN), Way(0, _images(asked, asked.rank() - 2)))


POOLING: Mapping[str, Rule] = {
    **{f"max_pool{n}d": _max_pool(n) for n in _RANKS},
    **{f"max_pool{n}d_with_indices": _max_pool(n, several=True) for n in _RANKS},
    **{f"adaptive_max_pool{n}d": _max_pool(n, several=True) for n in _RANKS},
    **{f"adaptive_max_pool{n}d_with_indices": _max_pool(n, several=True) for n in _RANKS},
    **{f"avg_pool{n}d": _average_pool(n) for n in _RANKS},
    **{f"adaptive_avg_pool{n}d": _pool(_MEAN, n) for n in _RANKS},
    **{f"_adaptive_avg_pool{n}d": _pool(_MEAN, n) for n in _RANKS},
    **{f"lp_pool{n}d": _norm_pool(n) for n in _RANKS},
    **{f"upsample_nearest{n}d": _pool(_MEAN, n) for n in _RANKS},
    **{f"_upsample_nearest_exact{n}d": _pool(_MEAN, n) for n in _RANKS},
    "upsample_linear1d": _pool(_MEAN, 1), "upsample_trilinear3d": _pool(_MEAN, 3),
    "upsample_bilinear2d": _pool(_MEAN, 2), "_upsample_bilinear2d_aa": _pool(_MEAN, 2),
    "upsample_bicubic2d": _pool(_MEAN, 2), "_upsample_bicubic2d_aa": _pool(_MEAN, 2),
    "interpolate": _interpolate, "upsample": _interpolate,
    "grid_sample": _grid_sample, "grid_sampler": _grid_sample,
    "grid_sampler_2d": _grid_sample, "grid_sampler_3d": _grid_sample,
    "mean": _reduction(_MEAN), "nanmean": _reduction(_MEAN), "sum": _sum,
    "amax": _reduction(_HIGHEST), "amin": _reduction(_HIGHEST),
    "norm": _norm("p"), "linalg_vector_norm": _norm("ord"),
    "max": _extreme, "min": _extreme, "aminmax": _both_extremes, "median": _median,
    "sort": _ordered(keeps_axis=True), "topk": _ordered(keeps_axis=True),
    "cummax": _ordered(keeps_axis=True), "cummin": _ordered(keeps_axis=True),
    "kthvalue": _ordered(keeps_axis=False), "cumsum": _cumulated,
}  # fmt: skip
