"""Which ONNX nodes are affine steps, and what they do per channel.

    BatchNormalization     gamma (x - mean) / sqrt(variance + eps) + beta, channels on axis 1
    Mul Add Sub Div Neg    by a constant that lies along one axis, on either side

A constant lies along an axis when every other dimension of it is 1; that it does not enlarge
what it meets has to be known from the shape of the activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import Form
from bnfold.errors import InvalidModelError
from bnfold.found import RANK_UNKNOWN, FoundStep, Placed, lying, placed
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import FLOAT_TYPES, Facts, float_attribute, input_at, int_attribute

_EPSILON = float(np.float32(1e-5))  # the default is a float32 in the operator's schema

BINARY = frozenset({"Mul", "Add", "Sub", "Div"})


@dataclass(frozen=True, slots=True)
class StepSite:
    """What a commit needs to rewrite or remove one affine step.

    ``constant_shape`` is the shape that a constant along the step's axis has; for old operator
    sets ``broadcast_axis`` is the axis that the node states as an attribute.
    """

    node: ir.Node
    graph: ir.Graph
    data_input: int
    trailing: int = 0
    broadcast_axis: int | None = None


Found = FoundStep[StepSite]


def find_step(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    """Recognise ``node`` as an affine step, or None.

    Raises:
        InvalidModelError: A BatchNormalization has parameters that mean nothing.
    """
    if not facts.is_plain(node):
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(facts, node, graph)
    if node.op_type == "Neg" and node.inputs[0] is not None:
        if facts.dtype(node.inputs[0]) not in FLOAT_TYPES:
            return None
        return FoundStep(StepSite(node, graph, 0), None, AffineMap.scaling([-1.0]), Form.EITHER)
    if node.op_type in BINARY and len(node.inputs) == 2:
        return _binary(facts, node, graph)
    return None


# ---- BatchNormalization ----


def _batch_norm(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    if len(node.inputs) < 5 or node.inputs[0] is None or None in node.inputs[:5]:
        return None
    site = StepSite(node, graph, 0)
    if in_training_mode(node, facts.opset(graph)):
        return FoundStep(site, 1, None, Form.BOTH, training_mode=True)
    changeable = [v for v in node.inputs[1:5] if v is not None and not facts.is_float_constant(v)]
    if changeable:
        return FoundStep(site, 1, None, Form.BOTH, unproved=f"'{changeable[0].name}'")
    if int_attribute(node, "spatial", 1) == 0:
        taken = AffineMap.identity()
        return FoundStep(site, 1, taken, Form.BOTH, unproved="spatial=0: one set a position")
    try:
        parameters = [facts.constants.float64(v) for v in node.inputs[1:5] if v is not None]
    except UncomputableError as error:
        return FoundStep(site, 1, None, Form.BOTH, unproved=str(error))
    _refuse_bad_parameters(facts, node, parameters)
    gamma, beta, mean, variance = parameters
    epsilon = float_attribute(node, "epsilon", _EPSILON)
    with np.errstate(all="ignore"):
        taken = AffineMap.batch_norm(gamma, beta, mean, variance, epsilon)
    return FoundStep(site, 1, taken, Form.BOTH)


def in_training_mode(node: ir.Node, opset: int) -> bool:
    """Whether a BatchNormalization normalises by the statistics of its batch.

    From version 14 the attribute says so; in versions 7 and 9 the extra outputs do; before, the
    attribute ``is_test`` is 0 unless it is set.
    """
    if opset >= 14:
        return int_attribute(node, "training_mode", 0) != 0
    if opset >= 7:
        return any(output.name for output in node.outputs[1:])
    return int_attribute(node, "is_test", 0) == 0


_PARAMETERS = ("scale", "B", "mean", "variance")


def _refuse_bad_parameters(facts: Facts, node: ir.Node, parameters: list[F64]) -> None:
    label = facts.label(node)
    data = node.inputs[0]
    shape = facts.shape(data) if data is not None else None
    channels: object = shape[1] if shape is not None and len(shape) > 1 else None
    if not isinstance(channels, int):
        channels = parameters[0].size
    for name, values in zip(_PARAMETERS, parameters, strict=True):
        if values.ndim != 1 or values.size != channels:
            met = f"parameter {name} has shape {list(values.shape)} for {channels} channels"
            raise InvalidModelError(met, node=label, todo="export the model again")
    variance = parameters[3]
    bad = np.flatnonzero(~(variance >= 0))
    if bad.size:
        met = f"the variance of channel {bad[0]} is {variance[bad[0]]}"
        raise InvalidModelError(
            met, node=label, todo="mend the running statistics and export again"
        )


# ---- Mul, Add, Sub, Div by a constant ----


def _binary(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    position = _constant_position(facts, node)
    if position is None:
        return None
    data, constant = node.inputs[1 - position], node.inputs[position]
    if data is None or constant is None or facts.dtype(constant) not in FLOAT_TYPES:
        return None
    if facts.dtype(data) not in FLOAT_TYPES | {None}:
        return None
    shape = _constant_shape(facts, constant)
    if shape is None or sum(dim != 1 for dim in shape) > 1:
        return None
    lies, stated = _place(facts, node, data, shape, facts.opset(graph))
    if lies is None:
        return None
    site = StepSite(node, graph, 1 - position, lies.trailing, stated)
    if not facts.constants.is_constant(constant):
        return FoundStep(site, lies.axis, None, Form.EITHER, unproved=f"'{constant.name}'")
    try:
        values = facts.constants.float64(constant).ravel()
    except UncomputableError as error:
        return FoundStep(site, lies.axis, None, Form.EITHER, unproved=str(error))
    taken = _binary_map(node, position, values)
    if taken is None:
        return None
    return FoundStep(site, lies.axis, taken, Form.EITHER, unproved=lies.unproved)


def _constant_position(facts: Facts, node: ir.Node) -> int | None:
    """Which of the two inputs is the constant, or an initializer that a caller can override."""
    for known in (facts.constants.is_constant, lambda v: v is not None and v.is_initializer()):
        found = [i for i, value in enumerate(node.inputs) if known(value)]
        if len(found) == 1:
            return found[0]
        if found:
            return None
    return None


def _constant_shape(facts: Facts, constant: ir.Value) -> tuple[int, ...] | None:
    if facts.constants.is_constant(constant):
        return facts.constants.shape(constant)
    tensor = constant.const_value
    return None if tensor is None else tuple(tensor.shape.numpy())


def _binary_map(node: ir.Node, position: int, constant: F64) -> AffineMap | None:
    with np.errstate(all="ignore"):
        if node.op_type == "Mul":
            return AffineMap.scaling(constant)
        if node.op_type == "Add":
            return AffineMap.shifting(constant)
        if node.op_type == "Sub" and position == 1:
            return AffineMap.shifting(-constant)
        if node.op_type == "Sub":
            return AffineMap.of(np.full_like(constant, -1.0), constant)
        return AffineMap.scaling(1.0 / constant) if position == 1 else None


def _place(
    facts: Facts, node: ir.Node, data: ir.Value, constant: tuple[int, ...], opset: int
) -> tuple[Placed | None, int | None]:
    """On which axis of ``data`` the constant lies, and that axis if an old node states it."""
    shape = facts.shape(data)
    stated = int_attribute(node, "axis", -1) if opset < 7 else -1
    many = [i for i, size in enumerate(constant) if size != 1]
    if stated < 0 or not many or (shape is not None and len(constant) > len(shape)):
        return placed(shape, constant), None
    if shape is None:
        behind = len(constant) - many[0] - 1
        return Placed(stated + many[0], behind, RANK_UNKNOWN), stated
    return lying(shape, stated + many[0], constant[many[0]]), stated


def is_dropout_inference(facts: Facts, node: ir.Node, opset: int) -> bool:
    """Whether a Dropout passes its input on unchanged and nobody reads its mask."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    if opset < 7:
        return int_attribute(node, "is_test", 0) != 0
    training = input_at(node, 2)
    if training is None:
        return True
    return facts.constants.is_constant(training) and not facts.constants.array(training).any()
