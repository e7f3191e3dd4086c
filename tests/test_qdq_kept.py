"""Quantised weights that keep a step, that several operators read, and that are in bodies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

import bnfold
from tests import nets, qdq_nets
from tests.qdq_nets import Quantised
from tests.test_qdq import AFTER, BEFORE, CONV, DENSE, constants, folded

# ---- what stays ----

KEPT = {
    "one weight, two sides": (
        Quantised(DENSE, 0), f"{BEFORE} y = Conv(n, d)", 17, "no scale for each of its input",
    ),
    "groups of several channels": (
        Quantised((8, 2, 3, 3)), f"{BEFORE} y = Conv<group = 2>(n, d)", 17, "each of its input",
    ),
    "another axis": (Quantised(DENSE, 1), f"{CONV} {AFTER}", 17, "no scale for each of its output"),
    "opset 11": (Quantised(DENSE), f"{CONV} {AFTER}", 11, "no scale for each of its output"),
    "the axis of the kernel": (Quantised(DENSE, 2), f"{CONV} {AFTER}", 17, "each of its output"),
}  # fmt: skip


@pytest.mark.parametrize("row", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("level", ["max", "local"])
def test_scales_without_a_place_keep_the_step(
    row: tuple[Quantised, str, int, str], level: str
) -> None:
    weight, body, opset, said = row
    made = "float[2,8,4,4] y" if "(n, d)" in body else "float[2,8,6,6] y"
    known = {**constants(), **weight.constants()}
    proto = qdq_nets.model(f"{weight.node} {body}", known, opset=opset, made=made)
    result = bnfold.fold(proto, level=level)
    assert nets.same(proto, result.model)
    (step,) = result.report.kept
    assert step.code == "BNF004"
    assert said in step.sentence


UNUSABLE = {
    "blocks": ("d = DequantizeLinear<axis = 1, block_size = 2>(q, blocks)", "quantised in blocks"),
    "in the graph": (
        "i = QuantizeLinear(w, qs) d = DequantizeLinear(i, qs)", "quantised in the graph",
    ),
    "float8": ("d = DequantizeLinear(f8, qs)", "FLOAT8E4M3FN behind DequantizeLinear"),
    "reshaped": ("t = DequantizeLinear(q, qs) d = Reshape(t, same)", "moved about behind"),
    "another type": (
        "e = DequantizeLinear<output_dtype = 1>(q, half) d = Identity(e)", "of another type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_weight_that_can_take_no_scale_says_why(row: tuple[str, str]) -> None:
    make, said = row
    rng = np.random.default_rng(0)
    known = {
        **constants(), "q": Quantised(DENSE).constants()["q"], "qs": np.array(0.1, np.float32),
        "same": np.array(DENSE), "blocks": rng.uniform(0.1, 1, (8, 2, 3, 3)).astype(np.float32),
        "w": nets.weight(rng, *DENSE), "half": np.array(0.1, np.float16),
        "f8": rng.normal(size=DENSE).astype(ml_dtypes.float8_e4m3fn),
    }  # fmt: skip
    proto = qdq_nets.model(f"{make} {CONV} {AFTER}", known, opset=23)
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    (step,) = result.report.kept
    assert (step.code, said in step.sentence) == ("BNF004", True), step.sentence


def test_solver_takes_one_number_through_a_relu_where_channels_have_no_scales() -> None:
    """The scale of a step behind a Relu can go into the weight if it is the same everywhere."""
    known = {**constants(), **Quantised(DENSE, 0).constants(), "up": np.array(3, np.float32)}
    body = "[s] m = {0} r = Relu(m) y = Conv<pads = [1,1,1,1]>(r, d)"
    known["wide"] = np.full((4, 1, 1), 3, np.float32)
    for step, kept in (("Mul(x, up)", False), ("Mul(x, wide)", False), ("Mul(x, k4)", True)):
        proto = qdq_nets.model(f"{Quantised(DENSE, 0).node} {body.format(step)}", known)
        result = bnfold.fold(proto)
        assert bool(result.report.kept) is kept
        if kept:
            assert result.report.kept[0].code == "BNF004"
            continue
        feeds = nets.feeds(proto)
        true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, result.model))
        np.testing.assert_allclose(now, true, rtol=1e-6, atol=1e-6)


# ---- weights that several read ----

TWO = "d = DequantizeLinear(q, qs, qz) c = Conv(x, d) e = Conv(z, d)"
PAIR: dict[str, Any] = {
    "given": "float[2,4,6,6] x, float[2,4,6,6] z", "made": "float[2,8,4,4] y, float[2,8,4,4] u"
}  # fmt: skip


def test_readers_that_agree_share_the_scaled_integers() -> None:
    proto = qdq_nets.model(
        f"{TWO} y = Mul(c, k8) u = Mul(e, k8)", {**constants(), **Quantised(DENSE).constants()},
        **PAIR,
    )  # fmt: skip
    model = folded(proto)
    assert nets.operators(model) == {"DequantizeLinear": 1, "Conv": 2}
    feeds = nets.feeds(proto)
    true, now = qdq_nets.run(proto, feeds), qdq_nets.run(model, feeds)
    for name in ("y", "u"):
        np.testing.assert_allclose(now[name], true[name], rtol=1e-6, atol=1e-5)


def test_readers_that_disagree_keep_the_step_or_have_integers_of_their_own() -> None:
    proto = qdq_nets.model(
        f"{TWO} [s] y = Mul(c, k8) u = Relu(e)", {**constants(), **Quantised(DENSE).constants()},
        **PAIR,
    )  # fmt: skip
    (step,) = bnfold.fold(proto).report.kept
    assert (step.code, step.witness) == ("BNF005", ("Conv(e)",))
    model = folded(proto, unshare=True)
    assert nets.operators(model) == {"DequantizeLinear": 2, "Conv": 2, "Relu": 1}
    feeds = nets.feeds(proto)
    true, now = qdq_nets.run(proto, feeds), qdq_nets.run(model, feeds)
    for name in ("y", "u"):
        np.testing.assert_allclose(now[name], true[name], rtol=1e-6, atol=1e-5)


def test_readers_that_turn_it_otherwise_have_integers_of_their_own() -> None:
    known = {**constants(), **Quantised((4, 4)).constants()}
    known["four"] = np.array([1, -2, 3, 0.5], np.float32)
    body = (
        "d = DequantizeLinear(q, qs, qz) t = Transpose(d) c = MatMul(x, d) e = MatMul(x, t) "
        "y = Mul(c, four) u = Mul(e, four)"
    )
    proto = qdq_nets.model(body, known, given="float[2,4] x", made="float[2,4] y, float[2,4] u")
    assert {step.code for step in bnfold.fold(proto).report.kept} == {"BNF005"}
    model = folded(proto, unshare=True)
    assert nets.operators(model) == {"DequantizeLinear": 2, "Transpose": 1, "MatMul": 2}
    feeds = nets.feeds(proto)
    true, now = qdq_nets.run(proto, feeds), qdq_nets.run(model, feeds)
    for name in ("y", "u"):
        np.testing.assert_allclose(now[name], true[name], rtol=1e-6, atol=1e-5)


def test_scale_that_other_weights_read_is_left_to_them() -> None:
    known = {**constants(), **Quantised(DENSE).constants()}
    known["other"] = Quantised((8, 8, 1, 1)).constants(5)["q"]
    body = (
        "d = DequantizeLinear(q, qs, qz) f = DequantizeLinear(other, qs, qz) "
        f"{CONV} [s] m = Mul(c, k8) r = Relu(m) y = Conv(r, f)"
    )
    proto = qdq_nets.model(body, known)
    model = folded(proto)
    assert nets.operators(model)["Mul"] == 0
    assert nets.constant(model, "qs") == known["qs"]
    feeds = nets.feeds(proto)
    true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, model))
    np.testing.assert_allclose(now, true, rtol=1e-6, atol=1e-5)


# ---- bodies ----

FUNCTION = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[2,4,6,6] x) => (float[2,8,6,6] y) { y = local.Block(x) }
<domain: "local", opset_import: ["" : 17]>
Block (x) => (y) {
    q = Constant<value = int8[8,4,1,1] {INTEGERS}>()
    s = Constant<value_float = 0.01>()
    d = DequantizeLinear(q, s)
    c = Conv(x, d)
    k = Constant<value = float[8,1,1] {1, -2, 3, 0.5, 1, -1, 2, 4}>()
    [s] y = Mul(c, k)
}"""


def test_weight_in_a_function_takes_a_scale() -> None:
    integers = ", ".join(str(k) for k in np.random.default_rng(0).integers(-127, 128, 32))
    proto = onnx.parser.parse_model(FUNCTION.replace("INTEGERS", integers))
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert not result.report.kept
    feeds = nets.feeds(proto)
    true, now = (nets.run(m, feeds)["y"] for m in (proto, result.model))
    np.testing.assert_allclose(now, true, rtol=1e-6, atol=1e-6)


def test_weight_outside_a_subgraph_takes_a_scale_from_inside() -> None:
    known = {**constants(), **Quantised(DENSE).constants()}
    body = """d = DequantizeLinear(q, qs, qz) y = If(t) <
        then_branch = th () => (float[2,8,6,6] u) {
            c = Conv<pads = [1,1,1,1]>(x, d) [s] u = Mul(c, k8) },
        else_branch = el () => (float[2,8,6,6] v) { v = Expand(x8, eight) }>"""
    known["x8"], known["eight"] = np.zeros((1, 8, 1, 1), np.float32), np.array([2, 8, 6, 6])
    proto = qdq_nets.model(body, known, given="float[2,4,6,6] x, bool t")
    model = folded(proto)
    assert nets.constant(model, "qs").shape == (8,)
    feeds = {**nets.feeds(proto), "t": np.array(True)}
    true, now = (nets.run(m, feeds)["y"] for m in (proto, model))
    np.testing.assert_allclose(now, true, rtol=1e-6, atol=1e-6)
