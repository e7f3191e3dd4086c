"""One ONNX node over constant inputs, in float64.

The few operators behind which exporters hide parameters are computed by numpy at once; every
other one by the reference implementation that the onnx package carries, lifted to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOATS = frozenset({
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
})  # fmt: skip

_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Pow": np.power,
}  # fmt: skip
_UNARY: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x, "Sqrt": np.sqrt, "Neg": np.negative, "Abs": np.abs, "Exp": np.exp,
    "Reciprocal": lambda x: 1 / x,
}  # fmt: skip


class UncomputableError(Exception):
    """A node over constants can't be computed here, so that its result counts as not constant."""


def evaluate_node(node: ir.Node, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """All outputs of ``node``.

    Args:
        node: An ``ai.onnx`` node without subgraphs.
        inputs: Its inputs, floats already in float64.
        opset: The version of ``ai.onnx`` that the node is written for.

    Raises:
        UncomputableError: The operator can't be computed on these inputs.
    """
    try:
        with np.errstate(all="ignore"):
            quick = _quick(node, inputs) if opset >= 7 else None
            return [quick] if quick is not None else _by_reference(node, inputs, opset)
    except Exception as error:  # whatever the reference implementation stumbles over
        raise UncomputableError(f"{node.op_type} over constants: {error}") from error


def _quick(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    first = inputs[0] if inputs else None
    if first is None:
        return None
    if node.op_type in _UNARY:
        return _UNARY[node.op_type](first)
    if node.op_type == "CastLike":  # to the float type of an activation
        return first.astype(np.float64)
    if node.op_type == "Cast" and node.attributes["to"].as_int() in _FLOATS:
        return first.astype(np.float64)
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        return np.transpose(first, None if order is None else list(order.as_ints()))
    if node.op_type in ("Unsqueeze", "Squeeze"):
        return _resized(node, first, inputs)
    if len(inputs) != 2 or inputs[1] is None:
        return None
    return _quick_of_two(node, first, inputs[1])


def _resized(node: ir.Node, data: Array, inputs: Sequence[Array | None]) -> Array | None:
    """Unsqueeze and Squeeze; the axes are an attribute up to version 12, then an input."""
    stated = node.attributes.get("axes")
    given = inputs[1] if len(inputs) > 1 else None
    if stated is None and given is None:
        return None
    listed = given.ravel() if given is not None else stated.as_ints() if stated is not None else ()
    axes = tuple(int(axis) for axis in listed)
    return np.expand_dims(data, axes) if node.op_type == "Unsqueeze" else np.squeeze(data, axes)


def _quick_of_two(node: ir.Node, first: Array, second: Array) -> Array | None:
    if node.op_type in _BINARY:
        return _BINARY[node.op_type](first, second)
    if node.op_type == "Div" and np.issubdtype(first.dtype, np.floating):
        return np.asarray(first / second)
    if node.op_type == "Expand":
        return np.asarray(first * np.ones(second, dtype=first.dtype))
    if node.op_type == "Reshape" and "allowzero" not in node.attributes:
        return first.reshape([first.shape[i] if n == 0 else n for i, n in enumerate(second)])
    return None


def _by_reference(node: ir.Node, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    lifted = _lifted(proto)
    names = [f"i{k}" if value is not None else "" for k, value in enumerate(inputs)]
    del lifted.input[:], lifted.output[:]
    lifted.input.extend(names)
    lifted.output.extend(f"o{k}" for k in range(len(node.outputs)))
    runner = ReferenceEvaluator(lifted, opsets={"": opset})
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if name}
    return [np.asarray(result) for result in runner.run(None, feeds)]


def _lifted(proto: onnx.NodeProto) -> onnx.NodeProto:
    """The node with float types in its attributes widened to float64."""
    for attribute in proto.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in _FLOATS:
            attribute.i = onnx.TensorProto.DOUBLE
        elif attribute.name == "value" and attribute.t.data_type in _FLOATS:
            wide = onnx.numpy_helper.to_array(attribute.t).astype(np.float64)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide))
    return proto
