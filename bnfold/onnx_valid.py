"""Is it a valid model? onnx.checker and shape inference on a copy without weights.

The checker wants to see every weight. In the copy, large initializers have become graph inputs of
the same type, which changes nothing about what it can find wrong with the graph.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from bnfold.errors import InvalidModelError
from bnfold.onnx_shapes import Inferred, shapes_in


def known_versions(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that is newer than the installed onnx.

    Raises:
        InvalidModelError: It is.
    """
    newest = onnx.defs.onnx_opset_version()
    for stated in proto.opset_import:
        if stated.domain in ("", "ai.onnx") and not 1 <= stated.version <= newest:
            met = f"it uses opset {stated.version}; the installed onnx knows 1 to {newest}"
            raise InvalidModelError(met, file=str(path), todo="pip install -U onnx")
    if proto.ir_version > onnx.IR_VERSION:
        met = f"its IR version is {proto.ir_version}; the installed onnx knows {onnx.IR_VERSION}"
        raise InvalidModelError(met, file=str(path), todo="pip install -U onnx")


def check_and_infer(proto: onnx.ModelProto, path: Path) -> Inferred:
    """Check ``proto`` and infer shapes; ``proto`` is left as it is.

    Raises:
        InvalidModelError: onnx.checker refuses it.
    """
    copy = _without_weights(proto)
    custom = any(
        stated.domain not in ("", "ai.onnx", "ai.onnx.ml") for stated in proto.opset_import
    )
    try:
        onnx.checker.check_model(copy, full_check=not custom)
    except onnx.checker.ValidationError as error:
        raise _refused(error, path) from error
    except onnx.shape_inference.InferenceError as error:
        raise _refused(error, path) from error
    try:
        return shapes_in(onnx.shape_inference.infer_shapes(copy, data_prop=True).graph)
    except Exception:  # it is a help, not a condition: what it can't infer counts as unknown
        return {}


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    given = {value.name for value in copy.graph.input}
    kept = []
    for tensor in copy.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        elif tensor.name not in given:
            make = onnx.helper.make_tensor_value_info
            copy.graph.input.append(make(tensor.name, tensor.data_type, list(tensor.dims)))
    small = [_copied(tensor) for tensor in kept]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(small)
    return copy


def _copied(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _refused(error: Exception, path: Path) -> InvalidModelError:
    words = " ".join(str(error).split("==> Context:")[0].split())
    words = re.sub(r"^\[?(ShapeInferenceError|TypeInferenceError)\]?:?\s*", "", words)
    node = re.search(r"[Nn]ode name: ([^\s,)]+)", str(error))
    met = f"onnx.checker refuses it: {words[:400].rstrip('. ')}"
    name = node.group(1) if node else ""
    return InvalidModelError(met, file=str(path), node=name, todo="export the model again")
