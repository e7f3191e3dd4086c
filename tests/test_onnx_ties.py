"""What is stated about element-wise operators, sums and products is true."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from bnfold.channel_graph import Link, Product, Sum, Tie
from bnfold.index_maps import along, same_axes
from bnfold.onnx_facts import Facts
from bnfold.onnx_rules import Rule, Way
from bnfold.onnx_ties import TABLE, find_tie
from tests import nets, test_onnx_moves, test_onnx_norms, test_onnx_parts, test_onnx_pooling
from tests.tie_nets import (
    IMAGE,
    NCHW,
    TWO,
    A,
    E,
    P,
    Row,
    Z,
    agrees,
    holds,
    net,
    of_last_node,
    only,
)

MASK = "float[2,4,4,6] x, float[2,4,4,6] z, bool[2,4,4,6] m"


def random(*shape: int, seed: int = 5) -> nets.Array:
    return np.random.default_rng(seed).normal(0, 1, shape)


ANY_RANK = {"x": random(2, 4, 4, 6)}
UNKNOWN = {"x": random(2, 4, 4, 6), "z": random(2, 4, 4, 6, seed=6)}

TIES = {
    "Identity": Row("y = Identity(x)", 192),
    "Identity of unknown rank": Row("y = Identity(x)", 192, inputs="float[] x", given=ANY_RANK),
    "Dropout": Row("y = Dropout(x)", 192),
    "Dropout with a mask": Row("y, mask = Dropout(x)", 192),
    "Dropout 6": Row("y = Dropout<is_test=1>(x)", 192, opset=6, run_as="y = Identity(x)"),
    "Cast": Row("y = Cast<to=10>(x)", 192),
    "CastLike": Row("y = CastLike(x, zero)", 192),
    "Relu": Row("y = Relu(x)", 192, P, Z),
    "Relu of unknown rank": Row("y = Relu(x)", 192, P, Z, "float[] x", given=ANY_RANK),
    "LeakyRelu": Row("y = LeakyRelu<alpha=-0.3>(x)", 192, P, Z),
    "PRelu": Row("y = PRelu(x, slopes)", 192, P, Z),
    "PRelu by a computed slope": Row("y = PRelu(x, z)", 192, P, Z, f"{IMAGE}, float[4,1,1] z"),
    "Clip from 0": Row("y = Clip(x, zero)", 192, P, Z),
    "Clip to 0": Row("y = Clip(x, , zero)", 192, P, Z),
    "Clip from 0 to infinity": Row("y = Clip(x, zero, infinite)", 192, P, Z),
    "Clip nothing": Row("y = Clip(x, lowest)", 192),
    "Clip 6": Row("y = Clip<min=0.0>(x)", 192, P, Z, opset=6),
    "Clip 6 to the default": Row(
        "y = Clip<min=0.0, max=3.4028234663852886e+38>(x)", 192, P, Z, opset=6
    ),
    "Abs": Row("y = Abs(x)", 192, P, Z),
    "ThresholdedRelu": Row("y = ThresholdedRelu<alpha=0.0>(x)", 192, P, Z),
    "Trilu": Row("y = Trilu(x)", 192, A, Z),
    "Max with 0": Row("y = Max(x, zeros)", 192, P, Z),
    "Max with 0, unknown rank": Row("y = Max(x, zero)", 192, P, Z, "float[] x", given=ANY_RANK),
    "Max of two": Row("y = Max(x, z)", 192, P, E, TWO),
    "Max of one": Row("y = Max(x)", 192),
    "Max of one twice": Row("y = Max(x, x)", 192, P, E),
    "Max, broadcast": Row("y = Max(x, z)", 4, P, E, f"{IMAGE}, float[4,1,1] z"),
    "Max of unknown space": Row(
        "y = Max(x, z)", 4, P, E, "float[?,4,?,?] x, float[?,4,?,?] z", given=UNKNOWN
    ),
    "Min of two and 0": Row("y = Min(x, z, zero)", 192, P, Z, TWO),
    "Where": Row("y = Where(m, x, z)", 192, A, E, MASK),
    "Where with 0": Row("y = Where(m, x, zero)", 192, A, Z, MASK),
    "Where, broadcast": Row(
        "y = Where(m, x, z)", 4, A, E, f"{IMAGE}, float[1,4,1,1] z, bool[2,1,1,6] m"
    ),
    "Where by a constant": Row("y = Where(yes, x, z)", 192, A, E, TWO),
    "Mul by a block": Row("y = Mul(x, full)", 192, A, Z),
    "Mul by a block that is larger": Row("y = Mul(full, x)", 24, A, Z, "float[1,1,4,6] x"),
    "Div": Row("y = Div(x, z)", 192, A, Z, TWO),
    "Div by a block": Row("y = Div(x, full)", 192, A, Z),
    "Div, broadcast": Row("y = Div(x, z)", 4, A, Z, f"float[4,1,1] x, {IMAGE[:-1]}z"),
    "Div 6 from an axis": Row(
        "y = Div<broadcast=1, axis=1>(x, z)",
        192,
        A,
        Z,
        f"{IMAGE}, float[4] z",
        opset=6,
        run_as="c = Unsqueeze(z, i12) y = Div(x, c)",
    ),
}

SUMS = {
    "Add": Row("y = Add(x, z)", 192, inputs=TWO),
    "Add of one twice": Row("y = Add(x, x)", 192),
    "Sub": Row("y = Sub(x, z)", 192, inputs=TWO),
    "Sum of three": Row("y = Sum(x, z, x)", 192, inputs=TWO),
    "Add, broadcast": Row("y = Add(x, z)", 4, inputs=f"{IMAGE}, float[4,1,1] z"),
    "Add, broadcast both": Row("y = Add(x, z)", 4, inputs="float[2,4,1,6] x, float[1,4,4,1] z"),
    "Add of symbols": Row("y = Add(x, z)", 192, inputs=f"{NCHW}, float[N,4,H,W] z"),
    "Add of unknown space": Row(
        "y = Add(x, z)", 4, inputs="float[?,4,?,?] x, float[?,4,?,?] z", given=UNKNOWN
    ),
    "Add 6 from an axis": Row(
        "y = Add<broadcast=1, axis=1>(x, z)",
        4,
        inputs=f"{IMAGE}, float[4] z",
        opset=6,
        run_as="c = Unsqueeze(z, i12) y = Add(x, c)",
    ),
    "ReduceSum": Row("y = ReduceSum(x, i23)", 8),
    "ReduceSum, axes dropped": Row("y = ReduceSum<keepdims=0>(x, i23)", 8),
    "ReduceSum of all": Row("y = ReduceSum(x)", 1),
    "ReduceSum over no axes is over all": Row("y = ReduceSum(x, none)", 1),
    "ReduceSum 11": Row("y = ReduceSum<axes=[-1], keepdims=0>(x)", 32, opset=11),
}

# The number of free scales when the first factor is the gate, and when the second one is.
PRODUCTS = {
    "Mul": (Row("y = Mul(x, z)", 192, inputs=TWO), 192),
    "Mul by a gate": (Row("y = Mul(x, z)", 8, inputs=f"{IMAGE}, float[2,4,1,1] z"), 192),
    "Mul by a gate, symbols": (Row("y = Mul(x, z)", 8, inputs=f"{NCHW}, float[N,4,1,1] z"), 192),
    "Mul 6": (
        Row(
            "y = Mul<broadcast=1, axis=0>(x, z)",
            8,
            inputs=f"{IMAGE}, float[2,4] z",
            opset=6,
            run_as="c = Unsqueeze(z, i23) y = Mul(x, c)",
        ),
        192,
    ),
    "MatMul": (Row("y = MatMul(x, z)", 12, inputs="float[2,5,3] x, float[2,3,6] z"), 10),
    "MatMul, broadcast": (Row("y = MatMul(x, z)", 6, inputs="float[2,5,3] x, float[3,6] z"), 10),
    "MatMul, broadcast both": (
        Row("y = MatMul(x, z)", 18, inputs="float[2,1,5,3] x, float[3,3,6] z"),
        10,
    ),
    "MatMul by a vector": (Row("y = MatMul(x, z)", 1, inputs="float[2,5,3] x, float[3] z"), 10),
    "MatMul of a vector": (Row("y = MatMul(x, z)", 12, inputs="float[3] x, float[2,3,6] z"), 1),
    "MatMul of symbols": (Row("y = MatMul(x, z)", 8, inputs="float[N,H,W] x, float[N,W,4] z"), 8),
}


@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str) -> None:
    holds(TIES[name])


@pytest.mark.parametrize("name", SUMS)
def test_sum_is_true(name: str) -> None:
    assert isinstance(only(net(SUMS[name])), Sum)
    assert agrees(SUMS[name]) == SUMS[name].free


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_true_whichever_factor_is_the_gate(name: str) -> None:
    row, other = PRODUCTS[name]
    assert isinstance(only(net(row)), Product)
    assert (agrees(row, gate=0), agrees(row, gate=1)) == (row.free, other)


TRIVIAL = ["Identity", "Identity of unknown rank", "Dropout", "Dropout with a mask", "Cast",
           "CastLike", "Relu", "PRelu", "Clip from 0", "Max with 0", "Max of two",
           "Max of one twice", "Mul by a block", "Where by a constant"]  # fmt: skip


@pytest.mark.parametrize("row", [*(TIES[k] for k in TRIVIAL), *(SUMS[k] for k in (
    "Add", "Add of one twice", "Sub", "Sum of three", "Add of symbols"))], ids=str)  # fmt: skip
def test_values_of_one_shape_need_no_routes(row: Row) -> None:
    operator = only(net(row))
    assert isinstance(operator, Tie | Sum)
    assert operator.routes == ()


@pytest.mark.parametrize("name", ["Identity", "Dropout", "Dropout with a mask", "Clip nothing"])
def test_what_does_nothing_lets_everything_through(name: str) -> None:
    operator = only(net(TIES[name]))
    assert isinstance(operator, Tie)
    assert operator.free


UNSTATED = {
    "integers": Row("y = Relu(x)", 0, inputs="int32[2,4] x", outputs="int32[] y", opset=14),
    "MaxPool of int8": Row(
        "y = MaxPool<kernel_shape=[2,2]>(x)", 0, inputs="int8[1,1,4,4] x", outputs="int8[] y"
    ),
    "Identity of integers": Row("y = Identity(x)", 0, inputs="int64[4] x", outputs="int64[] y"),
    "Cast to integers": Row("y = Cast<to=6>(x)", 0, outputs="int32[] y"),
    "Cast from integers": Row("y = Cast<to=1>(x)", 0, inputs="int32[4] x"),
    "Dropout in training": Row("y = Dropout(x, , yes)", 0),
    "Clip to 6": Row("y = Clip(x, zero, six)", 0),
    "Clip by a computed bound": Row("y = Clip(x, z)", 0, inputs=f"{IMAGE}, float z"),
    "Clip 6 to 6": Row("y = Clip<min=0.0, max=6.0>(x)", 0, opset=6),
    "Max with 1": Row("y = Max(x, one)", 0),
    "Max with a block": Row("y = Max(x, full)", 0),
    "ThresholdedRelu": Row("y = ThresholdedRelu(x)", 0),
    "PRelu by itself": Row("y = PRelu(x, x)", 0),
    "Add of a block": Row("y = Add(x, full)", 0),
    "Sum with a constant": Row("y = Sum(x, x, zero)", 0),
    "Add of unknown rank": Row("y = Add(x, z)", 0, inputs="float[] x, float[] z"),
    "square": Row("y = Mul(x, x)", 0),
    "Div by itself": Row("y = Div(x, x)", 0),
    "Div of a constant": Row("y = Div(full, x)", 0),
    "MatMul of unknown rank": Row("y = MatMul(x, z)", 0, inputs="float[] x, float[2,2] z"),
    "MatMul by itself": Row("y = MatMul(x, x)", 0, inputs="float[4,4] x"),
    "Where with 1": Row("y = Where(m, x, one)", 0, inputs=MASK),
    "Einsum": Row('y = Einsum<equation="ij,jk->ik">(x, x)', 0, inputs="float[4,4] x"),
    "Sigmoid": Row("y = Sigmoid(x)", 0),
    "Softmax": Row("y = Softmax(x)", 0),
}


@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str) -> None:
    assert of_last_node(net(UNSTATED[name])) is None


def test_another_domain_is_not_in_the_table() -> None:
    proto = nets.model(
        "g (float[4] x) => (float[] y) { y = com.other.Relu(x) }", domains=["com.other"]
    )
    assert of_last_node(proto) is None


def test_an_attribute_that_a_caller_sets_is_not_known() -> None:
    text = """g (float[2,3] x) => (float[] y) { y = local.f<k=0>(x) }
    <domain: "local", opset_import: ["" : 17]> f<k>(x) => (y) { y = Flatten<axis: int = @k>(x) }"""
    model = ir.from_proto(nets.model(text, domains=["local"]))
    facts = Facts(model, {})
    (flatten,) = (pair for pair in facts.nodes() if pair[0].op_type == "Flatten")
    assert find_tie(facts, *flatten, lambda _: 0) is None


@pytest.mark.parametrize("op_type", sorted(TABLE))
def test_a_node_without_inputs_is_no_error(op_type: str) -> None:
    node = ir.Node("", op_type, [None, None], outputs=[ir.Value(name="y")])
    graph = ir.Graph([], [], nodes=[node], opset_imports={"": 17})
    model = ir.Model(graph, ir_version=8)
    assert find_tie(Facts(model, {}), node, graph, lambda _: 0) is None


# ---- the judge can say no ----

TWO_OF, ONE_OF = np.array([2]), np.array([0])

WRONG: Mapping[str, tuple[str, Rule]] = {
    "a shift through Relu": ("y = Relu(x)", lambda asked: asked.tie(P, E, Way())),
    "a sign through Relu": ("y = Relu(x)", lambda asked: asked.tie(A, Z, Way())),
    "an axis that is pooled over": (
        "y = ReduceMax<axes=[3]>(x)",
        lambda asked: asked.tie(P, E, Way(0, (*same_axes(3), Link((3,), (3,), TWO_OF, ONE_OF)))),
    ),
    "channels in another order": (
        "y = Concat<axis=1>(x, x)",
        lambda asked: asked.tie(A, E, *(Way(k, along(4, 1, None, [k, 5, 6, 7])) for k in (0, 1))),
    ),
    "batch for channels": (
        "y = Transpose<perm=[1,0,2,3]>(x)", lambda asked: asked.tie(A, E, Way()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_statement_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, rule = WRONG[name]
    row = Row(body, 0, inputs="float[4,4,4,6] x")
    monkeypatch.setattr("bnfold.onnx_ties.TABLE", {net(row).graph.node[0].op_type: rule})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agrees(row)


def test_every_operator_of_the_table_is_tried() -> None:
    tables = (
        TIES, SUMS, {k: row for k, (row, _) in PRODUCTS.items()},
        {k: row for k, (row, _) in test_onnx_norms.NORMS.items()},
        {body: Row(body, 0) for body, _, _ in test_onnx_norms.BIASES.values()},
        test_onnx_moves.TIES, test_onnx_parts.TIES, test_onnx_pooling.TIES,
        test_onnx_pooling.RESAMPLED,
    )  # fmt: skip
    tried = {word for table in tables for row in table.values() for word in nets.words(row.body)}
    assert set(TABLE) <= tried
