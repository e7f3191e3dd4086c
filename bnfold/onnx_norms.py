"""Normalisations by statistics of the input, which have a scale and a shift of their own.

LayerNormalization RMSNormalization    over the last axis; channels on it
InstanceNormalization                  over space; channels on axis 1
GroupNormalization (version 21)        over groups; channels on axis 1
"""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.channel_graph import Bias, Norm, Weight
from bnfold.onnx_facts import FLOAT_TYPES, input_at
from bnfold.onnx_rules import Asked, Rule, UnstatedError
from bnfold.onnx_tensors import stored_bytes


def _over_last_axis(asked: Asked) -> Norm:
    shape = asked.facts.shape(asked.value())
    axis = asked.integer("axis", -1)
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise UnstatedError
    if any(v.uses() or v.is_graph_output() for v in asked.node.outputs[1:]):
        raise UnstatedError
    takes_bias = asked.node.op_type == "LayerNormalization"
    if takes_bias and asked.given(2):
        bias = _bias(asked)
    else:
        bias = Bias.BUILT_IN if takes_bias else Bias.OPERATOR
    return _norm(asked, -1 if shape is None else len(shape) - 1, bias)


def _over_space(asked: Asked) -> Norm:
    return _norm(asked, 1, _bias(asked))


def _over_groups(asked: Asked) -> Norm:
    if asked.opset < 21:  # one scale a group
        raise UnstatedError
    return _norm(asked, 1, _bias(asked))


def _bias(asked: Asked) -> Bias:
    constant = asked.facts.is_float_constant(input_at(asked.node, 2))
    return Bias.BUILT_IN if constant else Bias.DYNAMIC


def _norm(asked: Asked, axis: int, bias: Bias) -> Norm:
    if asked.is_constant(0) or asked.facts.dtype(asked.value()) not in FLOAT_TYPES | {None}:
        raise UnstatedError
    return Norm(
        name=asked.facts.label(asked.node), op_type=asked.node.op_type, inputs=asked.inputs,
        outputs=asked.outputs, axis=axis, channels=_channels(asked, axis), weight=_weight(asked),
        bias=bias,
    )  # fmt: skip


def _channels(asked: Asked, axis: int) -> int:
    """How many there are: a constant scale says so, if it can't be one number for all."""
    shape = asked.facts.shape(asked.value())
    if shape is not None and not -len(shape) <= axis < len(shape):
        raise UnstatedError
    met = None if shape is None else shape[axis]
    if asked.facts.is_float_constant(asked.value(1)):
        scale = asked.facts.constants.shape(asked.value(1))
        if len(scale) != 1 or (scale[0] != met if isinstance(met, int) else scale[0] == 1):
            raise UnstatedError
        return scale[0]
    if not isinstance(met, int):
        raise UnstatedError
    return met


def _weight(asked: Asked) -> Weight | None:
    scale, constants = asked.value(1), asked.facts.constants
    dtype = asked.facts.dtype(scale)
    if not asked.facts.is_float_constant(scale) or dtype is None:
        return None
    root = constants.root(scale)
    return Weight(root.name or "", dtype.name, asked.readers(scale), stored_bytes(root))


NORMS: Mapping[str, Rule] = {
    "LayerNormalization": _over_last_axis, "RMSNormalization": _over_last_axis,
    "InstanceNormalization": _over_space, "GroupNormalization": _over_groups,
}  # fmt: skip
