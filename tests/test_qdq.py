"""A scale goes into the scale of a quantised weight, a sign into its integers, a shift into bias.

The judge dequantises by hand in float64 and runs the rest in float64; ONNX Runtime runs every fold
without its optimisations and with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import bnfold
from tests import nets, qdq_nets
from tests.nets import Array
from tests.qdq_nets import BN, Quantised

CONV = "c = Conv<pads = [1,1,1,1]>(x, d)"
AFTER = f"[s] y = {BN}(c, a_g, a_b, a_m, a_v)"
BEFORE = f"[s] n = {BN}(x, p_g, p_b, p_m, p_v)"


def constants(seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        **nets.batch_norm(rng, "a", 8), **nets.batch_norm(rng, "p", 4),
        "b": nets.weight(rng, 8), "k": np.array(-3, np.float32), "none": np.array(0, np.float32),
        "k4": rng.uniform(0.5, 2, (4, 1, 1)).astype(np.float32),
        "k8": rng.uniform(-2, 2, (8, 1, 1)).astype(np.float32),
        "tokens": rng.uniform(-2, 2, 8).astype(np.float32),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A net in which the step ``s`` vanishes, into scales along ``axis``."""

    weight: Quantised
    body: str
    axis: int | None
    opset: int = 17
    given: str = "float[2,4,6,6] x"
    made: str = "float[2,8,6,6] y"
    extra: dict[str, Array] = field(default_factory=dict)

    def proto(self, seed: int = 0) -> onnx.ModelProto:
        known = {**constants(), **self.weight.constants(seed), **self.extra}
        return qdq_nets.model(
            f"{self.weight.node} {self.body}", known, given=self.given, made=self.made,
            opset=self.opset,
        )  # fmt: skip


ROWS: dict[str, Any] = {"given": "float[5,4] x", "made": "float[5,8] y"}
TOKENS: dict[str, Any] = {"given": "float[2,5,4] x", "made": "float[2,5,8] y"}
DENSE = (8, 4, 3, 3)

CASES = {
    "conv, a scale for each output": Case(Quantised(DENSE, 0), f"{CONV} {AFTER}", 0),
    "conv, one scale": Case(Quantised(DENSE), f"{CONV} {AFTER}", 0),
    "conv with a bias": Case(
        Quantised(DENSE, 0), f"c = Conv<pads = [1,1,1,1]>(x, d, b) {AFTER}", 0
    ),
    "conv, uint8": Case(Quantised(DENSE, 0, np.uint8, zeros=True), f"{CONV} {AFTER}", 0),
    "conv, uint8, one scale": Case(Quantised(DENSE, None, np.uint8, True), f"{CONV} {AFTER}", 0),
    "conv, int16": Case(Quantised(DENSE, 0, np.int16), f"{CONV} {AFTER}", 0, opset=21),
    "conv, int4": Case(Quantised(DENSE, 0, ml_dtypes.int4), f"{CONV} {AFTER}", 0, opset=21),
    "conv, uint4": Case(
        Quantised(DENSE, None, ml_dtypes.uint4, True), f"{CONV} {AFTER}", 0, opset=21
    ),
    "conv, opset 13": Case(Quantised(DENSE), f"{CONV} {AFTER}", 0, opset=13),
    "depthwise": Case(
        Quantised((8, 1, 3, 3), 0), f"c = Conv<pads = [1,1,1,1], group = 4>(x, d) {AFTER}", 0
    ),
    "depthwise, from before": Case(
        Quantised((8, 1, 3, 3), 0),
        f"{BEFORE} y = Conv<group = 4>(n, d)",
        0,
        made="float[2,8,4,4] y",
    ),
    "depthwise, from both sides": Case(
        Quantised((4, 1, 1, 1)),
        f"{BEFORE} c = Conv<group = 4>(n, d) [t] y = {BN}(c, p_g, p_b, p_v, p_v)",
        0,
        made="float[2,4,6,6] y",
    ),
    "grouped": Case(
        Quantised((8, 2, 3, 3), 0), f"c = Conv<pads = [1,1,1,1], group = 2>(x, d) {AFTER}", 0
    ),
    "conv, one scale, from before": Case(
        Quantised(DENSE), f"{BEFORE} y = Conv(n, d)", 1, made="float[2,8,4,4] y"
    ),
    "conv, a scale for each input, from before": Case(
        Quantised(DENSE, 1), f"{BEFORE} y = Conv(n, d)", 1, made="float[2,8,4,4] y"
    ),
    "one number from before": Case(
        Quantised(DENSE, 0), "[s] n = Mul(x, k) y = Conv<pads = [1,1,1,1]>(n, d)", 0
    ),
    "one number from behind": Case(Quantised(DENSE), f"{CONV} [s] y = Mul(c, k)", None),
    "nothing but a shift": Case(Quantised(DENSE), f"{CONV} [s] y = Add(c, k8)", None),
    "a scale of 0 for all": Case(Quantised(DENSE), f"{CONV} [s] y = Mul(c, none)", None),
    "transposed": Case(
        Quantised((4, 8, 2, 2), 1),
        f"c = ConvTranspose<strides = [2,2]>(x, d) {AFTER}",
        1,
        made="float[2,8,12,12] y",
    ),
    "transposed, one scale": Case(
        Quantised((4, 8, 2, 2)),
        f"c = ConvTranspose<strides = [2,2]>(x, d) {AFTER}",
        1,
        made="float[2,8,12,12] y",
    ),
    "transposed, depthwise": Case(
        Quantised((4, 1, 2, 2), 0),
        f"c = ConvTranspose<group = 4>(x, d) [s] y = {BN}(c, p_g, p_b, p_m, p_v)",
        0,
        made="float[2,4,7,7] y",
    ),
    "gemm": Case(Quantised((4, 8), 1), f"c = Gemm(x, d) {AFTER}", 1, **ROWS),
    "gemm, transposed": Case(
        Quantised((8, 4), 0),
        f"c = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, d, b) {AFTER}",
        0,
        **ROWS,
    ),
    "matmul": Case(Quantised((4, 8)), f"c = MatMul(x, d) {AFTER}", 1, **ROWS),
    "matmul of tokens": Case(
        Quantised((4, 8), 1), "m = MatMul(x, d) c = Add(m, b) [s] y = Mul(c, tokens)", 1, **TOKENS
    ),
    "behind Identity": Case(
        Quantised(DENSE), f"i = Identity(d) c = Conv<pads = [1,1,1,1]>(x, i) {AFTER}", 0
    ),
    "behind Transpose": Case(
        Quantised((8, 4), 0), f"i = Transpose(d) c = MatMul(x, i) {AFTER}", 0, **ROWS
    ),
    "behind Transpose, one scale, from before": Case(
        Quantised((8, 4, 3, 3)),
        f"{BEFORE} i = Transpose<perm = [0,1,3,2]>(d) y = Conv(n, i)",
        1,
        made="float[2,8,4,4] y",
    ),
    "behind Transpose, kernel first": Case(
        Quantised((3, 3, 4, 8), 3, np.uint8, zeros=True),
        f"i = Transpose<perm = [3,2,0,1]>(d) c = Conv<pads = [1,1,1,1]>(x, i) {AFTER}",
        3,
    ),
    "opset 11, one number": Case(
        Quantised(DENSE), f"{CONV} e = Add(c, k8) [s] y = Mul(e, k)", None, opset=11
    ),
    "opset 23": Case(Quantised(DENSE, 0), f"{CONV} {AFTER}", 0, opset=23),
}


def folded(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """The fold, its file checked."""
    result = bnfold.fold(proto, **options)
    onnx.checker.check_model(result.model, full_check=True)
    model: onnx.ModelProto = result.model
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("level", ["max", "local"])
def test_step_next_to_a_quantised_weight_vanishes(case: Case, level: str) -> None:
    proto = case.proto()
    result = bnfold.fold(proto, level=level)
    onnx.checker.check_model(result.model, full_check=True)
    assert not result.report.kept
    assert nets.operators(result.model)["DequantizeLinear"] == 1
    assert nets.constant(result.model, "q").dtype == nets.constant(proto, "q").dtype
    scale = nets.constant(result.model, "qs")
    axis = 1 if case.axis is None else case.axis
    single = case.axis is None and case.weight.axis is None
    assert scale.shape == (() if single else (case.weight.shape[axis],))
    for seed in range(2):
        feeds = nets.feeds(proto, seed)
        true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, result.model))
        assert np.abs(now - true).max() <= 2e-6 * max(np.abs(true).max(), 1e-3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("level", qdq_nets.LEVELS, ids=["plain", "optimised"])
def test_fold_says_the_same_on_onnx_runtime(case: Case, level: ort.GraphOptimizationLevel) -> None:
    proto = case.proto()
    feeds = nets.feeds(proto, 3)
    true = qdq_nets.run(proto, feeds)["y"]
    before, now = (
        np.abs(qdq_nets.on_ort(m, feeds, level) - true).max() for m in (proto, folded(proto))
    )
    # Optimised, a MatMul by integers rounds its activation to 8 bits, folded or not.
    assert now <= 1.01 * before + 1e-5 * max(np.abs(true).max(), 1e-3)


# ---- signs ----


def signed(dtype: Any, least: int, zero: int, *, gamma: float = -2.0) -> onnx.ModelProto:
    """A net in which channel 1 is scaled by ``gamma``, with ``least`` among its integers."""
    known = Quantised(DENSE, 0, dtype).constants()
    known["q"] = np.clip(known["q"].astype(np.int64), least, 127).astype(dtype)
    known["q"][:, 0, 0, 0] = least
    known["qz"] = np.full(8, zero, dtype)
    known["scale"] = np.array([1, gamma, 1, 1, 1, 1, 1, 1], np.float32).reshape(8, 1, 1)
    return qdq_nets.model(
        f"{Quantised(DENSE, 0).node} {CONV} [s] y = Mul(c, scale)", {**constants(), **known}
    )


def test_integers_are_negated_about_their_zero_point() -> None:
    proto = signed(np.int8, -127, 0)
    model = folded(proto)
    before, after = nets.constant(proto, "q"), nets.constant(model, "q")
    np.testing.assert_array_equal(after[1], -before[1])
    np.testing.assert_array_equal(after[0], before[0])
    assert not nets.constant(model, "qz").any()
    assert (nets.constant(model, "qs") > 0).all()


@pytest.mark.parametrize(("dtype", "least", "zero"), [(np.int8, -128, 0), (np.uint8, 0, 130)])
def test_integers_that_would_leave_their_type_take_their_zero_point_along(
    dtype: Any, least: int, zero: int
) -> None:
    proto = signed(dtype, least, zero)
    model = folded(proto)
    before, after = nets.constant(proto, "q"), nets.constant(model, "q")
    np.testing.assert_array_equal(after[1], ~before[1])
    np.testing.assert_array_equal(after[0], before[0])
    assert nets.constant(model, "qz")[1] == ~np.array(zero, dtype)
    feeds = nets.feeds(proto)
    true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, model))
    np.testing.assert_array_equal(now, true)  # a power of 2
    for level in qdq_nets.LEVELS:
        ran = qdq_nets.on_ort(model, feeds, level)
        assert np.abs(ran - true).max() <= 1e-5 * np.abs(true).max()


def test_kernels_of_integers_keep_one_zero_point_for_all_channels() -> None:
    """ONNX Runtime refuses to run a QLinearConv whose channels have different ones."""
    known = {**constants(), **Quantised(DENSE, 0).constants(), "xs": np.array(0.05, np.float32),
             "xz": np.array(3, np.int8)}  # fmt: skip
    known["q"][1, 0, 0, 0] = -128
    known["scale"] = np.where(np.arange(8) == 1, -2, 1).astype(np.float32).reshape(8, 1, 1)
    body = (
        f"i = QuantizeLinear(x, xs, xz) j = DequantizeLinear(i, xs, xz) {Quantised(DENSE, 0).node} "
        "c = Conv<pads = [1,1,1,1]>(j, d) [s] y = Mul(c, scale)"
    )
    report = bnfold.fold(qdq_nets.model(body, known)).report
    (step,) = report.kept
    assert step.code == "BNF013"
    assert "can't be negated on channel 1" in step.sentence
    known["scale"] = np.full((8, 1, 1), -2, np.float32)  # all of them: one zero point again
    model = folded(qdq_nets.model(body, known))
    assert nets.constant(model, "qz").tolist() == [-1] * 8


def test_kernels_of_integers_may_come_to_stand_next_to_a_fold() -> None:
    """Once the step is gone the operator reads what was quantised."""
    known = {**constants(), **Quantised(DENSE, 0).constants(), "xs": np.array(0.05, np.float32),
             "xz": np.array(3, np.int8), "minus": np.array(-2, np.float32)}  # fmt: skip
    known["q"][0, 0, 0, 0] = -128
    known["scale"] = np.where(np.arange(8) == 1, -2, 1).astype(np.float32).reshape(8, 1, 1)
    ends = "q1 = QuantizeLinear(e, xs, xz) y = DequantizeLinear(q1, xs, xz)"
    body = (
        "i = QuantizeLinear(x, xs, xz) j = DequantizeLinear(i, xs, xz) [s] n = Mul(j, minus) "
        f"{Quantised(DENSE, 0).node} c = Conv<pads = [1,1,1,1]>(n, d) [t] e = Mul(c, scale) {ends}"
    )
    proto = qdq_nets.model(body, known)
    model = folded(proto)
    assert not nets.constant(model, "qz").any()
    feeds = nets.feeds(proto)
    true = qdq_nets.run(proto, feeds)["y"]
    for level in qdq_nets.LEVELS:
        ran = qdq_nets.on_ort(model, feeds, level)
        assert np.abs(ran - true).max() <= 1.01 * known["xs"]


@pytest.mark.parametrize(
    ("axis", "said"), [(None, "no scale for each of its input"), (1, "that are summed over")]
)
def test_kernels_of_integers_have_no_scale_for_what_they_sum_over(
    axis: int | None, said: str
) -> None:
    """ONNX Runtime takes any DequantizeLinear with an axis for one of output channels."""
    weight = Quantised((4, 4, 3, 3), axis)
    known = {**constants(), **weight.constants(), "xs": np.array(0.05, np.float32),
             "xz": np.array(3, np.int8)}  # fmt: skip
    body = (
        "i = QuantizeLinear(x, xs, xz) j = DequantizeLinear(i, xs, xz) [s] n = Mul(j, k4) "
        f"{weight.node} y = Conv(n, d)"
    )
    proto = qdq_nets.model(body, known, made="float[2,4,4,4] y")
    (step,) = bnfold.fold(proto).report.kept
    assert (step.code, said in step.sentence) == ("BNF004", True)


def test_dead_channel_becomes_its_zero_point_and_keeps_a_scale() -> None:
    proto = signed(np.uint8, 1, 120, gamma=0.0)
    model = folded(proto)
    assert (nets.constant(model, "q")[1] == 120).all()
    assert (nets.constant(model, "qs") > 0).all()


@pytest.mark.parametrize(
    ("factor", "said"), [(1e-44, "underflows"), (3e38, "overflows")], ids=["small", "large"]
)
def test_scale_that_leaves_its_type_keeps_the_step(factor: float, said: str) -> None:
    known = {**constants(), **Quantised(DENSE, 0).constants(), "far": np.array(factor, np.float32)}
    known["qs"] = known["qs"] * np.float32(100)
    body = f"{Quantised(DENSE, 0).node} {CONV} [s] y = Mul(c, far)"
    (step,) = bnfold.fold(qdq_nets.model(body, known)).report.kept
    assert step.code == "BNF013"
    assert f"the scale {said}" in step.sentence
