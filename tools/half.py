"""An ONNX model in float16."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float16 in place of every float32, stored and passed on."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        _narrow(tensor)
    for node in half.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _narrow(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = _half_type(attribute.i)
    for value in (*half.graph.input, *half.graph.output, *half.graph.value_info):
        kind = value.type.tensor_type
        kind.elem_type = _half_type(kind.elem_type)
    return half


def _half_type(elem_type: int) -> int:
    return TensorProto.FLOAT16 if elem_type == TensorProto.FLOAT else elem_type


def _narrow(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
