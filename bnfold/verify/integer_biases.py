"""What a fold rounds that no float type explains: biases to integers, and what they decide then.

An int32 bias is off by up to half of its scale, wherever the folded one lies between two integers.
That is far below what rounding activations to 8 bits costs, and yet far above a rounding of
float32; and where activations are rounded, what is near an edge goes to the other side of it. So
two folds that are equally right lie apart by more than the runtime's own error. How far is seen on
twins of the candidate, in float64: whatever the fold changed is rounded otherwise in each, and in
one of them, wherever such values are rounded, the one nearest to an edge goes over it. Without
that, few samples would show what is rare and yet may happen on any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bnfold.errors import InconclusiveError
from bnfold.verify.bounds import F64
from bnfold.verify.ends import Pair, Progress
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.oracle import Oracle
from bnfold.verify.oracle_quantised import beside
from bnfold.verify.subject import Feeds, Outputs

Array = NDArray[Any]


def rounded_bias_steps(
    node: Any, values: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, F64]:
    """The scales of a bias that a DequantizeLinear makes of int32, if the fold rounded it.

    Args:
        node: A node of the candidate.
        values: Its tensors.
        before: The constants of the reference.

    Returns:
        By the name of the bias one scale for each channel, or one; empty for all other nodes.
    """
    if node.onnx_node.op_type != "DequantizeLinear":
        return {}
    integers, scale = values.get(node.input[0]), values.get(node.input[1])
    if not isinstance(integers, np.ndarray) or integers.dtype != np.int32 or integers.ndim != 1:
        return {}
    if _same(before.get(node.input[0]), integers):
        return {}
    return {node.output[0]: np.abs(np.asarray(scale, dtype=np.float64)).ravel()}


def folds_apart(pair: Pair, feeds: Sequence[Feeds], progress: Progress) -> dict[str, float]:
    """By output, the largest relative distance of two folds that are equally right.

    Args:
        pair: The two models.
        feeds: The samples, by the reference's input names.
        progress: Told how far it is.

    Returns:
        Nothing where the candidate rounds no activation and no bias to integers, or can't be
        computed in float64.
    """
    one, other = pair.reference, pair.candidate
    if not (isinstance(one, OnnxSubject) and isinstance(other, OnnxSubject)):
        return {}
    changed = _changed(one.model.proto.graph, other.model.proto.graph)
    if not changed:
        return {}
    rng = np.random.default_rng(0)
    twins = [{n: _rounded_otherwise(rng, v, one.unit) for n, v in changed.items()} for _ in "ab"]
    oracle = Oracle(other.model.proto, keep=False)
    apart: dict[str, float] = {}
    try:
        for done, feed in enumerate(feeds, start=1):
            renamed: Any = pair.interface.to_candidate(feed)
            first, second = (
                pair.interface.from_candidate(_outputs(oracle, renamed, twin, over=over))
                for twin, over in zip(twins, (False, True), strict=True)
            )
            for name, value in first.items():
                apart[name] = max(apart.get(name, 0.0), _distance(value, second[name]))
            progress("looking how far right folds lie apart", done / len(feeds))
    except InconclusiveError:
        return {}
    return apart


def _outputs(oracle: Oracle, feed: Feeds, constants: Mapping[str, Array], *, over: bool) -> Outputs:
    """The outputs of a twin; with ``over``, what is nearest to an edge goes over it."""
    values: dict[str, Any] = {}
    touched = set(constants)
    for node in oracle.walk(feed, values, constants):
        if touched.isdisjoint(node.input):
            continue
        touched.update(node.output)
        if over and node.onnx_node.op_type == "QuantizeLinear":
            values[node.output[0]] = _over_an_edge(node, values)
    return {name: values[name] for name in oracle.outputs}


def _over_an_edge(node: Any, values: Mapping[str, Any]) -> Array:
    """The integers of a QuantizeLinear, the one nearest to another integer moved there."""
    integers: Array = values[node.output[0]]
    if integers.dtype.kind not in "iu" or not integers.size:
        return integers
    options = (integers.shape, getattr(node, "axis", None), getattr(node, "block_size", None))
    exact = values[node.input[0]] / beside(values[node.input[1]], *options)
    if len(node.input) > 2 and node.input[2]:
        exact = exact + beside(values[node.input[2]].astype(np.float64), *options)
    rest = exact - integers
    info = np.iinfo(integers.dtype)
    moved = integers.astype(np.int64) + np.where(rest > 0, 1, -1)
    # What is beyond the ends of the type stays there.
    rest[(moved < info.min) | (moved > info.max) | ~(np.abs(rest) <= 0.5)] = 0
    place = np.unravel_index(int(np.argmax(np.abs(rest))), rest.shape)
    result = integers.copy()
    if rest[place]:
        result[place] = moved[place]
    return result


def _changed(before: onnx.GraphProto, after: onnx.GraphProto) -> dict[str, Array]:
    """The constants that a fold rounded, where integers are among them or follow on them."""
    old = {tensor.name: tensor for tensor in before.initializer}
    integers = {n.input[0] for n in after.node if n.op_type == "DequantizeLinear"}
    found: dict[str, Array] = {}
    for tensor in after.initializer:
        name = tensor.name
        floats = tensor.data_type in (
            onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
        )  # fmt: skip
        whole = tensor.data_type == onnx.TensorProto.INT32 and name in integers
        if (floats or whole) and (name not in old or old[name] != tensor):
            found[name] = numpy_helper.to_array(tensor)
    rounds = any(node.op_type == "QuantizeLinear" for node in after.node)
    return found if rounds or any(v.dtype == np.int32 for v in found.values()) else {}


def _rounded_otherwise(rng: np.random.Generator, value: Array, unit: float) -> F64:
    wide = value.astype(np.float64)
    drawn = rng.uniform(-1.0, 1.0, wide.shape)
    moved: F64 = wide + drawn / 2 if value.dtype == np.int32 else wide * (1 + unit * drawn)
    return moved


def _distance(one: Any, other: Any) -> float:
    if not isinstance(one, np.ndarray) or one.dtype.kind != "f" or one.shape != other.shape:
        return 0.0
    apart, size = float(np.linalg.norm(one - other)), float(np.linalg.norm(one))
    return apart / size if np.isfinite(apart) and 0 < size < np.inf else 0.0


def _same(before: Any, after: Array) -> bool:
    return isinstance(before, np.ndarray) and np.array_equal(before, after)
