"""A look at an ONNX graph from its inputs: who reads a value, and which values are constant."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

ONNX_DOMAINS = ("", "ai.onnx")
# They pass the values of their first input on, in another order, shape or type, or some of them.
CARRIERS = frozenset({
    "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand",
    "Slice", "Split", "Tile", "Concat", "Gather", "Dropout",
})  # fmt: skip
# Exporters hide constants behind these.
_FOLDED = frozenset({
    "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "DequantizeLinear",
})  # fmt: skip


class Walk:
    """The main graph and its subgraphs, seen as one; names that are used twice are taken as one.

    Args:
        model: The model; only read.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._opsets = [v for v in model.opset_import if v.domain in ONNX_DOMAINS]
        self._made: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in all_nodes(model.graph):
            for name in node.output:
                self._made[name] = node
            for slot, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, slot))

    def readers(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """The ``ai.onnx`` nodes that read a value, each with the number of its input."""
        found = self._readers.get(name, [])
        return [(node, slot) for node, slot in found if node.domain in ONNX_DOMAINS]

    def uses(self, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Who reads a value, directly or after it has been moved about."""
        seen, waiting = {name}, deque([name])
        while waiting:
            for node, slot in self.readers(waiting.popleft()):
                yield node, slot
                carried = slot == 0 or node.op_type == "Concat"
                if node.op_type in CARRIERS and carried:
                    new = [output for output in node.output if output and output not in seen]
                    seen.update(new)
                    waiting.extend(new)

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value, floats in float64, where it is constant and simple to compute."""
        try:
            value = self._value(name)
        except Exception:  # whatever the reference implementation stumbles over
            return None
        if value is None or value.dtype.kind in "biuOUS":
            return value
        return value.astype(np.float64)

    def _value(self, name: str) -> NDArray[Any] | None:
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        node = self._made.get(name)
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type != "Constant":
            if node.op_type not in _FOLDED:
                return None
            given = {n: self._value(n) for n in node.input if n}
            if any(value is None for value in given.values()):
                return None
        else:
            given = {}
        single = onnx.helper.make_graph(
            [node], "one", [onnx.ValueInfoProto(name=n) for n in given],
            [onnx.ValueInfoProto(name=name)],
        )  # fmt: skip
        model = onnx.helper.make_model(single, opset_imports=self._opsets)
        computed: Any = ReferenceEvaluator(model).run(None, given)
        return np.asarray(computed[0])

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a stored tensor, also of one behind an Identity, without reading it."""
        node = self._made.get(name)
        while node is not None and node.op_type in ("Identity", "Cast", "DequantizeLinear"):
            name = node.input[0]
            node = self._made.get(name)
        if name in self._stored:
            return tuple(self._stored[name].dims)
        if node is not None and node.op_type == "Constant":
            value = self.constant(name)
            return None if value is None else value.shape
        return None


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph or function and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or ``default``."""
    for found in node.attribute:
        if found.name == name:
            value = onnx.helper.get_attribute_value(found)
            return value.decode() if isinstance(value, bytes) else value
    return default
