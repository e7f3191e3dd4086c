"""Which values the inputs of an ONNX model may take, read off the operators that they reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from bnfold.verify.dtypes import family
from bnfold.verify.onnx_walk import Walk, attribute
from bnfold.verify.sizes import is_open
from bnfold.verify.subject import TensorSpec
from bnfold.verify.synthetic import Limit

PIXELS = Limit(0, 256)
ONES = Limit(1, 2)
# Feature maps are at least so many pixels wide.
_MAP = 8.0
# Slots that take a shape, a count or a size: zero would empty the graph.
_SIZES = {
    ("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0), ("TopK", 1),
    ("Resize", 3), ("Range", 1), ("Range", 2), ("NonMaxSuppression", 2),
}  # fmt: skip
_RECURRENT = ("LSTM", "GRU", "RNN")
_LINEAR = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "DequantizeLinear")
_NORMALISING = ("Sub", "Add", "Mul", "Div", "Cast", "Transpose", "Pad", "Identity")


def limits_of(model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> dict[str, Limit]:
    """What is known of the values of a model's inputs, by name."""
    walk = Walk(model)
    found = {spec.name: _limit(walk, spec, specs) for spec in specs}
    return {name: limit for name, limit in found.items() if limit is not None}


def _limit(walk: Walk, spec: TensorSpec, specs: Sequence[TensorSpec]) -> Limit | None:
    if spec.dtype is None or spec.shape is None:
        return None
    if family(spec.dtype) == "float":
        return _box_limit(walk, spec)
    if family(spec.dtype) != "integer":
        return None
    below = [high for node, slot in walk.uses(spec.name) for high in _highs(walk, node, slot)]
    if below:
        return Limit(0, max(1, min(below)))
    if _counts(walk, spec):
        counted = _counted(spec, specs)
        return ONES if counted is None else Limit(counts=counted)
    if any((node.op_type, slot) in _SIZES for node, slot in walk.uses(spec.name)):
        return ONES
    return _pixels(walk, spec)


def _highs(walk: Walk, node: onnx.NodeProto, slot: int) -> Iterator[int]:
    """One more than the largest index that a lookup allows."""
    if node.op_type in ("Gather", "GatherElements") and slot == 1:
        rows = walk.stored_shape(node.input[0])
        axis = int(attribute(node, "axis", 0))
        if rows is not None and -len(rows) <= axis < len(rows):
            yield rows[axis]
    elif node.op_type == "OneHot" and slot == 0:
        depth = walk.constant(node.input[1])
        if depth is not None:
            yield int(depth.ravel()[0])
    elif node.op_type == "RoiAlign" and slot == 2:
        yield 1  # the number of an image in the batch


def _box_limit(walk: Walk, spec: TensorSpec) -> Limit | None:
    for node, slot in walk.uses(spec.name):
        if (node.op_type, slot) in (("RoiAlign", 1), ("MaxRoiPool", 1)):
            return Limit(boxes=_MAP / float(attribute(node, "spatial_scale", 1.0)))
        if (node.op_type, slot) == ("NonMaxSuppression", 0):
            return Limit(boxes=_MAP)
    return None


# ---- lengths ----


def _counts(walk: Walk, spec: TensorSpec) -> bool:
    """Whether an input says how many entries of a sequence are there."""
    if spec.shape is not None and len(spec.shape) > 1:
        return False
    for node, slot in walk.uses(spec.name):
        if node.op_type in _RECURRENT and slot == 4:
            return True
        if node.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            return True
    return "length" in spec.name.lower() or spec.name.lower().endswith(("_len", "_lens"))


def _counted(spec: TensorSpec, specs: Sequence[TensorSpec]) -> tuple[str, int] | None:
    """The axis that it counts: open if there is one, else the shortest but for the batch."""
    for other in specs:
        shape = other.shape or ()
        if other.name == spec.name or len(shape) < 2:
            continue
        batch = spec.shape[0] if spec.shape else None
        axes = [i for i, size in enumerate(shape) if is_open(size) and i and size != batch]
        if axes:
            return other.name, axes[0]
        fixed = [i for i in range(1, len(shape)) if isinstance(shape[i], int)]
        return other.name, min(fixed or [1], key=lambda i: int(shape[i] or 1))
    return None


# ---- images ----


def _pixels(walk: Walk, spec: TensorSpec) -> Limit | None:
    """The whole range of an integer that is taken as a number, by a Conv say."""
    if not _reaches(walk, spec.name, _LINEAR):
        return None
    if spec.dtype == np.int8:
        return Limit(-128, 128)
    return PIXELS


def _reaches(walk: Walk, name: str, operators: Sequence[str]) -> bool:
    waiting, seen = [name], {name}
    while waiting:
        for node, slot in walk.readers(waiting.pop()):
            if node.op_type in operators and slot == 0:
                return True
            if node.op_type in _NORMALISING:
                new = [output for output in node.output if output not in seen]
                seen.update(new)
                waiting.extend(new)
    return False
