"""Shape inference once more, with the sizes that can be computed put in as numbers.

onnx infers no shape behind a Slice or Reshape whose bounds are computed, even from constants alone:
exporters write ``Slice(x, Unsqueeze(0), Unsqueeze(Constant))``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from bnfold.onnx_constants import Constants
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_shapes import Inferred, both, copy_of, infer_shapes
from bnfold.onnx_tensors import Array

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_LARGEST = 64  # a list of sizes is not longer


def sharpened(model: ir.Model, inferred: Inferred) -> Inferred:
    """``inferred``, and what can be inferred of ``model`` once its constant sizes are known.

    Args:
        model: The model; it is not changed.
        inferred: What shape inference found as the model stands.
    """
    if not any(_unknown(shape) for _, shape in inferred.values()):
        return inferred
    computed = dict(_computed_sizes(model, Constants(model, inferred)))
    if not computed:
        return inferred
    again = infer_shapes(_with_numbers(copy_of(model), computed))
    return {
        name: (kind, both(again[name][1], shape) if name in again else shape)
        for name, (kind, shape) in inferred.items()
    }


def _unknown(shape: tuple[object, ...] | None) -> bool:
    return shape is not None and any(d is None or str(d).startswith("unk__") for d in shape)


def _computed_sizes(model: ir.Model, constants: Constants) -> Iterator[tuple[str, Array]]:
    """Short lists of integers that nodes of the main graph compute from constants alone."""
    for node in model.graph:
        if node.op_type == "Constant":
            continue
        for value in node.outputs:
            if value.name and constants.is_constant(value) and _is_size(constants, value):
                try:
                    found = constants.array(value)
                except UncomputableError:
                    continue
                yield value.name, found


def _is_size(constants: Constants, value: ir.Value) -> bool:
    shape = constants.known_shape(value)
    short = shape is None or len(shape) == 0 or (len(shape) == 1 and shape[0] in range(_LARGEST))
    return short and constants.dtype(value) in _INTEGERS


def _with_numbers(model: ir.Model, computed: dict[str, Array]) -> ir.Model:
    """``model`` with initializers in the place of the values ``computed``."""
    for node in list(model.graph):
        for value in node.outputs:
            if value.name in computed:
                array = np.asarray(computed[value.name])
                name = f"{value.name}\0"
                tensor = ir.Tensor(array, name=name)
                known = ir.Value(
                    name=name, const_value=tensor, shape=ir.Shape(array.shape),
                    type=ir.TensorType(tensor.dtype),
                )  # fmt: skip
                model.graph.register_initializer(known)
                value.replace_all_uses_with(known, replace_graph_outputs=True)
    return model
