"""The bias of a quantised operator: floats stay floats, int32 is written in the new scale.

What int32 rounds is half a unit of the sums that runtimes make of integers; whether that is worse
than the unfolded model is judged by signal to noise against a net of floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import bnfold
from tests import nets, qdq_nets
from tests.nets import Array
from tests.qdq_nets import BN, Quantised

SHAPE = (8, 4, 3, 3)
WEIGHT = Quantised(SHAPE, 0)
DATA = "i = QuantizeLinear(x, xs, xz) j = DequantizeLinear(i, xs, xz)"
BIASED = "o = DequantizeLinear<axis = 0>(b, bs) c = Conv<pads = [1,1,1,1]>(j, d, o)"
BARE = "c = Conv<pads = [1,1,1,1]>(j, d)"
NORM = f"[s] y = {BN}(c, a_g, a_b, a_m, a_v)"


def constants(weight: Quantised = WEIGHT, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found = {
        **weight.constants(seed), **nets.batch_norm(rng, "a", 8),
        "xs": np.array(0.03, np.float32), "xz": np.array(0, np.int8),
        "b": rng.integers(-2000, 2000, 8).astype(np.int32),
        "scale": rng.uniform(0.5, 2, (8, 1, 1)).astype(np.float32),
        "shift": rng.normal(0, 1, (8, 1, 1)).astype(np.float32),
        "floats": rng.normal(0, 1, 8).astype(np.float32),
        "bz": np.zeros(8, np.int32),
    }  # fmt: skip
    found["a_g"][1] = 0.01  # with 1e-6 its bias would not fit
    found["bs"] = (found["xs"] * found["qs"].astype(np.float64)).astype(np.float32)
    return found


def net(body: str, known: dict[str, Array] | None = None, **options: Any) -> onnx.ModelProto:
    return qdq_nets.model(f"{DATA} {WEIGHT.node} {body}", known or constants(), **options)


def bias_of(proto: onnx.ModelProto) -> tuple[Array, Array]:
    """The integers of the bias and their scale."""
    conv = next(node for node in proto.graph.node if node.op_type in ("Conv", "Gemm"))
    made = next(node for node in proto.graph.node if conv.input[2] in node.output)
    assert made.op_type == "DequantizeLinear"
    return nets.constant(proto, made.input[0]), nets.constant(proto, made.input[1])


def folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert not result.report.kept
    model: onnx.ModelProto = result.model
    return model


def test_bias_of_int32_is_written_in_the_new_scale() -> None:
    proto = net(f"{BIASED} {NORM}")
    model = folded(proto)
    integers, scale = bias_of(model)
    known = constants()
    a = known["a_g"].astype(np.float64) / np.sqrt(known["a_v"].astype(np.float64) + 1e-5)
    before = known["b"] * known["bs"].astype(np.float64)
    wanted = a * (before - known["a_m"]) + known["a_b"]
    steps = known["bs"].astype(np.float64) * np.where(a == 0, np.abs(a).max(), np.abs(a))
    np.testing.assert_array_equal(scale, steps.astype(np.float32))
    np.testing.assert_array_equal(integers, np.rint(wanted / scale.astype(np.float64)))
    assert integers.dtype == np.int32
    assert set(nets.operators(model)) == {"QuantizeLinear", "DequantizeLinear", "Conv"}


def test_bias_of_int32_keeps_its_integers_where_only_a_scale_goes_in() -> None:
    proto = net(f"{BIASED} [s] y = Mul(c, scale)")
    model = folded(proto)
    np.testing.assert_array_equal(bias_of(model)[0], constants()["b"])
    np.testing.assert_array_equal(nets.constant(model, "q"), constants()["q"])


def test_zero_points_of_a_bias_are_left_out() -> None:
    body = f"{BIASED} {NORM}".replace("(b, bs)", "(b, bs, bz)")
    model = folded(net(body))
    made = next(node for node in model.graph.node if node.output[0] == "o")
    assert list(made.input) == ["b", "bs"]
    assert "bz" not in {tensor.name for tensor in model.graph.initializer}


def test_bias_that_a_quantised_operator_gains_is_int32_in_the_scale_of_its_sums() -> None:
    model = folded(net(f"{BARE} {NORM}"))
    integers, scale = bias_of(model)
    assert integers.dtype == np.int32
    weight = nets.constant(model, "qs").astype(np.float64)
    np.testing.assert_array_equal(scale, (constants()["xs"] * weight).astype(np.float32))


def test_bias_that_an_operator_of_float_activations_gains_is_float() -> None:
    model = folded(net(f"{BARE} {NORM}".replace("(j, d)", "(x, d)")))
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert nets.constant(model, conv.input[2]).dtype == np.float32


def test_bias_of_floats_stays_one() -> None:
    model = folded(net(f"c = Conv<pads = [1,1,1,1]>(j, d, floats) {NORM}"))
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert nets.constant(model, conv.input[2]).dtype == np.float32


def test_bias_is_float_where_the_scale_of_the_activation_is_not_constant() -> None:
    body = (
        f"i = QuantizeLinear(x, t, xz) j = DequantizeLinear(i, t, xz) {WEIGHT.node} {BARE} {NORM}"
    )
    proto = qdq_nets.model(body, constants(), given="float[2,4,6,6] x, float t")
    conv = next(node for node in folded(proto).graph.node if node.op_type == "Conv")
    assert nets.constant(folded(proto), conv.input[2]).dtype == np.float32


def test_bias_that_two_operators_read_becomes_two() -> None:
    body = (
        f"{WEIGHT.node} o = DequantizeLinear<axis = 0>(b, bs) c = Conv<pads = [1,1,1,1]>(j, d, o) "
        "e = DequantizeLinear<axis = 0>(other, qs, qz) f = Conv<pads = [1,1,1,1]>(j, e, o) "
        "[s] m = Mul(c, scale) y = Max(m, f)"
    )
    known = {**constants(), "other": WEIGHT.constants(7)["q"]}
    proto = qdq_nets.model(f"{DATA} {body}", known)
    model = folded(proto)
    assert nets.operators(model)["DequantizeLinear"] == 5
    feeds = nets.feeds(proto)
    true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, model))
    np.testing.assert_allclose(now, true, rtol=1e-6, atol=1e-6)


def test_gemm_takes_beta_into_its_integers() -> None:
    weight = Quantised((4, 8), 1)
    known = constants(weight)
    body = f"{weight.node} c = Gemm<alpha = 0.5, beta = 2.0>(j, d, o) {NORM}"
    proto = qdq_nets.model(
        f"{DATA} o = DequantizeLinear<axis = 0>(b, bs) {body}", known,
        given="float[5,4] x", made="float[5,8] y",
    )  # fmt: skip
    model = folded(proto)
    feeds = nets.feeds(proto)
    true, now = (qdq_nets.run(m, feeds)["y"] for m in (proto, model))
    assert qdq_nets.sqnr(true, now) > 50


def test_matmul_that_becomes_a_gemm_gains_a_bias_of_int32() -> None:
    weight = Quantised((4, 8), 1)
    proto = qdq_nets.model(
        f"{DATA} {weight.node} c = MatMul(j, d) {NORM}", constants(weight),
        given="float[5,4] x", made="float[5,8] y",
    )  # fmt: skip
    model = folded(proto)
    assert nets.operators(model)["Gemm"] == 1
    assert bias_of(model)[0].dtype == np.int32


# ---- never worse ----


@pytest.mark.parametrize(("gamma", "said"), [(1e-9, "overflows int32"), (1e9, "")])
def test_bias_that_does_not_fit_int32_keeps_the_step(gamma: float, said: str) -> None:
    known = constants()
    known["a_g"][3] = gamma
    result = bnfold.fold(net(f"{BIASED} {NORM}", known))
    if not said:
        assert not result.report.kept
        return
    (step,) = result.report.kept
    assert step.code == "BNF013"
    assert f"the bias {said} on channel 3" in step.sentence


def test_bias_whose_rounding_would_be_heard_keeps_the_step() -> None:
    """Of weights of one unit a bias rounded to a unit is as wrong as the rounded activations."""
    known = constants()
    known["q"] = np.zeros(SHAPE, np.int8)
    known["q"][:, 0, 0, 0] = 1
    (step,) = bnfold.fold(net(f"{BIASED} {NORM}", known)).report.kept
    assert step.code == "BNF013"
    assert "the bias is too coarse in int32" in step.sentence


def test_bias_that_is_not_around_zero_is_left_alone() -> None:
    known = {**constants(), "bz": np.ones(8, np.int32)}
    body = f"{BIASED} {NORM}".replace("(b, bs)", "(b, bs, bz)")
    proto = net(body, known)
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert result.report.kept[0].code == "BNF011"


@pytest.mark.parametrize("level", qdq_nets.LEVELS, ids=["plain", "optimised"])
@pytest.mark.parametrize("body", [BIASED, BARE], ids=["bias", "bare"])
def test_onnx_runtime_says_the_same_with_integers(body: str, level: Any) -> None:
    known = {**constants(), "ys": np.array(0.05, np.float32), "yz": np.array(0, np.int8)}
    ends = f"{NORM} "
    proto = net(
        f"{body} {ends.replace('[s] y', '[s] n')} r = Relu(n) "
        "p = QuantizeLinear(r, ys, yz) y = DequantizeLinear(p, ys, yz)", known,
    )  # fmt: skip
    model = folded(proto)
    feeds = nets.feeds(proto, 4)
    true = qdq_nets.run(proto, feeds)["y"]
    now = qdq_nets.on_ort(model, feeds, level)
    step = float(known["ys"])
    assert np.abs(now - true).max() <= 1.01 * step
    assert (np.abs(now - true) > 0.5 * step).mean() <= 0.01
