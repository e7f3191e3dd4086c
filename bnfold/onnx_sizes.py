"""Sizes that a model computes while it runs, traced back to the tensor that they are sizes of.

Exporters write ``Reshape(x, Concat(Gather(Shape(x), 0), -1, ...))`` where a size is not fixed. Each
entry of such a list is a number, a dimension of some value, or unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.channel_graph import Dim
from bnfold.onnx_facts import Facts, input_at, int_attribute, ints_attribute

_DEPTH = 64  # steps back from one list; exporters need fewer than ten


@dataclass(frozen=True, slots=True)
class DimOf:
    """The size of ``value`` along ``axis``."""

    value: ir.Value
    axis: int


Size = int | DimOf | None
Sizes = list[Size]


def symbol_of(position: int) -> str:
    """A private name for an unknown dimension of the data of a node: no model has it."""
    return f"\0{position}"


def named(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """``shape`` with a private name for each unknown dimension."""
    return tuple(symbol_of(k) if dim is None else dim for k, dim in enumerate(shape))


def dimension(facts: Facts, size: Size, data: ir.Value) -> Dim:
    """What is known of ``size``; a dimension of ``data`` itself has a name in any case."""
    if not isinstance(size, DimOf):
        return size
    shape = facts.shape(size.value)
    if shape is None:
        return None
    return (named(shape) if size.value is data else shape)[size.axis]


def traced_sizes(facts: Facts, value: ir.Value | None, depth: int = _DEPTH) -> Sizes | None:
    """The entries of a list of sizes; None when not even their number is known."""
    if value is None or depth == 0:
        return None
    if facts.constants.is_constant(value):
        array = np.ravel(facts.constants.array(value))
        return [int(k) for k in array] if np.isfinite(array).all() else None
    node = value.producer()
    if node is None or node.op_type not in _TRACES or not facts.is_plain(node):
        return _unknown(facts, value)
    found = _TRACES[node.op_type](facts, node, depth - 1)
    return _unknown(facts, value) if found is None else found


def _unknown(facts: Facts, value: ir.Value) -> Sizes | None:
    shape = facts.shape(value)
    if shape is None or any(not isinstance(dim, int) for dim in shape) or len(shape) > 1:
        return None
    return [None] * int(np.prod(shape, dtype=np.int64))  # type: ignore[arg-type]


def _of_shape(facts: Facts, node: ir.Node, _: int) -> Sizes | None:
    data = input_at(node, 0)
    rank = None if data is None else facts.rank(data)
    if data is None or rank is None:
        return None
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", rank)
    every: Sizes = [DimOf(data, axis) for axis in range(rank)]
    return every[start:end]


def _same(facts: Facts, node: ir.Node, depth: int) -> Sizes | None:
    return traced_sizes(facts, input_at(node, 0), depth)


def _concat(facts: Facts, node: ir.Node, depth: int) -> Sizes | None:
    parts = [traced_sizes(facts, value, depth) for value in node.inputs]
    if any(part is None for part in parts):
        return None
    return [size for part in parts for size in part or []]


def _gather(facts: Facts, node: ir.Node, depth: int) -> Sizes | None:
    sizes = traced_sizes(facts, input_at(node, 0), depth)
    index = _list(facts, node, "", 1)
    if sizes is None or index is None or any(not -len(sizes) <= k < len(sizes) for k in index):
        return None
    return [sizes[k] for k in index]


def _slice(facts: Facts, node: ir.Node, depth: int) -> Sizes | None:
    sizes = traced_sizes(facts, input_at(node, 0), depth)
    starts, ends = _list(facts, node, "starts", 1), _list(facts, node, "ends", 2)
    steps = _list(facts, node, "steps", 4) if input_at(node, 4) is not None else [1]
    if sizes is None or starts is None or ends is None or steps is None:
        return None
    if (len(starts), len(ends), len(steps)) != (1, 1, 1):
        return None
    return sizes[slice(starts[0], ends[0], steps[0])]


def _list(facts: Facts, node: ir.Node, name: str, position: int) -> list[int] | None:
    if name in node.attributes:
        return list(ints_attribute(node, name))
    value = input_at(node, position)
    if value is None or not facts.constants.is_constant(value):
        return None
    array: NDArray[np.int64] = np.ravel(facts.constants.array(value))
    return [int(k) for k in array]


_TRACES: Mapping[str, Callable[[Facts, ir.Node, int], Sizes | None]] = {
    "Shape": _of_shape, "Concat": _concat, "Gather": _gather, "Slice": _slice,
    "Identity": _same, "Cast": _same, "Unsqueeze": _same, "Squeeze": _same, "Reshape": _same,
}  # fmt: skip
