"""Is it a valid model? onnx.checker and shape inference on a copy without weights.

The checker wants to see every weight. In the copy, large initializers have become graph inputs of
the same type, which changes nothing about what it can find wrong with the graph.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from bnfold.errors import InvalidModelError
from bnfold.onnx_external import all_tensors
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


def check_and_infer(proto: onnx.ModelProto, path: Path, *, external: bool) -> Inferred:
    """Check ``proto`` and infer shapes; ``proto`` is left as it is.

    Args:
        proto: The model without its large weights.
        path: Its file.
        external: Whether weights are kept in other files.

    Raises:
        InvalidModelError: onnx.checker refuses it.
    """
    copy = _without_weights(proto)
    try:
        _check(copy, path, external)
    except onnx.checker.ValidationError as error:
        raise _refused(error, path) from error
    except onnx.shape_inference.InferenceError as error:
        if not _hides_types(proto):
            raise _refused(error, path) from error
    try:
        return shapes_in(onnx.shape_inference.infer_shapes(copy, data_prop=True).graph)
    except Exception:  # it is a help, not a condition: what it can't infer counts as unknown
        return {}


def _check(copy: onnx.ModelProto, path: Path, external: bool) -> None:
    elsewhere = onnx.TensorProto.EXTERNAL
    if not external or all(t.data_location != elsewhere for t in all_tensors(copy)):
        onnx.checker.check_model(copy, full_check=True)
        return
    # Constants and subgraphs with external data: the checker looks for it beside the file.
    onnx.checker.check_model(str(path))
    onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)


def _hides_types(proto: onnx.ModelProto) -> bool:
    """Whether inference may see a contradiction where there is none.

    It knows nothing of custom operators, and takes sparse initializers for scalars.
    """
    known = ("", "ai.onnx", "ai.onnx.ml")
    custom = any(stated.domain not in known for stated in proto.opset_import)
    return custom or bool(proto.graph.sparse_initializer)


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
