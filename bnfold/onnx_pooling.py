"""Operators that pool, reduce or resample: units pass per channel, and not along what is pooled.

MaxPool ReduceMax                 the largest stays the largest: positive scale, equal shift
AveragePool ReduceMean Resize     weights that sum to one: any scale, equal shift
LpPool ReduceL2                   a norm: positive scale, no shift
ReduceSum                         n positions are added up: n times the shift
what counts zeros in              no shift
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from bnfold.channel_graph import Link, Operator, ShiftRule, Sign
from bnfold.index_maps import reduced, same_axes
from bnfold.onnx_facts import float_attribute, ints_attribute
from bnfold.onnx_rules import Asked, Links, Rule, UnstatedError, Way, axes_of, axis_of
from bnfold.onnx_taps import averaged_taps

_HIGHEST = (Sign.POSITIVE, ShiftRule.EQUAL)
_MEAN = (Sign.ANY, ShiftRule.EQUAL)
_NORM = (Sign.POSITIVE, ShiftRule.ZERO)
_LINEAR = (Sign.ANY, ShiftRule.ZERO)

_Kind = tuple[Sign, ShiftRule]


# ---- pooling: batch and channels are kept ----


def _pool(kind: _Kind) -> Rule:
    return lambda asked: asked.tie(*kind, Way(0, _images(asked)))


def _images(asked: Asked) -> Links:
    rank = asked.rank()
    return same_axes(rank, range(2, rank))


def _average_pool(asked: Asked) -> Operator:
    shift = ShiftRule.ZERO if _counts_zeros(asked) else ShiftRule.EQUAL
    tie = asked.tie(Sign.ANY, shift, Way(0, _images(asked)))
    return replace(tie, taps=averaged_taps(asked.facts, asked.node))


def _counts_zeros(asked: Asked) -> bool:
    if not asked.integer("count_include_pad", 0):
        return False
    same = asked.text("auto_pad", "NOTSET").startswith("SAME")
    # A last window that sticks out may be divided by its full size.
    sticks_out = asked.integer("ceil_mode", 0) != 0
    return same or sticks_out or any(ints_attribute(asked.node, "pads"))


def _grid_sample(asked: Asked) -> Operator:
    zeros = asked.text("padding_mode", "zeros") == "zeros"
    shift = ShiftRule.ZERO if zeros else ShiftRule.EQUAL
    return asked.tie(Sign.ANY, shift, Way(0, _images(asked)))


def _regions(asked: Asked) -> Operator:
    """Regions of images: any number of them for each image, cut out beyond its border too."""
    largest = asked.text("mode", "avg") == "max"
    kind = _NORM if largest else _LINEAR
    return asked.tie(*kind, Way(0, (Link((1,), (1,)),)))


# ---- reductions ----


def _reduction(kind: _Kind) -> Rule:
    def rule(asked: Asked) -> Operator:
        axes = _reduced_axes(asked)
        return asked.tie(*kind, Way() if axes is None else Way(0, _without(asked, axes)))

    return rule


def _reduce_sum(asked: Asked) -> Operator:
    axes = _reduced_axes(asked)
    if axes is None:
        return asked.tie(*_MEAN, Way())
    sizes = [asked.shape()[axis] for axis in axes]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    way = Way(0, _without(asked, axes))
    return asked.sum((prod(known),), way) if known == sizes else asked.tie(*_LINEAR, way)


def _without(asked: Asked, axes: tuple[int, ...]) -> Links:
    return reduced(len(asked.shape()), axes, keep=asked.integer("keepdims", 1) != 0)


def _reduced_axes(asked: Asked) -> tuple[int, ...] | None:
    """The axes that are reduced; None when nothing is."""
    given = asked.integers("axes", 1)
    if given:
        return axes_of(given, len(asked.shape()))
    if given is not None and "axes" in asked.node.attributes:
        raise UnstatedError  # versions before 18 do not say what an empty list is
    if asked.integer("noop_with_empty_axes", 0):
        return None
    return tuple(range(len(asked.shape())))


def _cumulated(asked: Asked) -> Operator:
    rank = asked.rank()
    axis = axis_of(int(asked.array(1).ravel()[0]), rank)
    return asked.tie(*_LINEAR, Way(0, same_axes(rank, (axis,))))


# ---- Resize and Upsample ----


def _resize(asked: Asked) -> Operator:
    how = asked.text("coordinate_transformation_mode", "half_pixel")
    cropped = how == "tf_crop_and_resize"
    if cropped and float_attribute(asked.node, "extrapolation_value", 0.0) != 0:
        raise UnstatedError
    if how == "tf_half_pixel_for_nn" and not _rounds_down(asked):
        raise UnstatedError  # it would move elements by one even where no size changes
    rank = asked.rank()
    kept = _uncropped(asked, rank) & _kept(asked, rank) if cropped else _kept(asked, rank)
    changed = [axis for axis in range(rank) if axis not in kept]
    return asked.tie(*(_LINEAR if cropped else _MEAN), Way(0, same_axes(rank, changed)))


def _rounds_down(asked: Asked) -> bool:
    nearest = asked.text("mode", "nearest") == "nearest"
    return nearest and asked.text("nearest_mode", "round_prefer_floor").endswith("floor")


def _kept(asked: Asked, rank: int) -> set[int]:
    """The axes along which each element stays what and where it is."""
    listed = ints_attribute(asked.node, "axes")
    axes = [axis_of(axis, rank) for axis in listed] or list(range(rank))
    kept = {axis for axis in range(rank) if axis not in axes}
    scales = _scales(asked)
    if scales is not None:
        if len(scales) != len(axes):
            raise UnstatedError
        return kept | {axis for axis, scale in zip(axes, scales, strict=True) if scale == 1}
    stretch = asked.text("keep_aspect_ratio_policy", "stretch") == "stretch"
    # With sizes the scale is their ratio: where they are equal, it is 1.
    return kept | _equal_sizes(asked, axes) if stretch and _by_sizes(asked) else kept


def _scales(asked: Asked) -> tuple[float, ...] | None:
    """The scale of each axis; None when they follow from sizes, or are computed."""
    if asked.node.op_type == "Upsample" and asked.opset < 7:
        height, width = (
            float_attribute(asked.node, f"{name}_scale", 0.0) for name in ("height", "width")
        )
        return (1.0, 1.0, height, width)
    position = 2 if asked.node.op_type == "Resize" and asked.opset >= 11 else 1
    stated = "scales" in asked.node.attributes
    if not stated and not asked.is_constant(position):
        return None
    return asked.numbers("scales", position) or None


def _by_sizes(asked: Asked) -> bool:
    """Whether the size of the output is given: scales are absent, or empty."""
    absent = not asked.given(2) or asked.is_constant(2)
    return asked.node.op_type == "Resize" and asked.opset >= 11 and asked.given(3) and absent


def _equal_sizes(asked: Asked, axes: list[int]) -> set[int]:
    before, after = asked.shape(), asked.made()
    if after is None or len(after) != len(before):
        return set()
    return {k for k in axes if before[k] is not None and before[k] == after[k]}


def _uncropped(asked: Asked, rank: int) -> set[int]:
    """The axes along which the region of interest is everything."""
    listed = ints_attribute(asked.node, "axes")
    axes = [axis_of(axis, rank) for axis in listed] or list(range(rank))
    whole = {axis for axis in range(rank) if axis not in axes}
    region = [float(k) for k in asked.array(1).ravel()] if asked.is_constant(1) else []
    if len(region) != 2 * len(axes):
        return whole
    return whole | {a for k, a in enumerate(axes) if (region[k], region[k + len(axes)]) == (0, 1)}


POOLING: Mapping[str, Rule] = {
    "MaxPool": _pool(_HIGHEST), "GlobalMaxPool": _pool(_HIGHEST),
    "AveragePool": _average_pool, "GlobalAveragePool": _pool(_MEAN),
    "LpPool": _pool(_NORM), "GlobalLpPool": _pool(_NORM),
    "ReduceMax": _reduction(_HIGHEST), "ReduceMin": _reduction(_HIGHEST),
    "ReduceMean": _reduction(_MEAN), "ReduceL1": _reduction(_NORM),
    "ReduceL2": _reduction(_NORM), "ReduceSum": _reduce_sum, "CumSum": _cumulated,
    "Resize": _resize, "Upsample": _resize, "GridSample": _grid_sample,
    "RoiAlign": _regions,
}  # fmt: skip
