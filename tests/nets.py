"""Small ONNX models from text, and what the tests ask of a folded one."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

import bnfold
from bnfold.report.model import Report
from bnfold.verify.oracle import Oracle

Array = NDArray[Any]


def model(
    text: str, constants: Mapping[str, Array] | None = None, **header: Any
) -> onnx.ModelProto:
    """A model from the text of its graph, with ``constants`` as initializers.

    ``header``: ``ir`` (default 8), ``opset`` (default 17), further ``domains``.
    """
    opsets = ", ".join(
        [f'"" : {header.get("opset", 17)}', *(f'"{d}" : 1' for d in header.get("domains", ()))]
    )
    proto = onnx.parser.parse_model(
        f"<ir_version: {header.get('ir', 8)}, opset_import: [{opsets}]>\n{text}"
    )
    for name, value in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return proto


def batch_norm(
    rng: np.random.Generator, name: str, channels: int, dtype: DTypeLike = np.float32
) -> dict[str, Array]:
    """Statistics as hard as they come: gammas negative, tiny and zero, variances of all sizes."""
    gamma = rng.normal(1, 0.5, channels)
    gamma[:3] = [-1.5, 1e-6, 0][:channels]
    return {
        f"{name}_g": gamma.astype(dtype),
        f"{name}_b": rng.normal(0, 1, channels).astype(dtype),
        f"{name}_m": rng.normal(0, 1, channels).astype(dtype),
        f"{name}_v": rng.uniform(0.01, 5, channels).astype(dtype),
    }


def weight(rng: np.random.Generator, *shape: int, dtype: DTypeLike = np.float32) -> Array:
    """A random weight."""
    return rng.normal(0, 0.5, shape).astype(dtype)


def words(text: str) -> set[str]:
    """The names in a piece of ONNX text."""
    return set(re.findall(r"\w+", text))


def rounded(values: NDArray[np.float64], dtype: DTypeLike) -> Array:
    """``values``, each the nearest of its neighbours in ``dtype`` (ties to even), by search."""
    near = values.astype(np.float32).astype(dtype) if np.dtype(dtype).itemsize == 2 else None
    if near is None:
        return values.astype(dtype)
    bits = near.view(np.int16)
    around = np.stack([(bits + k).astype(np.int16).view(dtype) for k in (-1, 0, 1)])
    far = np.abs(around.astype(np.float64) - values)
    even = np.stack([(bits + k) % 2 for k in (-1, 0, 1)])
    best = np.lexsort((even, far), axis=0)[0]
    result: Array = np.take_along_axis(around, best[None], axis=0)[0]
    return result


def operators(proto: onnx.ModelProto) -> Counter[str]:
    """The operators of the main graph."""
    return Counter(node.op_type for node in proto.graph.node)


def feeds(proto: onnx.ModelProto, seed: int = 0, size: int = 2) -> dict[str, Array]:
    """One random input for each graph input that is not an initializer."""
    rng = np.random.default_rng(seed)
    asked = set(inputs(proto))
    result: dict[str, Array] = {}
    for value in proto.graph.input:
        if value.name in asked:
            tensor = value.type.tensor_type
            shape = [dim.dim_value or size for dim in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            result[value.name] = rng.normal(0, 1, shape).astype(dtype)
    return result


def inputs(proto: onnx.ModelProto) -> list[str]:
    """The inputs that a caller has to give."""
    given = {tensor.name for tensor in proto.graph.initializer}
    return [value.name for value in proto.graph.input if value.name not in given]


def run(proto: onnx.ModelProto, given: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs in float64; an initializer that is also an input may be given."""
    return Oracle(proto).run(dict(given))


def declare_initializers(proto: onnx.ModelProto) -> None:
    """Make every initializer an input of the graph too, as IR version 3 asks for."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )


def same(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    """Whether the two are one model, apart from how protobuf spells it."""
    spelled = [ir.to_proto(ir.from_proto(proto)) for proto in (before, after)]
    left, right = (proto.SerializeToString(deterministic=True) for proto in spelled)
    return bool(left == right)


def difference(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> float:
    """The largest relative error of any output, both models in float64."""
    given = feeds(before, seed)
    left, right = Oracle(before).run(given), Oracle(after).run(given)
    assert list(left) == list(right)
    worst = 0.0
    for name, expected in left.items():
        assert expected.shape == right[name].shape
        scale = float(np.linalg.norm(expected)) or 1.0
        worst = max(worst, float(np.linalg.norm(right[name] - expected)) / scale)
    return worst


def folded(
    proto: onnx.ModelProto, tolerance: float = 1e-6, **options: Any
) -> tuple[onnx.ModelProto, Report]:
    """Fold ``proto``; the result is valid, says the same, and ``proto`` is as it was."""
    onnx.checker.check_model(proto, full_check=True)
    before = proto.SerializeToString()
    result = bnfold.fold(proto, **options)
    assert proto.SerializeToString() == before
    onnx.checker.check_model(result.model, full_check=True)
    assert inputs(result.model) == inputs(proto)
    assert [v.name for v in result.model.graph.output] == [v.name for v in proto.graph.output]
    assert difference(proto, result.model) <= tolerance
    assert_nothing_dangles(result.model)
    return result.model, result.report


def assert_nothing_dangles(proto: onnx.ModelProto) -> None:
    """Every initializer is read by something; ONNX Runtime warns of each that is not."""
    read = {name for node in nodes(proto) for name in node.input}
    read |= {value.name for value in proto.graph.output}
    assert {tensor.name for tensor in proto.graph.initializer} <= read


def nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """All nodes, those of subgraphs and functions too."""
    queue = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    for node in queue:
        for attribute in node.attribute:
            queue.extend(attribute.g.node)
            queue.extend(inner for graph in attribute.graphs for inner in graph.node)
    return queue


def constant(proto: onnx.ModelProto, name: str) -> Array:
    """The initializer ``name``."""
    found = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(found)


def verdicts(report: Report) -> dict[str, str]:
    """For each step, by name, how it vanished (``backward``) or why it stays (``BNF001``)."""
    found = {step.name: step.how or step.code for step in report.steps}
    assert len(found) == len(report.steps)
    return found


def witness(report: Report, name: str) -> tuple[str, ...]:
    """What stands in the way of the step ``name``."""
    return next(step.witness for step in report.steps if step.name == name)


def runtime_says(proto: onnx.ModelProto) -> str:
    """What ONNX Runtime prints while it loads ``proto`` and runs it once; nothing is best."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 2
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            session.run(None, feeds(proto))
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        log.seek(0)
        return log.read().decode(errors="replace")
