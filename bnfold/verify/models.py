"""What may be handed to the checker, made into one thing: a proto with weights, maybe a path."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bnfold.errors import ReadError, UsageError

# What protobuf refuses to serialize in one piece.
TWO_GIGABYTES = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights in memory.

    Attributes:
        name: How messages call it: the path, or ``<reference>`` and the like.
        proto: The model, all weights in the proto.
        path: Where it lies, if it was given as a path.
    """

    name: str
    proto: onnx.ModelProto
    path: Path | None = None

    @property
    def session_source(self) -> onnx.ModelProto | Path:
        """What a runtime should load: the file where there is one."""
        return self.proto if self.path is None else self.path

    def weights(self, names: Container[str]) -> dict[str, NDArray[Any]]:
        """Initializers and tensors of Constant nodes, those named; the outer graph's go first."""
        found: dict[str, NDArray[Any]] = {}
        for name, tensor in _named(self.proto.graph):
            if name in names and name not in found:
                found[name] = numpy_helper.to_array(tensor)
        return found


def load_model(model: Any, name: str) -> LoadedModel:
    """Takes a path, a ``ModelProto`` or an ``onnx_ir.Model``.

    Args:
        model: The model; a proto must hold its weights.
        name: What to call it when it has no path.

    Raises:
        ReadError: The file can't be read as an ONNX model.
        UsageError: It is none of the three, or a proto whose weights lie elsewhere.
    """
    if isinstance(model, str | os.PathLike):
        return _load_path(Path(model))
    if isinstance(model, onnx.ModelProto):
        loaded = LoadedModel(name, model)
    elif type(model).__module__.partition(".")[0] == "onnx_ir":
        loaded = LoadedModel(name, _from_ir(model))
    else:
        raise UsageError(
            f"a {type(model).__name__} is not a model", file=name,
            todo="pass a path, an onnx.ModelProto or an onnx_ir.Model",
        )  # fmt: skip
    for tensor in tensors(loaded.proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UsageError(
                "its weights lie in another file", file=name, node=tensor.name,
                todo="pass the model as a path",
            )  # fmt: skip
    return loaded


def _load_path(path: Path) -> LoadedModel:
    if not path.is_file():
        raise ReadError("there is no such file", file=str(path))
    try:
        return LoadedModel(str(path), onnx.load(path), path)
    except Exception as error:
        raise ReadError(f"it can't be read as an ONNX model: {error}", file=str(path)) from error


def _from_ir(model: Any) -> onnx.ModelProto:
    """Serializes an IR model and puts lazily held weights into the proto, leaving it as it is."""
    # The object exists, so the module is loaded; verify itself does not depend on it.
    proto: onnx.ModelProto = sys.modules["onnx_ir"].to_proto(model)
    held = {
        name: value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
    }
    for tensor in tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name in held:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = held[tensor.name].tobytes()
    return proto


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every initializer and tensor attribute of a graph and of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for inner in _subgraphs(graph):
        yield from tensors(inner)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _named(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t
    for inner in _subgraphs(graph):
        yield from _named(inner)


def nbytes(model: onnx.ModelProto) -> int:
    """Bytes of a model's weights, from their shapes alone."""
    return sum(
        math.prod(t.dims) * _itemsize(t.data_type)
        for t in tensors(model.graph)
        if t.data_type != onnx.TensorProto.STRING
    )


def _itemsize(data_type: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def same_graph(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Whether two models have the same nodes and weights, byte for byte and in the same order."""
    pairs: tuple[tuple[Any, Any], ...] = (
        (one.graph.node, other.graph.node),
        (one.graph.initializer, other.graph.initializer),
        (one.graph.sparse_initializer, other.graph.sparse_initializer),
        (one.functions, other.functions),
    )
    return all(
        len(left) == len(right) and all(a == b for a, b in zip(left, right, strict=True))
        for left, right in pairs
    )


def rounding_unit(model: onnx.ModelProto) -> float:
    """Half an ulp, relative, of the coarsest float type that the model takes, stores or returns.

    2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16; 2^-53 for a model in double.
    """
    types = {tensor.data_type for tensor in tensors(model.graph)}
    ends = (*model.graph.input, *model.graph.output)
    types |= {value.type.tensor_type.elem_type for value in ends}
    bits: dict[int, int] = {
        onnx.TensorProto.FLOAT: 24,
        onnx.TensorProto.FLOAT16: 11,
        onnx.TensorProto.BFLOAT16: 8,
        onnx.TensorProto.DOUBLE: 53,
    }
    return float(np.ldexp(1.0, -min((bits[t] for t in types if t in bits), default=24)))


def user_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that a caller must feed: those without an initializer."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]
