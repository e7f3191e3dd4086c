"""Runs a channel graph in float64, as it is or as a plan leaves it.

A folded operator computes ``output(op(input(x)))``, with what it could really store: a linear
operator scales its weight and adds to its bias, whatever its border sees; a step without an axis
has one scale and one shift; nothing but a Linear, a Norm or an open step stores anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import Affine, Bias, Form, Linear, Norm, ValueId
from bnfold.planning import Absorption, Plan
from tests.channel_graphs import Net

Made = F64 | tuple[F64, ...]

NOTHING = Absorption()
IDENTITY = AffineMap.identity()


def execute(net: Net, feeds: Mapping[ValueId, F64], plan: Plan | None = None) -> dict[int, F64]:
    """All values of the net, as they are stored after ``plan``.

    Args:
        net: The graph and its numbers.
        feeds: The graph's inputs, (1, channels, positions).
        plan: What to fold; None: nothing.
    """
    values = dict(feeds)
    folded = {fold.step for fold in plan.folds} if plan else set()
    absorbed = plan.absorptions if plan else {}
    for index, operator in enumerate(net.graph.operators):
        inputs = [values[v] for v in operator.inputs]
        taken = absorbed.get(index, NOTHING)
        made = inputs[0] if index in folded else _compute(net, index, inputs, taken)
        outputs = made if isinstance(made, tuple) else (made,)
        values |= zip(operator.outputs, outputs, strict=True)
    return values


def _compute(net: Net, index: int, inputs: list[F64], taken: Absorption) -> Made:
    operator = net.graph.operators[index]
    if isinstance(operator, Linear):
        return _linear(net, index, operator, inputs[0], taken)
    if isinstance(operator, Affine) and operator.map is not None and index not in net.kernels:
        axis = taken.axis if operator.axis is None else operator.axis
        return taken.around(operator.map).apply(inputs[0], 1 if axis is None else axis)
    made = net.kernels[index](*inputs)
    if isinstance(operator, Norm) and taken.output is not None:
        assert isinstance(made, np.ndarray)
        return taken.output.apply(made, operator.axis)
    return made


def _linear(net: Net, index: int, linear: Linear, x: F64, taken: Absorption) -> F64:
    before = (taken.input or IDENTITY).expand(linear.in_channels)
    after = taken.output or IDENTITY
    storage = linear.weight.storage if linear.weight else f"w{index}"
    weight = net.weights[storage]
    bias = net.biases[index] + weight.sum(axis=2) @ before.shift
    data = np.moveaxis(x, linear.in_axis, 1)
    earlier = np.roll(data, 1, axis=2)
    if linear.shift_barrier:
        earlier[:, :, 0] = 0
    scaled = weight * before.scale[:, None]
    taps = (np.einsum("oi,nip->nop", scaled[:, :, k], v) for k, v in enumerate((data, earlier)))
    result = after.apply(sum(taps, bias[:, None]), 1)
    return np.moveaxis(result, 1, linear.out_axis)


# ---- what can't be stored, even where the numbers would come out right ----


def impossible(net: Net, plan: Plan) -> list[str]:
    """Everything that a plan asks of an operator and that it can't give; empty when sound."""
    wrong = []
    for index, taken in plan.absorptions.items():
        operator = net.graph.operators[index]
        if isinstance(operator, Linear):
            problem = _of_linear(operator, taken)
        else:
            problem = _of_other(net, index, taken)
        if problem:
            wrong.append(f"{operator.name} {problem}")
    return wrong + _unequal_uses(net, plan)


def _of_linear(linear: Linear, taken: Absorption) -> str:
    before, after = taken.input or IDENTITY, taken.output or IDENTITY
    if before.channels not in (1, linear.in_channels):
        return "has other input channels"
    if after.channels not in (1, linear.out_channels):
        return "has other output channels"
    scaled = not (before.is_shifting and after.is_shifting)
    if scaled and (linear.weight is None or linear.weight.dtype != "FLOAT"):
        return "has no weight that could be scaled"
    if linear.bias is Bias.DYNAMIC and not (before.is_scaling and after.is_identity):
        return "has no bias that could be changed"
    if linear.bias is Bias.NOWHERE and not (before.is_scaling and after.is_scaling):
        return "has no place for a bias"
    return ""


def _of_other(net: Net, index: int, taken: Absorption) -> str:
    operator = net.graph.operators[index]
    if isinstance(operator, Norm):
        return "reads true units" if taken.input is not None else ""
    if not isinstance(operator, Affine) or index in net.kernels or operator.map is None:
        return "stores nothing"
    own = taken.around(operator.map)
    axis = taken.axis if operator.axis is None else operator.axis
    if axis is None:
        return "" if own.channels == 1 else "has one scale and shift, and no axis for more"
    if operator.axis is None and operator.form is Form.BOTH:
        return "is a scalar of an operator that has no axis"
    size = net.shapes[operator.inputs[0]][axis]
    return "" if own.channels in (1, size) else "has other channels"


def _unequal_uses(net: Net, plan: Plan) -> list[str]:
    """Weights that would have to be two things at once."""
    asked: dict[str, list[F64]] = {}
    wrong = []
    for index, operator in enumerate(net.graph.operators):
        if not isinstance(operator, Linear) or operator.weight is None:
            continue
        taken = plan.absorptions.get(index, NOTHING)
        rows = (taken.output or IDENTITY).expand(operator.out_channels).scale
        columns = (taken.input or IDENTITY).expand(operator.in_channels).scale
        scales = asked.setdefault(operator.weight.storage, [rows, columns])
        pairs = zip(scales, (rows, columns), strict=True)
        if not all(np.allclose(*pair, rtol=1e-12, atol=0) for pair in pairs):
            wrong.append(f"{operator.name} shares its weight with one that scales it otherwise")
    return wrong
