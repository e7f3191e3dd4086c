"""Operators whose units go where the elements go, and whose elements keep their order.

Reshape Flatten Squeeze Unsqueeze Transpose    the same elements, other axes
SpaceToDepth DepthToSpace                      channels and space change places
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnfold.channel_graph import Dim, Link, Operator, ShiftRule, Sign
from bnfold.index_maps import permuted, reduced, reshaped, same_axes
from bnfold.onnx_facts import ints_attribute
from bnfold.onnx_rules import Asked, Rule, UnstatedError, Way, axes_of
from bnfold.onnx_shapes import both
from bnfold.onnx_sizes import dimension, named, traced_sizes


def _moved(asked: Asked, *ways: Way) -> Operator:
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, *ways)


def _reshape(asked: Asked) -> Operator:
    source = named(asked.shape())
    target = both(_asked_shape(asked, source), asked.made())
    if target is None:
        raise UnstatedError
    return _moved(asked, Way(0, reshaped(source, target)))


def _asked_shape(asked: Asked, source: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """What the node itself proves of the shape that it makes."""
    if "shape" in asked.node.attributes:
        sizes = list(ints_attribute(asked.node, "shape"))
        return tuple(_size(asked, source, k, size) for k, size in enumerate(sizes))
    traced = traced_sizes(asked.facts, asked.value(1))
    if traced is None:
        return None
    return tuple(
        _size(asked, source, k, s) if isinstance(s, int) else
        dimension(asked.facts, s, asked.value()) for k, s in enumerate(traced)
    )  # fmt: skip


def _size(asked: Asked, source: tuple[Dim, ...], position: int, size: int) -> Dim:
    if size == 0 and not asked.integer("allowzero", 0):
        return source[position] if position < len(source) else None
    return None if size < 0 else size


def _flatten(asked: Asked) -> Operator:
    rank = len(asked.shape())
    axis = asked.integer("axis", 1)
    axis = axis + rank if axis < 0 else axis
    halves = (tuple(range(axis)), 0), (tuple(range(axis, rank)), 1)
    return _moved(asked, Way(0, tuple(Link(axes, (k,)) for axes, k in halves if axes)))


def _squeeze(asked: Asked) -> Operator:
    shape = asked.shape()
    given = asked.integers("axes", 1)
    if given is None and any(not isinstance(dim, int) for dim in shape):
        raise UnstatedError  # an unknown size may be 1
    ones = [k for k, dim in enumerate(shape) if dim == 1]
    axes = ones if given is None else axes_of(given, len(shape))
    return _moved(asked, Way(0, reduced(len(shape), axes, keep=False)))


def _unsqueeze(asked: Asked) -> Operator:
    given = asked.integers("axes", 1) or ()
    rank = len(asked.shape()) + len(given)
    new = axes_of(given, rank)
    left = [axis for axis in range(rank) if axis not in new]
    return _moved(asked, Way(0, tuple(Link((k,), (a,)) for k, a in enumerate(left))))


def _transpose(asked: Asked) -> Operator:
    order = ints_attribute(asked.node, "perm") or tuple(reversed(range(asked.rank())))
    return _moved(asked, Way(0, permuted(order)))


def _blocks(asked: Asked) -> Operator:
    """Blocks of space are channels, or channels are blocks of space."""
    made, shape = asked.made(), asked.shape()
    if len(shape) != 4 or (made is not None and len(made) != 4):
        raise UnstatedError
    deep = shape if asked.node.op_type == "DepthToSpace" else made
    count, area = None if deep is None else deep[1], asked.integer("blocksize", 0) ** 2
    if not isinstance(count, int) or not 0 < area <= count:
        return _moved(asked, Way(0, same_axes(4, (1, 2, 3))))
    outer = asked.text("mode", "DCR") == "DCR"
    every = np.arange(count)
    flat = every % (count // area) if outer else every // area
    pair = (every, flat) if deep is shape else (flat, every)
    return _moved(asked, Way(0, (Link((0,), (0,)), Link((1,), (1,), *pair))))


MOVES: Mapping[str, Rule] = {
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": _transpose, "SpaceToDepth": _blocks, "DepthToSpace": _blocks,
}  # fmt: skip
