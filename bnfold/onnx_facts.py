"""What is known of an ONNX model before anything is decided: shapes, types, scopes, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.channel_graph import Dim
from bnfold.onnx_constants import FLOAT_TYPES, Constants
from bnfold.onnx_quantised import Dequantised, quantised_bias, quantised_weight
from bnfold.onnx_shapes import Inferred, both

__all__ = [
    "FLOAT_TYPES",
    "Facts",
    "float_attribute",
    "in_order",
    "input_at",
    "int_attribute",
    "ints_attribute",
]

Placed = tuple[ir.Node, ir.Graph]
"""A node, and the graph that it stands in."""


class Facts:
    """Read-only questions about a model.

    Args:
        model: The model.
        inferred: What shape inference found for the main graph.
        trust_initializers: Take initializers that are also graph inputs as constants.
    """

    def __init__(
        self, model: ir.Model, inferred: Inferred, *, trust_initializers: bool = False
    ) -> None:
        self.model = model
        self.constants = Constants(model, inferred, trust_initializers=trust_initializers)
        self._named = Counter(node.name for graph in self.constants.graphs for node in graph)

    def nodes(self) -> Iterator[Placed]:
        """Every node of the model, its subgraphs and functions, with the graph it stands in."""
        for graph in self.constants.graphs:
            for node in graph:
                yield node, graph

    def opset(self, graph: ir.Graph) -> int:
        """The version of ``ai.onnx`` in force in ``graph``."""
        return self.constants.opsets[graph]

    def is_plain(self, node: ir.Node) -> bool:
        """Whether ``node`` is of ``ai.onnx`` and all its attributes are known."""
        return self.constants.is_plain(node)

    def label(self, node: ir.Node) -> str:
        """The node's name, or what it makes when the name is missing or not its own."""
        if node.name and self._named[node.name] == 1:
            return node.name
        made = next((value.name for value in node.outputs if value.name), "?")
        return f"{node.op_type}({made})"

    def shape(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """The shape of an activation, dimension by dimension; None when the rank is unknown."""
        return both(self.constants.known_shape(value), self._by_definition(value))

    def _by_definition(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """Rank and channels as the operator that makes ``value`` has them from its weight."""
        node = value.producer()
        if node is None or node.op_type not in _CHANNELS_OF_WEIGHT or not self.is_plain(node):
            return None
        weight = input_at(node, 1)
        shape = None if weight is None else self.weight_shape(weight)
        if shape is None:
            return None
        axis = _CHANNELS_OF_WEIGHT[node.op_type]
        if node.op_type == "Gemm":
            axis = 0 if int_attribute(node, "transB", 0) else 1
        groups = int_attribute(node, "group", 1) if axis == 1 else 1
        return (None, shape[axis] * groups, *(None for _ in shape[2:]))

    def rank(self, value: ir.Value) -> int | None:
        """The rank of an activation, if known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a value, if known."""
        if self.constants.is_constant(value):
            return self.constants.dtype(value)
        return self.constants.declared_dtype(value)

    def weight_shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape of a weight that is constant, or dequantised from constants."""
        if self.constants.is_constant(value):
            return self.constants.shape(value)
        quantised = self.quantised_weight(value)
        return None if quantised is None else quantised.shape

    def quantised_weight(self, value: ir.Value | None) -> Dequantised | None:
        """The integers that a weight is dequantised from, if a scale can go into them."""
        return quantised_weight(self.constants, value)

    def quantised_bias(self, value: ir.Value | None) -> Dequantised | None:
        """The int32 that a bias is dequantised from."""
        return quantised_bias(self.constants, value)

    @cached_property
    def rounds_activations(self) -> bool:
        """Whether runtimes may compute with integers: activations are stored as such somewhere."""
        makers = {"QuantizeLinear", "DynamicQuantizeLinear"}
        return any(
            node.op_type in makers
            or (
                node.op_type == "DequantizeLinear"
                and not all(self.constants.is_constant(v) for v in node.inputs if v is not None)
            )
            for node, _ in self.nodes()
        )

    def is_float_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is a constant of a float type."""
        if value is None or not self.constants.is_constant(value):
            return False
        return self.constants.is_float(value)


def in_order(nodes: Iterable[Placed]) -> list[Placed]:
    """Every node behind those that make what it reads; nodes in such an order keep it."""
    given = list(nodes)
    makers = {value: placed for placed in given for value in placed[0].outputs}
    found: dict[ir.Node, Placed] = {}
    begun: set[ir.Node] = set()
    for first in given:
        waiting = [first]
        while waiting:
            node, _ = waiting[-1]
            begun.add(node)
            before = (makers[value] for value in node.inputs if value in makers)
            missing = next((placed for placed in before if placed[0] not in begun), None)
            if missing is None:
                found.setdefault(node, waiting.pop())
            else:
                waiting.append(missing)
    return list(found.values())


# The axis of the weight that counts output channels, where they lie on axis 1 of the output.
_CHANNELS_OF_WEIGHT = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of ``node``."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute of ``node``: a float32, also where it is held in memory as a double."""
    attribute = node.attributes.get(name)
    return float(np.float32(default if attribute is None else attribute.as_float()))


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...]:
    """A list of integers of ``node``; empty when it is not given."""
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(int(k) for k in attribute.as_ints())


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    """Input ``position`` of ``node``; None when it is optional and not given."""
    return node.inputs[position] if position < len(node.inputs) else None
