"""Shape inference for a model in memory, without its weights."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from bnfold.channel_graph import Dim

Shape = tuple[Dim, ...]

Inferred = Mapping[str, tuple[int, Shape | None]]
"""Results of shape inference on the main graph: name -> element type (ONNX number), shape."""

_SMALL_BYTES = 1024  # what shapes are computed from is smaller than this


def infer_shapes(model: ir.Model) -> Inferred:
    """Element type and shape of the main graph's values, as far as onnx can infer them.

    Args:
        model: It is not changed; its weights are not read.
    """
    try:
        return shapes_in(_inferred(copy_of(model)).graph)
    except Exception:  # it is a help, not a condition: what it can't infer counts as unknown
        return {}


def copy_of(model: ir.Model) -> ir.Model:
    """A copy of ``model`` that shares its tensors, unless its nodes are not sorted."""
    try:
        return model.clone()
    except (ValueError, RuntimeError):
        return ir.from_proto(ir.to_proto(model))


def _inferred(small: ir.Model) -> onnx.ModelProto:
    """Shape inference on ``small``, which loses its weights by it."""
    graph = small.graph
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.const_value.nbytes < _SMALL_BYTES:
            continue
        value.shape, value.type = _typed(value.const_value)
        del graph.initializers[name]
        if not value.is_graph_input():
            graph.inputs.append(value)
    return onnx.shape_inference.infer_shapes(_proto(small), data_prop=True)


def _typed(tensor: ir.TensorProtocol) -> tuple[ir.Shape, ir.TensorType]:
    return ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)


def _proto(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    return proto


def shapes_in(graph: onnx.GraphProto) -> Inferred:
    """What the value infos of ``graph`` state."""
    found: dict[str, tuple[int, tuple[Dim, ...] | None]] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            tensor = value.type.tensor_type
            dims = tuple(_dim(dim) for dim in tensor.shape.dim)
            found[value.name] = (tensor.elem_type, dims if tensor.HasField("shape") else None)
    return found


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    return int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None


def declared_shape(value: ir.Value) -> Shape | None:
    """The shape that the model states; None when it states no rank."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def both(first: Shape | None, second: Shape | None) -> Shape | None:
    """What two sources know of a shape together: a size before a symbol before nothing."""
    if first is None or second is None or len(first) != len(second):
        return second if first is None else first
    pairs = zip(first, second, strict=True)
    return tuple(b if isinstance(b, int) or a is None else a for a, b in pairs)
