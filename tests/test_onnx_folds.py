"""Every fold, operator by operator: the weights are the correctly rounded float64 fold.

The expected weights come from one naive formula, element by element: ``W' = a_out W a_in``, where
a function for each operator says which channels an element of its weight joins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bnfold
from tests import nets

F64 = NDArray[np.float64]
Index = tuple[int, ...]
Joined = Iterator[tuple[Index, int, int]]  # place in the weight, input channel, output channel

BN = "BatchNormalization"
EPSILON = float(np.float32(1e-5))  # an attribute is a float32, the default in the schema too


# ---- which channels an element of a weight joins ----


def conv(shape: Index, groups: int) -> Joined:
    for m, j in itertools.product(range(shape[0]), range(shape[1])):
        yield (m, j), m // (shape[0] // groups) * shape[1] + j, m


def transposed(shape: Index, groups: int) -> Joined:
    for c, j in itertools.product(range(shape[0]), range(shape[1])):
        yield (c, j), c, c // (shape[0] // groups) * shape[1] + j


def gemm(shape: Index, groups: int) -> Joined:
    del groups
    for k, n in np.ndindex(*shape):
        yield (k, n), k, n


def gemm_transposed(shape: Index, groups: int) -> Joined:
    del groups
    for n, k in np.ndindex(*shape):
        yield (n, k), k, n


def matmul(shape: Index, groups: int) -> Joined:
    del groups
    for at in np.ndindex(*shape):
        yield at, at[-2], at[-1]


def matmul_from_the_left(shape: Index, groups: int) -> Joined:
    del groups
    for at in np.ndindex(*shape):
        yield at, at[-1], at[-2]


# ---- the linear operators ----


@dataclass(frozen=True, slots=True)
class Operator:
    """A linear operator in one setting, with constants ``w`` and, of shape ``bias``, ``k``.

    ``axis`` and ``in_axis`` are those of the channels in ``y`` and ``x``. ``uniform``: a shift
    of ``x`` reaches all of ``y``. ``bare``: a shift needs an Add of its own.
    """

    text: str
    joins: Callable[[Index, int], Joined]
    x: Index
    w: Index
    y: Index
    axis: int = 1
    in_axis: int = 1
    groups: int = 1
    bias: Index | None = None
    alpha: float = 1.0
    beta: float = 1.0
    uniform: bool = True
    bare: bool = False
    nodes: int = 1


def images(name: str, head: str, joins: Callable[[Index, int], Joined], x: Index, w: Index,
           y: Index, groups: int = 1, uniform: bool = True) -> dict[str, Operator]:  # fmt: skip
    """Without a bias, with one, and with one given as ""."""
    bare = Operator(f"{{y}} = {head}({{x}}, w)", joins, x, w, y, groups=groups, uniform=uniform)
    return {
        name: bare,
        f"{name}, bias": replace(bare, text=f"{{y}} = {head}({{x}}, w, k)", bias=(y[1],)),
        f'{name}, ""': replace(bare, text=f'{{y}} = {head}({{x}}, w, "")'),
    }


CONVS = {
    **images("Conv 1", "Conv", conv, (2, 3, 5), (4, 3, 2), (2, 4, 4)),
    **images("Conv 2", "Conv<strides=[2,1]>", conv, (2, 3, 5, 6), (4, 3, 3, 2), (2, 4, 2, 5)),
    **images("Conv 3", "Conv<dilations=[1,2,1]>", conv, (1, 2, 4, 5, 3), (3, 2, 2, 2, 1),
             (1, 3, 3, 3, 3)),
    **images("Conv grouped", "Conv<group=2>", conv, (2, 6, 4, 4), (4, 3, 1, 1), (2, 4, 4, 4), 2),
    **images("Conv depthwise", "Conv<group=3>", conv, (2, 3, 4, 4), (3, 1, 2, 2), (2, 3, 3, 3), 3),
    **images("Conv depthwise, two each", "Conv<group=4>", conv, (2, 4, 4, 4), (8, 1, 3, 3),
             (2, 8, 2, 2), 4),
    **images("Conv padded", "Conv<pads=[1,0,1,2]>", conv, (2, 3, 4, 4), (4, 3, 3, 3),
             (2, 4, 4, 4), uniform=False),
    **images("ConvTranspose 1", "ConvTranspose", transposed, (2, 3, 4), (3, 4, 1), (2, 4, 4)),
    **images("ConvTranspose 2", "ConvTranspose<strides=[1,1]>", transposed, (2, 4, 4, 3),
             (4, 4, 1, 1), (2, 4, 4, 3)),
    **images("ConvTranspose grouped", "ConvTranspose<group=2>", transposed, (2, 6, 3, 3),
             (6, 2, 1, 1), (2, 4, 3, 3), 2),
    **images("ConvTranspose depthwise", "ConvTranspose<group=4>", transposed, (2, 4, 3, 3),
             (4, 1, 1, 1), (2, 4, 3, 3), 4),
    **images("ConvTranspose 3", "ConvTranspose", transposed, (1, 2, 2, 2, 2), (2, 3, 2, 1, 2),
             (1, 3, 3, 2, 3), uniform=False),
    **images("ConvTranspose output_padding",
             "ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>", transposed,
             (2, 3, 3, 3), (3, 4, 3, 3), (2, 4, 6, 6), uniform=False),
    **images("ConvTranspose grouped, output_padding",
             "ConvTranspose<group=2, strides=[2,2], output_padding=[1,0]>", transposed,
             (2, 4, 3, 3), (4, 3, 2, 2), (2, 6, 7, 6), 2, uniform=False),
}  # fmt: skip

_PLAIN = Operator("{y} = Gemm({x}, w)", gemm, (5, 3), (3, 4), (5, 4))
_FULL = replace(_PLAIN, text="{y} = Gemm<alpha=0.75, beta=-1.5>({x}, w, k)", alpha=0.75,
                beta=-1.5, bias=(4,))  # fmt: skip
_TRANS_B = {"joins": gemm_transposed, "w": (4, 3)}
_TRANS_A = {"x": (3, 5), "in_axis": 0}

GEMMS = {
    **{f"Gemm C {list(c)}": replace(_FULL, bias=c)
       for c in [(), (1,), (4,), (1, 4), (5, 1), (5, 4), (1, 1)]},
    "Gemm without C": _PLAIN,
    'Gemm C ""': replace(_PLAIN, text='{y} = Gemm({x}, w, "")'),
    "Gemm alpha, without C": replace(_PLAIN, text="{y} = Gemm<alpha=-2.0>({x}, w)", alpha=-2.0),
    "Gemm beta 0": replace(_FULL, text="{y} = Gemm<beta=0.0>({x}, w, k)", alpha=1.0, beta=0.0),
    "Gemm transB": replace(_FULL, text=_FULL.text.replace("<", "<transB=1, "), **_TRANS_B),
    "Gemm transA": replace(_FULL, text=_FULL.text.replace("<", "<transA=1, "), **_TRANS_A),
    "Gemm transA transB": replace(_PLAIN, text="{y} = Gemm<transA=1, transB=1>({x}, w)",
                                  **_TRANS_A, **_TRANS_B),
    "Gemm square": replace(_FULL, x=(4, 4), w=(4, 4), y=(4, 4)),
    "Gemm square C": replace(_FULL, x=(4, 4), w=(4, 4), y=(4, 4), bias=(4, 1)),
}  # fmt: skip

_RIGHT = Operator("{y} = MatMul({x}, w)", matmul, (2, 5, 4), (4, 3), (2, 5, 3), 2, 2, bare=True)
_LEFT = Operator("{y} = MatMul(w, {x})", matmul_from_the_left, (2, 4, 5), (3, 4), (2, 3, 5),
                 bare=True)  # fmt: skip
_ADDED = replace(_RIGHT, text="{y}_0 = MatMul({x}, w) {y} = Add({y}_0, k)", bias=(3,), bare=False,
                 nodes=2)  # fmt: skip

MATMULS = {
    "MatMul 2": replace(_RIGHT, x=(5, 4), y=(5, 3), axis=1, in_axis=1, bare=False),
    "MatMul 3": _RIGHT,
    "MatMul 4": replace(_RIGHT, x=(2, 2, 5, 4), y=(2, 2, 5, 3), axis=3, in_axis=3),
    "MatMul by a batch of one": replace(_RIGHT, w=(1, 4, 3)),
    "MatMul by a batch of one more": replace(_RIGHT, w=(1, 1, 4, 3), y=(1, 2, 5, 3), axis=3),
    "MatMul that widens": replace(_RIGHT, w=(4, 6), y=(2, 5, 6)),
    "MatMul from the left 2": replace(_LEFT, x=(4, 5), y=(3, 5), axis=0, in_axis=0),
    "MatMul from the left 3": _LEFT,
    "MatMul from the left 4": replace(_LEFT, x=(2, 2, 4, 5), y=(2, 2, 3, 5), axis=2, in_axis=2),
    "MatMul, Add": _ADDED,
    "MatMul, Add 2": replace(_ADDED, x=(5, 4), y=(5, 3), axis=1, in_axis=1),
    "MatMul, Add of another rank": replace(_ADDED, bias=(1, 1, 3)),
    "MatMul, Add of a scalar": replace(_ADDED, bias=()),
    "MatMul, Add of [1]": replace(_ADDED, bias=(1,)),
    "MatMul, Add on the left": replace(_ADDED, text="{y}_0 = MatMul({x}, w) {y} = Add(k, {y}_0)"),
    "MatMul from the left, Add": replace(
        _LEFT, text="{y}_0 = MatMul(w, {x}) {y} = Add({y}_0, k)", bias=(3, 1), bare=False, nodes=2
    ),
}  # fmt: skip

OPERATORS = {**CONVS, **GEMMS, **MATMULS}


# ---- the steps ----


@dataclass(frozen=True, slots=True)
class Step:
    """``y = a x + t``, with ``a`` and ``t`` from the constant ``s`` by ``formula``."""

    text: str
    formula: Callable[[F64], tuple[F64, F64]]
    scalar: Index | None = None


STEPS = {
    "Mul": Step("Mul({x}, s)", lambda s: (s, 0 * s)),
    "Mul left": Step("Mul(s, {x})", lambda s: (s, 0 * s)),
    "Mul scalar": Step("Mul({x}, s)", lambda s: (s, 0 * s), ()),
    "Mul [1]": Step("Mul(s, {x})", lambda s: (s, 0 * s), (1,)),
    "Add": Step("Add({x}, s)", lambda s: (s**0, s)),
    "Add left": Step("Add(s, {x})", lambda s: (s**0, s)),
    "Add scalar": Step("Add({x}, s)", lambda s: (s**0, s), ()),
    "Sub": Step("Sub({x}, s)", lambda s: (s**0, -s)),
    "Sub left": Step("Sub(s, {x})", lambda s: (-(s**0), s)),
    "Sub left scalar": Step("Sub(s, {x})", lambda s: (-(s**0), s), ()),
    "Div": Step("Div({x}, s)", lambda s: (1 / s, 0 * s)),
    "Div scalar": Step("Div({x}, s)", lambda s: (1 / s, 0 * s), ()),
    "Neg": Step("Neg({x})", lambda s: (-(s**0), 0 * s), ()),
}


@dataclass(frozen=True, slots=True)
class Made:
    """A net of one linear operator and one step, which is ``a x + t`` per channel."""

    proto: onnx.ModelProto
    constants: dict[str, nets.Array]
    a: F64
    t: F64


def make(operator: Operator, step: Step | None, *, forward: bool) -> Made:
    """``step`` (None: a BatchNorm) before (``forward``) or after ``operator``."""
    rng = np.random.default_rng([forward, *operator.w])
    shape, axis = (operator.x, operator.in_axis) if forward else (operator.y, operator.axis)
    constants = {"w": nets.weight(rng, *operator.w)}
    if operator.bias is not None:
        constants["k"] = nets.weight(rng, *operator.bias)
    if step is None:
        text = f"{BN}({{x}}, n_g, n_b, n_m, n_v)"
        constants |= nets.batch_norm(rng, "n", shape[axis])
        g, b, m, v = (constants[f"n_{p}"].astype(np.float64) for p in "gbmv")
        a = g / np.sqrt(v + EPSILON)
        t = b - m * a
    else:
        text, along = step.text, (shape[axis], *[1] * (len(shape) - axis - 1))
        s = nets.weight(rng, *(along if step.scalar is None else step.scalar))
        constants |= {"s": s} if "Neg" not in text else {}
        a, t = (np.broadcast_to(v.ravel(), shape[axis]) for v in step.formula(s.astype(np.float64)))
    bodies = [f"[step] {{y}} = {text}", operator.text]
    first, second = bodies if forward else reversed(bodies)
    body = f"{first.format(x='r', y='b')} {second.format(x='b', y='y')}"
    x, y = (",".join(map(str, dims)) for dims in (operator.x, operator.y))
    text = f"g (float[{x}] x) => (float[{y}] y) {{ r = Relu(x) {body} }}"
    return Made(nets.model(text, constants), constants, a, t)


def expected(operator: Operator, made: Made, *, forward: bool) -> tuple[nets.Array, F64]:
    """The folded weight in float32, and the folded bias in float64, broadcast over the output."""
    wide = made.constants["w"].astype(np.float64)
    result, moved = np.empty_like(wide), np.zeros(operator.y[operator.axis])
    for at, c, m in operator.joins(operator.w, operator.groups):
        result[at] = wide[at] * (made.a[c] if forward else made.a[m])
        moved[m] += operator.alpha * np.sum(wide[at]) * made.t[c]
    lies = [1] * len(operator.y)
    lies[operator.axis] = -1
    before = operator.beta * bias_of(made.constants.get("k"), operator)
    if forward:
        return result.astype(np.float32), np.broadcast_to(before + moved.reshape(lies), operator.y)
    after = np.broadcast_to(before, operator.y) * made.a.reshape(lies) + made.t.reshape(lies)
    return result.astype(np.float32), after


def bias_of(stored: nets.Array | None, operator: Operator) -> F64:
    """A bias in float64, shaped to broadcast against the output."""
    if stored is None:
        return np.zeros(1)
    wide = stored.astype(np.float64)
    return wide.reshape(-1, *[1] * (len(operator.y) - 2)) if "Conv" in operator.text else wide


def held(proto: onnx.ModelProto, operator: Operator) -> tuple[nets.Array, F64]:
    """The weight of the linear node, and the bias that it or the Add after it holds."""
    node = next(n for n in proto.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    adds = [n for n in proto.graph.node if n.op_type == "Add"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    weight = next(constants[name] for name in node.input[:2] if name in constants)
    biases = [constants[name] for name in node.input[2:] if name]
    biases += [constants[name] for add in adds for name in add.input if name in constants]
    assert len(biases) <= 1
    return weight, np.broadcast_to(bias_of(next(iter(biases), None), operator), operator.y)


def assert_folds(operator: Operator, made: Made, *, forward: bool) -> None:
    model, report = nets.folded(made.proto)
    assert nets.verdicts(report) == {"step": "forward" if forward else "backward"}
    weight, bias = held(model, operator)
    right_weight, right_bias = expected(operator, made, forward=forward)
    np.testing.assert_array_equal(weight, right_weight)
    assert weight.tobytes() == right_weight.tobytes()
    np.testing.assert_array_equal(bias.astype(np.float32), right_bias.astype(np.float32))
    added = bool(operator.bare and made.t.any())
    assert sum(nets.operators(model).values()) == 1 + operator.nodes + added
    assert nets.runtime_says(model) == ""


def fits(operator: Operator, step: Step | None, *, forward: bool) -> bool:
    """Whether the step can stand there at all: the channels of a BatchNorm are on axis 1."""
    axis = operator.in_axis if forward else operator.axis
    return step is not None or axis == 1


ALL_STEPS: dict[str, Step | None] = {BN: None, **STEPS}


@pytest.mark.parametrize("step", ALL_STEPS.values(), ids=ALL_STEPS.keys())
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_step_after_a_linear_operator_folds_into_it(
    operator: Operator, step: Step | None
) -> None:
    if fits(operator, step, forward=False) and not _is_the_bias(operator, step):
        assert_folds(operator, make(operator, step, forward=False), forward=False)


def _is_the_bias(operator: Operator, step: Step | None) -> bool:
    """An Add after a MatMul is the bias of it, and no step."""
    return operator.bare and step is not None and step.text.startswith("Add")


@pytest.mark.parametrize("step", ALL_STEPS.values(), ids=ALL_STEPS.keys())
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_step_before_a_linear_operator_folds_into_it_or_stays_for_the_right_reason(
    operator: Operator, step: Step | None
) -> None:
    if not fits(operator, step, forward=True):
        return
    made = make(operator, step, forward=True)
    refusal = _refusal(operator, made)
    if not refusal:
        assert_folds(operator, made, forward=True)
        return
    model, report = nets.folded(made.proto)
    assert nets.same(made.proto, model)
    assert nets.verdicts(report) == {"step": refusal}


def _refusal(operator: Operator, made: Made) -> str:
    if not made.t.any():
        return ""
    if not operator.uniform:
        return "BNF010"
    widens = operator.y[operator.axis] > operator.x[operator.in_axis]
    return "BNF012" if operator.bare and (widens or (made.a == 1).all()) else ""
