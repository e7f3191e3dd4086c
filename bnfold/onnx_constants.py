"""Which tensors of an ONNX model are constant, what they are, and who shares their storage.

A value is constant when it is an initializer nobody can override, the output of a Constant node,
or computed from such values alone by deterministic ``ai.onnx`` operators: exporters hide weights
and BatchNorm parameters behind Identity, Cast, Reshape, Unsqueeze, Transpose, Expand, Sqrt ...
An initializer that is also a graph input can be overridden by the caller from IR version 4 on.

Constants are computed in float64 from the stored tensors, whatever float type they pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.onnx_evaluate import evaluate_node
from bnfold.onnx_shapes import Inferred, Shape, both, declared_shape
from bnfold.onnx_tensors import Array, constant_of, read_tensor, stored_bytes

ONNX_DOMAINS = frozenset({"", "ai.onnx"})

# Their result is not a function of their inputs, or it is what makes a weight quantised.
_NEVER_CONSTANT = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
    "Bernoulli", "Dropout", "If", "Loop", "Scan", "SequenceMap", "QuantizeLinear",
    "DequantizeLinear", "DynamicQuantizeLinear",
})  # fmt: skip

_BOOLEAN = frozenset({
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor",
    "IsNaN", "IsInf",
})  # fmt: skip

FLOAT_TYPES = frozenset({
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE,
})  # fmt: skip

# Which input gives the result its type, where it is not the first.
_TYPED_BY = {"CastLike": 1, "Where": 1, "OneHot": 2}

# They move elements about and compute nothing: their result is in the stored type.
MOVES = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})

_CACHED_BYTES = 1 << 16


class Constants:
    """The constant values of a model.

    Args:
        model: The model; it is only read.
        inferred: What shape inference found for the main graph.
        trust_initializers: Take initializers that are also graph inputs as constants.
    """

    def __init__(
        self, model: ir.Model, inferred: Inferred, *, trust_initializers: bool = False
    ) -> None:
        self._main, self._inferred = model.graph, inferred
        self._overridable = model.ir_version >= 4 and not trust_initializers
        self._functions = {(key[0], key[1]) for key in model.functions}
        self._root: dict[ir.Value, ir.Value] = {}
        self._cache: dict[ir.Value, Array] = {}
        self.opsets: dict[ir.Graph, int] = {}
        self.graphs: list[ir.Graph] = []
        main = _opset(model.opset_imports, 1)
        self._visit(model.graph, main)
        for function in model.functions.values():
            self._visit(function.graph, _opset(function.opset_imports, main))

    # ---- finding ----

    def _visit(self, graph: ir.Graph, opset: int) -> None:
        self.graphs.append(graph)
        self.opsets[graph] = opset
        for value in graph.initializers.values():
            if not (self._overridable and value.is_graph_input()):
                self._root[value] = value
        for node in graph:
            self._note(node)
            for body in bodies(node):
                self._visit(body, opset)

    def _note(self, node: ir.Node) -> None:
        """Enter the outputs of ``node`` if they are constant."""
        if not self.is_plain(node) or node.op_type in _NEVER_CONSTANT:
            return
        if node.op_type in ("Shape", "Size") and self._sizes(node) is not None:
            self._root[node.outputs[0]] = node.outputs[0]  # it reads a shape, and no storage
            return
        if node.op_type == "Gather" and self._picked_sizes(node) is not None:
            self._root[node.outputs[0]] = node.outputs[0]
            return
        inputs = [value for value in value_inputs(node) if value is not None]
        if not inputs and node.op_type != "Constant":
            return
        if all(value in self._root for value in inputs):
            roots = [self._root[value] for value in inputs]
            for output in node.outputs:
                self._root[output] = max(roots, key=stored_bytes, default=output)

    def _sizes(self, node: ir.Node) -> tuple[int, ...] | None:
        """The sizes that a Shape or Size node gives, where they are known."""
        value = node.inputs[0]
        shape = None if value is None else self.known_shape(value)
        if shape is None:
            return None
        bounds = [node.attributes.get(name) for name in ("start", "end")]
        asked = shape[slice(*(None if bound is None else bound.as_int() for bound in bounds))]
        sizes = tuple(dim for dim in asked if isinstance(dim, int))
        if len(sizes) < len(asked):
            return None
        return (prod(sizes),) if node.op_type == "Size" else sizes

    def _picked_sizes(self, node: ir.Node) -> Array | None:
        """What a Gather takes of the sizes of a tensor, where just these are known."""
        data, index = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        source = None if data is None else data.producer()
        if source is None or source.op_type != "Shape" or not self.is_plain(source):
            return None
        value = source.inputs[0]
        shape = None if value is None else self.known_shape(value)
        bounds = any(name in source.attributes for name in ("start", "end"))
        if shape is None or bounds or index is None or index not in self._root:
            return None
        places = np.asarray(self.array(index))
        if places.dtype.kind not in "iu" or (abs(places) > len(shape)).any():
            return None
        taken = [shape[int(k)] for k in places.ravel() if -len(shape) <= k < len(shape)]
        known = [size for size in taken if isinstance(size, int)]
        if len(known) < places.size:
            return None
        return np.array(known, dtype=np.int64).reshape(places.shape)

    def is_standard(self, node: ir.Node) -> bool:
        """Whether ``node`` is of ``ai.onnx``, and no function of the model redefines it."""
        return node.domain in ONNX_DOMAINS and (node.domain, node.op_type) not in self._functions

    def is_plain(self, node: ir.Node) -> bool:
        """Whether ``node`` is of ``ai.onnx`` and all its attributes are known.

        Within a function an attribute may be one that each caller sets.
        """
        known = not any(attribute.is_ref() for attribute in node.attributes.values())
        return known and self.is_standard(node)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` can be known before the model runs."""
        return value is not None and value in self._root

    def is_float(self, value: ir.Value) -> bool:
        """Whether a constant is of a float type that a fold can compute with."""
        return self.dtype(value) in FLOAT_TYPES

    def root(self, value: ir.Value) -> ir.Value:
        """The largest stored tensor that a constant is computed from: its storage."""
        return self._root[value]

    # ---- reading ----

    def stored(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The tensor of an initializer or Constant node, looking through Identity."""
        producer = value.producer()
        while producer is not None and producer.op_type == "Identity":
            assert producer.inputs[0] is not None
            value = producer.inputs[0]
            producer = value.producer()
        if producer is None:
            return value.const_value
        return constant_of(producer) if producer.op_type == "Constant" else None

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of a constant, from its tensor, its declaration or its inputs."""
        tensor = self.stored(value)
        if tensor is not None:
            return tensor.dtype
        return self.declared_dtype(value) or self._computed_dtype(value)

    def _computed_dtype(self, value: ir.Value) -> ir.DataType | None:
        producer = value.producer()
        assert producer is not None
        if producer.op_type in _BOOLEAN:
            return ir.DataType.BOOL
        if producer.op_type == "Cast":
            return ir.DataType(producer.attributes["to"].as_int())
        if producer.op_type in ("Shape", "Size", "NonZero", "ArgMax", "ArgMin"):
            return ir.DataType.INT64
        if producer.op_type == "ConstantOfShape":
            filled = producer.attributes.get("value")
            return ir.DataType.FLOAT if filled is None else filled.as_tensor().dtype
        source = producer.inputs[_TYPED_BY.get(producer.op_type, 0)]
        if source is None or source in self._root:
            return None if source is None else self.dtype(source)
        return self.declared_dtype(source)

    def declared_dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of an activation, as the model or shape inference states it."""
        if value.dtype is not None or value.graph is not self._main:
            return value.dtype
        number = self._inferred.get(value.name or "", (0, None))[0]
        return ir.DataType(number) if number else None

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of a constant; computes it only where nothing states it."""
        known = self.known_shape(value) or (None,)
        sizes = tuple(dim for dim in known if isinstance(dim, int))
        return sizes if len(sizes) == len(known) else tuple(self.array(value).shape)

    def known_shape(self, value: ir.Value) -> Shape | None:
        """What the tensor, the model and shape inference say of a shape; None: not even a rank."""
        tensor = self.stored(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        # Two branches of an If may use one name twice: only the main graph's names are looked up.
        found = self._inferred.get(value.name or "") if value.graph is self._main else None
        return both(declared_shape(value), None if found is None else found[1])

    def array(self, value: ir.Value) -> Array:
        """The constant itself: in its stored type where it is stored, in float64 if computed."""
        if value not in self._cache:
            result = self.reader(value)()
            if result.nbytes > _CACHED_BYTES:
                return result
            self._cache[value] = result
        return self._cache[value]

    def float64(self, value: ir.Value) -> NDArray[np.float64]:
        """The constant in float64."""
        return np.asarray(self.array(value)).astype(np.float64)

    def reader(self, value: ir.Value) -> Callable[[], Array]:
        """How to read the constant later, also after the graph around it has been edited."""
        if value in self._cache:
            return partial(_same, self._cache[value])
        tensor = self.stored(value)
        if tensor is not None:
            return partial(read_tensor, tensor)
        producer = value.producer()
        assert producer is not None
        sizes = self._sizes(producer) if producer.op_type in ("Shape", "Size") else None
        if sizes is not None:
            listed = np.array(sizes, dtype=np.int64)
            return partial(_same, listed if producer.op_type == "Shape" else listed[0])
        picked = self._picked_sizes(producer) if producer.op_type == "Gather" else None
        if picked is not None:
            return partial(_same, picked)
        wide = producer.op_type not in MOVES
        inputs = [
            None if v is None else self._input_reader(v, wide) for v in value_inputs(producer)
        ]
        return partial(_computed, producer, inputs, self.opset_of(producer), value.index() or 0)

    def _input_reader(self, value: ir.Value, wide: bool) -> Callable[[], Array]:
        read = self.reader(value)
        return partial(_widened, read) if wide and self.is_float(value) else read

    def opset_of(self, node: ir.Node) -> int:
        """The version of ``ai.onnx`` that ``node`` is written for."""
        graph = node.graph.graph if isinstance(node.graph, ir.Function) else node.graph
        return 1 if graph is None else self.opsets.get(graph, 1)


def _opset(imports: Mapping[str, int], otherwise: int) -> int:
    """The version of ``ai.onnx``, by either of the names of its domain."""
    return int(imports.get("", imports.get("ai.onnx", otherwise)))


def _same(array: Array) -> Array:
    return array


def _widened(read: Callable[[], Array]) -> Array:
    return np.asarray(read()).astype(np.float64)


def _computed(
    node: ir.Node, inputs: list[Callable[[], Array] | None], opset: int, output: int
) -> Array:
    return evaluate_node(node, [None if read is None else read() for read in inputs], opset)[output]


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a control-flow node."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def value_inputs(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """The inputs whose value counts; of the second input of CastLike, only the type does."""
    return tuple(node.inputs[:1]) if node.op_type == "CastLike" else tuple(node.inputs)
