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

GEMMS = {
    **{f"Gemm C {list(c)}": replace(_FULL, bias=c)
       for c in [(), (1,), (4,), (1, 4), (5, 1), (5, 4), (1, 1)]},
    "Gemm without C": _PLAIN,
    'Gemm C ""': replace(_PLAIN, text='{y} = Gemm({x}, w, "")'),
    "Gemm alpha, without C": replace(_PLAIN, text="{y} = Gemm<alpha=-2.0>({x}, w)", alpha=-2.0),
    "Gemm beta 0": replace(_FULL, text="{y} = Gemm<beta=0.0>({x}, w, k)", alpha=1.0, beta=0.0),
    "Gemm transB": replace(_FULL, text=_FULL.text.replace("<", "<transB=1, "),
                           joins=gemm_transposed, w=(4, 3)),
    "Gemm transA": replace(_FULL, text=_FULL.text.replace("<", "<transA=1, "), x=(3, 5),
                           in_axis=0),
    "Gemm transA transB": replace(_PLAIN, text="{y} = Gemm<transA=1, transB=1>({x}, w)",
                                  joins=gemm_transposed, w=(4, 3), x=(3, 5), in_axis=0),
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
    "MatMul by a batch": replace(_RIGHT, w=(2, 4, 3), uniform=False),
    "MatMul by a batch, both": replace(_RIGHT, x=(2, 2, 5, 4), w=(2, 2, 4, 3), y=(2, 2, 5, 3),
                                       axis=3, in_axis=3, uniform=False),
    "MatMul from the left by a batch": replace(_LEFT, w=(2, 3, 4), uniform=False),
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
        if forward:
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
    node = next(
        n for n in proto.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    )
    adds = [n for n in proto.graph.node if n.op_type == "Add"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    weight = next(constants[name] for name in node.input[:2] if name in constants)
    biases = [constants[name] for name in node.input[2:] if name]
    biases += [constants[name] for add in adds for name in add.input if name in constants]
    assert len(biases) <= 1
    return weight, np.broadcast_to(bias_of(next(iter(biases), None), operator), operator.y)


def assert_exact(proto: onnx.ModelProto, operator: Operator, made: Made, *, forward: bool) -> None:
    """Weight and bias are the correctly rounded float64 fold, to the last bit."""
    weight, bias = held(proto, operator)
    right_weight, right_bias = expected(operator, made, forward=forward)
    np.testing.assert_array_equal(weight, right_weight)
    assert weight.tobytes() == right_weight.tobytes()
    np.testing.assert_array_equal(bias.astype(np.float32), right_bias.astype(np.float32))


def assert_folds(operator: Operator, made: Made, *, forward: bool) -> None:
    model, report = nets.folded(made.proto)
    assert nets.verdicts(report) == {"step": "forward" if forward else "backward"}
    assert_exact(model, operator, made, forward=forward)
    added = bool(operator.bare and made.t.any())
    assert sum(nets.operators(model).values()) == 1 + operator.nodes + added
    assert nets.runtime_says(model) == ""


ALL_STEPS: dict[str, Step | None] = {BN: None, **STEPS}
_FEW_STEPS = (BN, "Mul", "Add", "Sub left")  # by every operator; the others by a few of them
_FEW_OPERATORS = ("Conv 2, bias", "ConvTranspose grouped", "Gemm C [4]", "MatMul 3", "MatMul, Add")


def cases(*, forward: bool) -> Iterator[tuple[str, str]]:
    for (name, operator), (verb, step) in itertools.product(OPERATORS.items(), ALL_STEPS.items()):
        axis = operator.in_axis if forward else operator.axis
        fits = step is not None or axis == 1  # where a BatchNormalization has its channels
        is_the_bias = not forward and verb.startswith("Add") and _without_add(operator)
        if fits and not is_the_bias and (verb in _FEW_STEPS or name in _FEW_OPERATORS):
            yield name, verb


def _without_add(operator: Operator) -> bool:
    """An Add after such a MatMul is the bias of it, and no step."""
    return "MatMul" in operator.text and "Add" not in operator.text


@pytest.mark.parametrize(("operator", "step"), list(cases(forward=False)))
def test_step_after_a_linear_operator_folds_into_it(operator: str, step: str) -> None:
    made = make(OPERATORS[operator], ALL_STEPS[step], forward=False)
    assert_folds(OPERATORS[operator], made, forward=False)


@pytest.mark.parametrize(("operator", "step"), list(cases(forward=True)))
def test_step_before_a_linear_operator_folds_into_it_or_stays_for_the_right_reason(
    operator: str, step: str
) -> None:
    made = make(OPERATORS[operator], ALL_STEPS[step], forward=True)
    refusal = _refusal(OPERATORS[operator], made)
    if not refusal:
        assert_folds(OPERATORS[operator], made, forward=True)
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


@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward"])
@pytest.mark.parametrize("position", [1, 2], ids=["weight", "bias"])
def test_one_unit_in_the_last_place_is_seen(forward: bool, position: int) -> None:
    operator = OPERATORS["Conv 2, bias"]
    made = make(operator, None, forward=forward)
    model, _ = nets.folded(made.proto)
    assert_exact(model, operator, made, forward=forward)
    name = next(n for n in model.graph.node if n.op_type == "Conv").input[position]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = onnx.numpy_helper.to_array(tensor).copy()
    value.flat[-1] = np.nextafter(value.flat[-1], np.float32(np.inf))
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    with pytest.raises(AssertionError):
        assert_exact(model, operator, made, forward=forward)


TYPES = {"float": np.float32, "double": np.float64, "float16": np.float16}


@pytest.mark.parametrize("word", TYPES)
@pytest.mark.parametrize("bias", ["", ", k"], ids=["no bias", "bias"])
def test_both_sides_of_one_conv_are_rounded_once(word: str, bias: str) -> None:
    dtype, rng = TYPES[word], np.random.default_rng(5)
    constants = {
        "w": nets.weight(rng, 4, 3, 2, 2, dtype=dtype), "n": nets.weight(rng, 3, 1, 1, dtype=dtype),
        "o": nets.weight(rng, 4, 1, 1, dtype=dtype), "k": nets.weight(rng, 4, dtype=dtype),
    }  # fmt: skip
    text = (
        f"r = Relu(x) [i] a = Mul(r, n) [j] e = Sub(n, a) c = Conv(e, w{bias}) [o1] y = Mul(c, o)"
    )
    proto = nets.model(
        f"g ({word}[2,3,4,4] x) => ({word}[2,4,3,3] y) {{ {text} }}",
        {name: value for name, value in constants.items() if name in nets.words(text)},
    )
    model, report = nets.folded(proto, 1e-12 if word == "double" else 1e-2)
    assert set(nets.verdicts(report).values()) <= {"forward", "backward", "merged"}
    w, n, o, k = (constants[name].astype(np.float64) for name in "wnok")
    weight = w * o.reshape(-1, 1, 1, 1) * -n.reshape(1, -1, 1, 1)
    shift = (w * n.reshape(1, -1, 1, 1)).sum(axis=(1, 2, 3))
    total = (shift + (k if bias else 0)) * o.ravel()
    conv_node = next(node for node in model.graph.node if node.op_type == "Conv")
    held_weight, held_bias = (nets.constant(model, name) for name in conv_node.input[1:])
    np.testing.assert_array_equal(held_weight, weight.astype(dtype))
    if word == "double":
        np.testing.assert_allclose(held_bias, total, rtol=1e-13)
    else:
        np.testing.assert_array_equal(held_bias, total.astype(dtype))


@pytest.mark.parametrize("c", [(4,), (1, 4), (5, 4)], ids=str)
def test_gemm_of_version_6_says_that_its_bias_broadcasts(c: Index) -> None:
    rng = np.random.default_rng(0)
    constants = {"w": nets.weight(rng, 3, 4), "k": nets.weight(rng, *c), "s": nets.weight(rng, 4)}
    broadcast = int(c != (5, 4))
    proto = nets.model(
        f"""g (float[5,3] x) => (float[5,4] y) {{
            h = Gemm<alpha=0.5, beta=2.0, broadcast={broadcast}>(x, w, k)
            [step] y = Mul<broadcast=1>(h, s) }}""",
        constants, opset=6,
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.verdicts(result.report) == {"step": "backward"}
    attributes = {a.name: a.i or a.f for a in result.model.graph.node[0].attribute}
    assert attributes["alpha"] == 0.5
    assert "beta" not in attributes
    w, k, s = (constants[name].astype(np.float64) for name in "wks")
    folded = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_array_equal(folded["w"], (w * s).astype(np.float32))
    bias = folded[result.model.graph.node[0].input[2]]
    assert attributes["broadcast"] == 1 or bias.shape == (5, 4)
    wanted = np.broadcast_to((2 * k * s).astype(np.float32), (5, 4))
    np.testing.assert_array_equal(np.broadcast_to(bias, (5, 4)), wanted)


# ---- BatchNormalization in every version ----

VERSIONS = {
    "1": (1, "<consumed_inputs=[0,0,0,1,1], is_test=1>"),
    "1 with spatial": (1, "<consumed_inputs=[0,0,0,1,1], is_test=1, spatial=1>"),
    "6": (6, "<is_test=1>"),
    "6 with momentum": (6, "<is_test=1, momentum=0.5>"),
    "7": (7, ""),
    "7 with spatial": (7, "<spatial=1>"),
    "9": (9, "<momentum=0.5>"),
    "14": (14, "<training_mode=0>"),
    "15": (15, ""),
    "21": (21, "<epsilon=0.001>"),
}


@pytest.mark.parametrize(("opset", "attributes"), VERSIONS.values(), ids=VERSIONS.keys())
def test_every_version_of_batchnorm_folds(opset: int, attributes: str) -> None:
    rng = np.random.default_rng(opset)
    constants = {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "n", 4)}
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{
            c = Conv(x, w) [bn] y = {BN}{attributes}(c, n_g, n_b, n_m, n_v) }}""",
        constants, opset=opset, ir=3 if opset < 7 else 8,
    )  # fmt: skip
    if opset < 7:
        nets.declare_initializers(proto)
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.verdicts(result.report) == {"bn": "backward"}
    # No runtime takes the oldest versions: our own formula, on the weights and on data.
    epsilon = float(np.float32(0.001 if "epsilon" in attributes else 1e-5))
    g, b, m, v = (constants[f"n_{p}"].astype(np.float64) for p in "gbmv")
    w = constants["w"].astype(np.float64)[:, :, 0, 0]
    folded, bias = (nets.constant(result.model, name) for name in ("w", "w_bias"))
    x = rng.normal(0, 1, (2, 3, 4, 4))
    y = np.einsum("mc,nchw->nhwm", w, x)
    before = g * (y - m) / np.sqrt(v + epsilon) + b
    after = np.einsum("mc,nchw->nhwm", folded[:, :, 0, 0].astype(np.float64), x) + bias
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    exact = (w * (g / np.sqrt(v + epsilon))[:, None]).astype(np.float32)
    np.testing.assert_array_equal(folded[:, :, 0, 0], exact)


UNTOUCHED = {
    "1, is_test not given": (1, "<consumed_inputs=[0,0,0,1,1]>", "BNF001"),
    "6, is_test 0": (6, "<is_test=0>", "BNF001"),
    "6, spatial 0": (6, "<is_test=1, spatial=0>", "BNF006"),
    "7, spatial 0": (7, "<spatial=0>", "BNF006"),
}


@pytest.mark.parametrize(("opset", "attributes", "code"), UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_old_batchnorm_that_is_another_formula_stays(
    opset: int, attributes: str, code: str
) -> None:
    rng = np.random.default_rng(opset)
    proto = nets.model(
        f"""g (float[2,3,1,1] x) => (float[2,4,1,1] y) {{
            c = Conv(x, w) [bn] y = {BN}{attributes}(c, n_g, n_b, n_m, n_v) }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "n", 4)}, opset=opset,
    )  # fmt: skip
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"bn": code}


def test_spatial_0_has_one_set_of_statistics_a_position() -> None:
    rng = np.random.default_rng(0)
    parameters = {name: value.reshape(2, 2, 1) for name, value in
                  nets.batch_norm(rng, "n", 4).items()}  # fmt: skip
    proto = nets.model(
        f"""g (float[2,3,2,1] x) => (float[2,2,2,1] y) {{
            c = Conv(x, w) [bn] y = {BN}<spatial=0>(c, n_g, n_b, n_m, n_v) }}""",
        {"w": nets.weight(rng, 2, 3, 1, 1), **parameters}, opset=7,
    )  # fmt: skip
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"bn": "BNF006"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_epsilon_that_is_not_given_is_the_float32_of_the_schema(dtype: type) -> None:
    # With a variance of 0 nothing else is under the root: 1e-5 in float64 is another number.
    word = np.dtype(dtype).name.replace("float32", "float").replace("float64", "double")
    one: nets.Array = np.ones(2, dtype)
    zero: nets.Array = np.zeros(2, dtype)
    proto = nets.model(
        f"""g ({word}[2,2,1,1] x) => ({word}[2,2,1,1] y) {{
            c = Conv(x, w) [bn] y = {BN}(c, one, zero, zero, zero) }}""",
        {"w": np.ones((2, 2, 1, 1), dtype), "one": one, "zero": zero},
    )
    model, _ = nets.folded(proto, 1e-12 if dtype is np.float64 else 1e-7)
    right: nets.Array = np.full((2, 2, 1, 1), 1 / np.sqrt(EPSILON)).astype(dtype)
    np.testing.assert_array_equal(nets.constant(model, "w"), right)


# ---- Mul, Add, Sub, Div up to version 6: broadcast and axis are attributes ----

OLD = {
    "channels on axis 1": ("<broadcast=1, axis=1>", (4,), "backward"),
    "channels and more axes": ("<broadcast=1, axis=1>", (4, 1, 1), "backward"),
    "a scalar": ("<broadcast=1>", (), "backward"),
    "a scalar of rank 1": ("<broadcast=1>", (1,), "backward"),
    "the last axis": ("<broadcast=1>", (4,), "BNF006"),
    "axis 2": ("<broadcast=1, axis=2>", (4,), "BNF006"),
    "axis 3": ("<broadcast=1, axis=3>", (4,), "BNF006"),
}


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize(("attributes", "shape", "verdict"), OLD.values(), ids=OLD.keys())
def test_old_broadcasting_says_where_the_constant_lies(
    operator: str, attributes: str, shape: Index, verdict: str
) -> None:
    rng = np.random.default_rng(0)
    constants = {"w": nets.weight(rng, 4, 3, 1, 1), "b": nets.weight(rng, 4),
                 "k": nets.weight(rng, *shape)}  # fmt: skip
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{
            c = Conv(x, w, b) [s] y = {operator}{attributes}(c, k) }}""",
        constants, opset=6,
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    assert nets.verdicts(result.report) == {"s": verdict}
    if verdict != "backward":
        assert nets.same(proto, result.model)
        return
    onnx.checker.check_model(result.model, full_check=True)
    w, b, k = (constants[name].astype(np.float64).reshape(-1) for name in "wbk")
    maps = {"Mul": (k, 0 * k), "Add": (k**0, k), "Sub": (k**0, -k), "Div": (1 / k, 0 * k)}
    a, t = maps[operator]
    rows = (w.reshape(4, 3) * a.reshape(-1, 1)).astype(np.float32)
    np.testing.assert_array_equal(nets.constant(result.model, "w").reshape(4, 3), rows)
    np.testing.assert_array_equal(nets.constant(result.model, "b"), (b * a + t).astype(np.float32))


# ---- chains ----

CHAINS: dict[str, tuple[str, dict[str, str], dict[str, int]]] = {
    "all into the Conv before": (
        "c = Conv(x, w) [a] d = {bn1} [b] e = Mul(d, k) [s] f = Sub(k, e) [n] y = Neg(f)",
        {"a": "backward", "b": "backward", "s": "backward", "n": "backward"}, {"Conv": 1},
    ),
    "all into the Conv after": (
        "r = Relu(x4) [a] d = {bn2} [b] e = Mul(k, d) [s] f = Add(e, k) y = Conv(f, v)",
        {"a": "forward", "b": "forward", "s": "forward"}, {"Relu": 1, "Conv": 1},
    ),
    "backward first, forward where that is barred": (
        """c = Conv(x, w, bias) [a] d = Mul(c, k) e = Conv<pads=[1,1,1,1]>(d, u) f = Relu(e)
           [b] h = Mul(f, k) y = Conv(h, v2)""",
        {"a": "backward", "b": "forward"}, {"Conv": 3, "Relu": 1},
    ),
    "through Identity and Dropout": (
        """c = Conv(x, w) i = Identity(c) d = Dropout(i) [a] e = {bn3} j = Identity(e)
           [b] y = Mul(j, k)""",
        {"a": "backward", "b": "backward"}, {"Conv": 1, "Identity": 2, "Dropout": 1},
    ),
    "forward through Identity and Dropout": (
        """r = Relu(x4) [a] d = {bn2} i = Identity(d) [b] e = Mul(i, k) j = Dropout(e)
           y = Conv(j, v)""",
        {"a": "forward", "b": "forward"}, {"Relu": 1, "Identity": 1, "Dropout": 1, "Conv": 1},
    ),
    "between Relus, Mul and Mul are one": (
        "r = Relu(x4) [a] d = Mul(r, k) [b] e = Mul(k, d) y = Relu(e)",
        {"a": "merged", "b": "BNF020"}, {"Relu": 2, "Mul": 1},
    ),
    "between Relus, Add and Sub are one": (
        "r = Relu(x4) [a] d = Add(r, k) [b] e = Sub(d, k2) y = Relu(e)",
        {"a": "merged", "b": "BNF020"}, {"Relu": 2, "Add": 1},
    ),
    "between Relus, Mul and Add stay two": (
        "r = Relu(x4) [a] d = Mul(r, k) [b] e = Add(d, k) y = Relu(e)",
        {"a": "BNF018", "b": "BNF017"}, {"Relu": 2, "Mul": 1, "Add": 1},
    ),
    "between Relus, all merge into a BatchNorm": (
        """r = Relu(x4) [m] b0 = Mul(r, k) [a] d = {bn0} [b] e = Mul(d, k) [s] f = Add(e, k)
           y = Relu(f)""",
        {"m": "merged", "a": "BNF018", "b": "merged", "s": "merged"},
        {"Relu": 2, BN: 1},
    ),
    "two BatchNorms between Relus are one": (
        "r = Relu(x4) [a] d = {bn2} [b] e = {bn4} y = Relu(e)",
        {"a": "merged", "b": "BNF018"}, {"Relu": 2, BN: 1},
    ),
    "what undoes itself is gone": (
        """r = Relu(x4) [a] d = Mul(r, k) [b] e = Div(d, k) [s] f = Neg(e) [n] h = Neg(f)
           y = Relu(h)""",
        {}, {"Relu": 2},
    ),
    "a scalar joins channels": (
        "r = Relu(x4) [a] d = Mul(r, two) [b] e = Mul(d, k) y = Relu(e)",
        {"a": "merged", "b": "BNF020"}, {"Relu": 2, "Mul": 1},
    ),
    "channels join a scalar": (
        "r = Relu(x4) [a] d = Mul(r, k) [b] e = Mul(two, d) y = Relu(e)",
        {"a": "merged", "b": "BNF020"}, {"Relu": 2, "Mul": 1},
    ),
    "two axes never merge": (
        "r = Relu(x4) [a] d = Mul(r, k) [b] e = Mul(d, row) y = Relu(e)",
        {"a": "BNF018", "b": "BNF018"}, {"Relu": 2, "Mul": 2},
    ),
    "a padded Conv takes the scale, not the shift": (
        "r = Relu(x4) [a] d = Add(r, k) [b] e = Mul(d, k) y = Conv<pads=[1,1,1,1]>(e, u)",
        {"a": "BNF010", "b": "forward"}, {"Relu": 1, "Add": 1, "Conv": 1},
    ),
    "shared bias": (
        """c = Conv(x4, v, bias) [a] d = Mul(c, k) e = Conv<pads=[1,1,1,1]>(d, u, bias)
           [b] y = {bn4}""",
        {"a": "backward", "b": "backward"}, {"Conv": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "verdicts", "left"), CHAINS.values(), ids=CHAINS.keys())
def test_chains_fold_to_the_fixpoint(
    body: str, verdicts: dict[str, str], left: dict[str, int]
) -> None:
    rng = np.random.default_rng(0)
    data = {"bn0": "b0", "bn1": "c", "bn2": "r", "bn3": "d", "bn4": "d"}
    if "(d, u, bias)" in body:
        data["bn4"] = "e"
    text = body.format(**{k: f"{BN}({v}, n_g, n_b, n_m, n_v)" for k, v in data.items()})
    four = {name: nets.weight(rng, 4, 4, 1, 1) for name in ("v", "v2")}
    constants = {
        **four, "w": nets.weight(rng, 4, 3, 1, 1), "u": nets.weight(rng, 4, 4, 3, 3),
        "k": nets.weight(rng, 4, 1, 1), "k2": nets.weight(rng, 4, 1, 1),
        "row": nets.weight(rng, 4), "two": np.array([2], np.float32), "bias": nets.weight(rng, 4),
        **nets.batch_norm(rng, "n", 4),
    }  # fmt: skip
    words = nets.words(text)
    used = {name: value for name, value in constants.items() if name in words}
    x = "float[2,4,4,4] x4" if "x4" in text else "float[2,3,4,4] x"
    proto = nets.model(f"g ({x}) => (float[2,4,4,4] y) {{ {text} }}", used)
    model, report = nets.folded(proto)
    assert nets.operators(model) == left
    assert nets.verdicts(report) == verdicts or not verdicts
    assert nets.runtime_says(model) == ""


# ---- chains drawn by chance ----

IMAGE_STEPS = {
    "bn": "{y} = BatchNormalization({x}, {k}_g, {k}_b, {k}_m, {k}_v)",
    "mul": "{y} = Mul({x}, {k}_c)", "mul left": "{y} = Mul({k}_c, {x})",
    "add": "{y} = Add({x}, {k}_c)", "sub": "{y} = Sub({x}, {k}_c)",
    "sub left": "{y} = Sub({k}_c, {x})", "div": "{y} = Div({x}, {k}_c)", "neg": "{y} = Neg({x})",
    "mul scalar": "{y} = Mul({x}, {k}_1)", "add scalar": "{y} = Add({k}_1, {x})",
    "identity": "{y} = Identity({x})", "dropout": "{y} = Dropout({x})",
    "relu": "{y} = Relu({x})", "sum": "{k}_r = Relu({x}) {y} = Add({x}, {k}_r)",
    "conv": "{y} = Conv({x}, {k}_w)", "conv bias": "{y} = Conv({x}, {k}_w, {k}_s)",
    "conv padded": "{y} = Conv<pads=[1,1,1,1]>({x}, {k}_w3, {k}_s)",
    "conv depthwise": "{y} = Conv<group=4>({x}, {k}_d)",
    "conv grouped": "{y} = Conv<group=2>({x}, {k}_h, {k}_s)",
    "conv transposed": "{y} = ConvTranspose({x}, {k}_w)",
    "conv transposed wide": "{y} = ConvTranspose<pads=[1,1,1,1]>({x}, {k}_w3)",
    "conv transposed grouped": "{y} = ConvTranspose<group=2>({x}, {k}_h)",
    "two readers": "{k}_p = Conv({x}, {k}_w) {k}_q = Conv({x}, {k}_w2, {k}_s) "
    "{y} = Max({k}_p, {k}_q)",
    "same weight": "{k}_p = Conv({x}, {k}_w) {y} = Conv({k}_p, {k}_w, {k}_s)",
}  # fmt: skip

ROW_STEPS = {
    "mul": "{y} = Mul({x}, {k}_s)", "mul left": "{y} = Mul({k}_s, {x})",
    "add": "{y} = Add({x}, {k}_s)", "sub": "{y} = Sub({x}, {k}_s)",
    "sub left": "{y} = Sub({k}_s, {x})", "div": "{y} = Div({x}, {k}_s)", "neg": "{y} = Neg({x})",
    "mul by columns": "{y} = Mul({x}, {k}_u)", "add scalar": "{y} = Add({k}_1, {x})",
    "identity": "{y} = Identity({x})", "relu": "{y} = Relu({x})",
    "matmul": "{y} = MatMul({x}, {k}_o)", "matmul left": "{y} = MatMul({k}_o, {x})",
    "matmul add": "{k}_p = MatMul({x}, {k}_o) {y} = Add({k}_s, {k}_p)",
    "two readers": "{k}_p = MatMul({x}, {k}_o) {k}_q = MatMul({x}, {k}_o2) {y} = Max({k}_p, {k}_q)",
}  # fmt: skip

FLAT_STEPS = {
    **ROW_STEPS,
    "bn": IMAGE_STEPS["bn"],
    "gemm": "{y} = Gemm<alpha=0.5, beta=2.0>({x}, {k}_o, {k}_s)",
    "gemm bare": "{y} = Gemm({x}, {k}_o)",
    "gemm transposed": "{y} = Gemm<transA=1, transB=1>({x}, {k}_o, {k}_u)",
}

WORLDS = {"image": (IMAGE_STEPS, (2, 4, 3, 3)), "rows": (ROW_STEPS, (2, 4, 4)),
          "flat": (FLAT_STEPS, (4, 4))}  # fmt: skip


def chain(world: str, steps: list[str], seed: int, also: frozenset[int]) -> onnx.ModelProto:
    """A model in double of the steps, with constants of its own for each.

    ``also`` are the steps whose result is an output of the model, too.
    """
    rng = np.random.default_rng(seed)
    table, shape = WORLDS[world]
    shapes = {"w": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "w3": (4, 4, 3, 3), "d": (4, 1, 1, 1),
              "h": (4, 2, 1, 1), "c": (4, 1, 1), "s": (4,), "u": (4, 1), "o": (4, 4),
              "o2": (4, 4), "1": ()}  # fmt: skip
    lines: list[str] = []
    constants: dict[str, nets.Array] = {}
    for i, step in enumerate(steps):
        lines.append(table[step].format(x=f"t{i}", y=f"t{i + 1}", k=f"k{i}"))
        made = {f"k{i}_{key}": rng.uniform(0.5, 2, dims) * rng.choice([-1, 1], dims)
                for key, dims in shapes.items()}  # fmt: skip
        made |= nets.batch_norm(rng, f"k{i}", 4, np.float64)
        words = nets.words(lines[-1])
        constants |= {name: np.asarray(value) for name, value in made.items() if name in words}
    typed = f"double[{','.join(map(str, shape))}]"
    ends = ", ".join(f"{typed} t{i}" for i in sorted({*also, len(steps)}))
    return nets.model(f"g ({typed} t0) => ({ends}) {{ {' '.join(lines)} }}", constants)


@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_chain_says_the_same_and_folds_once_and_for_all(
    world: str, data: st.DataObject
) -> None:
    table, _ = WORLDS[world]
    steps = data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=9))
    also = data.draw(st.frozensets(st.integers(1, len(steps)), max_size=1))
    proto = chain(world, steps, data.draw(st.integers(0, 9)), also)
    model, report = nets.folded(proto, 1e-9)
    assert sum(nets.operators(model).values()) <= sum(nets.operators(proto).values())
    again = bnfold.fold(model)
    assert not again.report.folded
    assert nets.same(model, again.model)
    assert len(again.report.kept) == len(report.kept)
