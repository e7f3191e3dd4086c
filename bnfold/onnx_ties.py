"""The operator table of ONNX: which units each operator can live with.

    Identity, Dropout, Cast        any scale, any shift
    Relu and its kin               f(s x) = s f(x) for s > 0: positive scale, no shift
    Max Min                        order is kept: positive scale, equal shift
    Add Sub Sum                    equal scales, one equation between the shifts
    Mul MatMul, Div                linear in one operand, the other one in true units
    Where                          takes either of two: equal units

Operators that pool or move elements about have rules of their own, in ``onnx_pooling``,
``onnx_moves`` and ``onnx_parts``; a node that no rule can state counts as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf

import numpy as np
import onnx_ir as ir

from bnfold.channel_graph import Link, Operator, ShiftRule, Sign
from bnfold.index_maps import broadcast
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import FLOAT_TYPES, Facts, float_attribute
from bnfold.onnx_moves import MOVES
from bnfold.onnx_norms import NORMS
from bnfold.onnx_parts import PARTS
from bnfold.onnx_pooling import POOLING
from bnfold.onnx_rules import Asked, Links, Rule, UnstatedError, Way
from bnfold.onnx_steps import is_dropout_inference

_NO_BOUND = float(np.finfo(np.float32).max)  # old versions of Clip have it as their default


def _no_readers(_: ir.Value) -> tuple[str, ...]:
    return ()


def find_tie(
    facts: Facts,
    node: ir.Node,
    graph: ir.Graph,
    number: Callable[[ir.Value], int],
    readers: Callable[[ir.Value], tuple[str, ...]] = _no_readers,
) -> Operator | None:
    """State ``node`` as a Tie, Sum, Product or Norm; None: all around it is in true units.

    Args:
        facts: What is known of the model.
        node: A node that is neither a linear operator nor an affine step.
        graph: The graph that it stands in.
        number: The number of an activation.
        readers: The operators that read the storage of a constant, by name.
    """
    rule = TABLE.get(node.op_type)
    if rule is None or not facts.is_plain(node) or not node.outputs:
        return None
    try:
        return rule(Asked(facts, node, graph, number, readers))
    except (UnstatedError, UncomputableError):
        return None


# ---- of one input, element by element ----


def _alike(sign: Sign, shift: ShiftRule) -> Rule:
    return lambda asked: asked.tie(sign, shift, Way())


def _dropout(asked: Asked) -> Operator:
    if not is_dropout_inference(asked.facts, asked.node, asked.opset):
        raise UnstatedError
    tie = asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
    # Nobody reads the mask. What is left is Identity, unless its settings are computed.
    return replace(tie, outputs=tie.outputs[:1], routes=() if len(tie.inputs) == 1 else tie.routes)


def _cast(asked: Asked) -> Operator:
    for value in (asked.value(), asked.node.outputs[0]):
        if asked.facts.dtype(value) not in FLOAT_TYPES:
            raise UnstatedError
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())


def _thresholded(asked: Asked) -> Operator:
    if float_attribute(asked.node, "alpha", 1.0) != 0:
        raise UnstatedError
    return asked.tie(Sign.POSITIVE, ShiftRule.ZERO, Way())


def _clip(asked: Asked) -> Operator:
    low, high = _bound(asked, "min", 1, -inf), _bound(asked, "max", 2, inf)
    if (low, high) == (-inf, inf):
        return asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
    if low not in (0, -inf) or high not in (0, inf):
        raise UnstatedError
    return asked.tie(Sign.POSITIVE, ShiftRule.ZERO, Way())


def _bound(asked: Asked, name: str, position: int, none: float) -> float:
    if asked.node.attributes.get(name) is not None:
        value = float_attribute(asked.node, name, none)
    elif asked.given(position):
        value = float(asked.array(position).ravel()[0])
    else:
        return none
    wide = asked.facts.dtype(asked.value()) is ir.DataType.DOUBLE
    beyond = abs(value) >= (inf if wide else _NO_BOUND) and value * none > 0
    return none if beyond else value


# ---- of several inputs, element by element ----


def _ways(asked: Asked, positions: list[int]) -> list[Way]:
    return [Way(k, _spread(asked, k)) for k in positions]


def _spread(asked: Asked, position: int) -> Links | None:
    """How the operand ``position`` lies in the output; None: they have one shape."""
    if _keeps_shape(asked, position):
        return None
    shape, made = asked.shape(position), asked.made()
    if made is None:
        raise UnstatedError
    if shape == made and None not in shape:
        return None
    if asked.opset < 7 and asked.integer("broadcast", 0) and "axis" in asked.node.attributes:
        return _from_axis(asked, position, asked.integer("axis", 0))
    return broadcast(shape, made)


def _keeps_shape(asked: Asked, position: int) -> bool:
    """Whether all other operands are constants of one element."""
    known = asked.facts.shape(asked.value(position))
    rank = 0 if known is None else len(known)
    return all(
        _is_single(asked, k) and len(asked.facts.constants.shape(asked.value(k))) <= rank
        for k in range(len(asked.node.inputs)) if k != position
    )  # fmt: skip


def _from_axis(asked: Asked, position: int, axis: int) -> Links:
    """Before version 7 the axes of the second operand begin at an axis of the first."""
    shape, made = asked.shape(position), asked.shape(0)
    at = 0 if position == 0 else axis % len(made)
    pairs = ((k, k + at) for k in range(len(shape)) if k + at < len(made))
    return tuple(Link((a,), (b,)) for a, b in pairs if shape[a] is not None and shape[a] == made[b])


def _is_single(asked: Asked, position: int) -> bool:
    if not asked.is_constant(position):
        return False
    return all(dim == 1 for dim in asked.facts.constants.shape(asked.value(position)))


def _operands(asked: Asked, first: int = 0) -> tuple[list[int], bool]:
    """The operands that are activations, and whether there are others, which have to be 0."""
    every = range(first, len(asked.node.inputs))
    live = [k for k in every if not asked.is_constant(k)]
    rest = [k for k in every if k not in live]
    if not live or any(not _is_single(asked, k) or asked.array(k).any() for k in rest):
        raise UnstatedError
    return live, bool(rest)


def _extreme(asked: Asked) -> Operator:
    live, with_zero = _operands(asked)
    shift = ShiftRule.ZERO if with_zero else ShiftRule.EQUAL
    sign = Sign.ANY if len(asked.node.inputs) == 1 else Sign.POSITIVE
    return asked.tie(sign, shift, *_ways(asked, live))


def _where(asked: Asked) -> Operator:
    live, with_zero = _operands(asked, first=1)
    shift = ShiftRule.ZERO if with_zero else ShiftRule.EQUAL
    return asked.tie(Sign.ANY, shift, *_ways(asked, live))


def _sum(asked: Asked) -> Operator:
    count = len(asked.node.inputs)
    if count == 1:
        return asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
    signs = (1, -1) if asked.node.op_type == "Sub" else (1,) * count
    return asked.sum(signs, *_ways(asked, list(range(count))))


def _mul(asked: Asked) -> Operator:
    live = [k for k in (0, 1) if not asked.is_constant(k)]
    if len(live) == 1:  # by a constant that is no step, such as one with two axes
        return asked.tie(Sign.ANY, ShiftRule.ZERO, *_ways(asked, live))
    first, second = _ways(asked, [0, 1])
    return asked.product(first, second)


def _div(asked: Asked) -> Operator:
    return asked.tie(Sign.ANY, ShiftRule.ZERO, Way(0, _spread(asked, 0)))


# ---- MatMul of two activations ----


def _matmul(asked: Asked) -> Operator:
    first, second = asked.shape(0), asked.shape(1)
    made = asked.made()
    if made is None or not first or not second:
        raise UnstatedError
    rows, columns = len(first) > 1, len(second) > 1
    batch = made[: len(made) - rows - columns]
    if len(batch) != max(len(first), len(second), 2) - 2:
        raise UnstatedError
    left, right = broadcast(first[:-2], batch), broadcast(second[:-2], batch)
    row = Link((len(first) - 2,), (len(batch),))
    column = Link((len(second) - 1,), (len(batch) + rows,))
    return asked.product(
        Way(0, (*left, row) if rows else left), Way(1, (*right, column) if columns else right)
    )


_IDENTITY = _alike(Sign.ANY, ShiftRule.EQUAL)
_RECTIFIER = _alike(Sign.POSITIVE, ShiftRule.ZERO)
_MASK = _alike(Sign.ANY, ShiftRule.ZERO)

TABLE: Mapping[str, Rule] = {
    "Identity": _IDENTITY, "Dropout": _dropout, "Cast": _cast, "CastLike": _cast,
    "Relu": _RECTIFIER, "LeakyRelu": _RECTIFIER, "PRelu": _RECTIFIER, "Abs": _RECTIFIER,
    "ThresholdedRelu": _thresholded, "Clip": _clip, "Trilu": _MASK,
    "Max": _extreme, "Min": _extreme, "Where": _where,
    "Add": _sum, "Sub": _sum, "Sum": _sum, "Mul": _mul, "Div": _div, "MatMul": _matmul,
    **POOLING, **MOVES, **PARTS, **NORMS,
}  # fmt: skip
