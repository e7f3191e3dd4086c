"""The traps that graph optimizers fall into, one case each: nothing is folded that must not be.

Every folded model here is valid, says the same in float64, and ONNX Runtime loads it in silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnfold
from bnfold.report.model import Report
from tests import nets


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def quiet(proto: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, Report]:
    """Fold ``proto``; the result is valid, says the same, and the runtime has no word to say."""
    model, report = nets.folded(proto, **options)
    assert nets.runtime_says(model) == ""
    return model, report


def unchanged(proto: onnx.ModelProto, code: str, **options: Any) -> Report:
    """Fold ``proto``, of which nothing can fold, for ``code``: it comes out as it went in."""
    model, report = quiet(proto, **options)
    assert nets.same(proto, model)
    assert set(nets.verdicts(report).values()) == {code}
    return report


# ---- 1. the channel axis moves between the linear operator and the BatchNorm ----

MOVED = {  # the channels of m lie on axis 2, those of the BatchNormalization on axis 1
    "Transpose": ("t = Transpose<perm=[0,2,1]>(m)", True),
    "Transpose and back": ("q = Transpose<perm=[0,2,1]>(m) t = Transpose<perm=[2,1,0]>(q)", True),
    "Reshape and Transpose": (
        """rows = Constant<value_ints=[16,2,2]>() q = Reshape(m, rows)
           back = Constant<value_ints=[4,4,4]>() r = Reshape(q, back)
           t = Transpose<perm=[1,2,0]>(r)""", True,
    ),
    "Reshape": ("rows = Constant<value_ints=[4,4,4]>() t = Reshape(m, rows)", False),
    "Transpose of the other two": ("t = Transpose<perm=[1,0,2]>(m)", False),
    "Transpose twice": (
        "q = Transpose<perm=[0,2,1]>(m) t = Transpose<perm=[0,2,1]>(q)", False,
    ),
    "lines that are mixed": (
        """flat = Constant<value_ints=[2,32]>() q = Reshape(m, flat) p = Transpose(q)
           rows = Constant<value_ints=[4,4,4]>() t = Reshape(p, rows)""", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("between", "reached"), MOVED.values(), ids=MOVED.keys())
def test_batchnorm_folds_where_its_axis_is_that_of_the_channels(
    between: str, reached: bool, rng: np.random.Generator
) -> None:
    # Every size is 4: shapes alone say nothing.
    proto = nets.model(
        f"""g (float[4,4,4] x) => (float[4,4,4] y) {{
            m = MatMul(x, w)
            {between}
            [bn] y = BatchNormalization(t, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 4, 4), **nets.batch_norm(rng, "a", 4)},
    )
    unchanged(proto, "BNF014", level="local")
    model, report = quiet(proto)
    assert nets.operators(model)["BatchNormalization"] == (not reached)
    assert (nets.verdicts(report) == {"bn": "backward"}) is reached
    assert nets.same(proto, model) is not reached


# ---- 2. a constant on the wrong axis ----


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)], ids=str)
def test_mul_along_width_height_or_batch_is_not_taken_for_channels(
    shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    proto = nets.model(
        """g (float[4,3,4,4] x) => (float[4,4,4,4] y) {
            c = Conv(x, w)
            [mul] y = Mul(c, k)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), "k": nets.weight(rng, *shape)},
    )
    assert nets.witness(unchanged(proto, "BNF006"), "mul") == ("Conv(c)",)


def test_constant_of_three_axes_after_a_conv_over_lines_lies_on_the_batch(
    rng: np.random.Generator,
) -> None:
    proto = nets.model(
        """g (float[4,3,5] x) => (float[4,4,5] y) {
            c = Conv(x, w)
            [mul] y = Mul(c, k)
        }""",
        {"w": nets.weight(rng, 4, 3, 1), "k": nets.weight(rng, 4, 1, 1)},
    )
    unchanged(proto, "BNF006")


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (1, 1, 1), (1,), ()], ids=str)
def test_mul_along_channels_folds(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[4,3,4,4] x) => (float[4,4,4,4] y) {
            c = Conv(x, w)
            [mul] y = Mul(c, k)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), "k": nets.weight(rng, *shape)},
    )
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"mul": "backward"}
    assert nets.operators(model) == {"Conv": 1}


def test_scalar_that_raises_the_rank_stays(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[1,2,4,4,4] y) {
            c = Conv(x, w)
            y = Mul(c, k)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), "k": nets.weight(rng, 1, 1, 1, 1, 1)},
    )
    model, report = quiet(proto)
    assert nets.same(proto, model)
    assert not report.folded


# ---- 3. statistics of the batch ----

TRAINING = {
    "14: training_mode": (14, "y, rm, rv = BatchNormalization<training_mode=1>"),
    "15: training_mode": (15, "y, rm, rv = BatchNormalization<training_mode=1>"),
    "9: extra outputs": (9, "y, rm, rv, sm, sv = BatchNormalization"),
    "7: extra outputs": (7, "y, rm, rv, sm, sv = BatchNormalization"),
    "6: is_test is 0": (6, "y, rm, rv, sm, sv = BatchNormalization"),
}


@pytest.mark.parametrize(("opset", "bn"), TRAINING.values(), ids=TRAINING.keys())
def test_batchnorm_in_training_mode_stays(opset: int, bn: str, rng: np.random.Generator) -> None:
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{
            c = Conv(x, w)
            [bn] {bn}(c, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        opset=opset,
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"bn": "BNF001"}


# ---- 4. a BatchNormalization that is not ai.onnx ----


def test_batchnorm_of_a_custom_domain_is_not_touched(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            y = custom.BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        domains=["custom"],
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert not result.report.steps


@pytest.mark.parametrize("operator", ["Conv", "Identity", "Mul"])
def test_no_operator_of_a_custom_domain_is_taken_for_the_standard_one(
    operator: str, rng: np.random.Generator
) -> None:
    calls = {"Conv": "c = custom.Conv(x, w)", "Identity": "i = Conv(x, w) c = custom.Identity(i)",
             "Mul": "i = Conv(x, w) c = custom.Mul(i, w)"}  # fmt: skip
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{
            {calls[operator]}
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        domains=["custom"],
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"bn": "BNF018"}
    assert nets.witness(result.report, "bn") == (f"{operator}(c)", "'y'")


# ---- 5. what half precision can't hold ----


def half_conv(scale: float, weights: float, **attributes: float) -> onnx.ModelProto:
    """A Conv in fp16 whose channel 2 is ``weights`` large and normalised by variance ``scale``."""
    w = np.ones((4, 3, 1, 1), np.float16)
    w[2] = weights
    one, variance = np.ones(4, np.float16), np.ones(4, np.float16)
    variance[2] = scale
    epsilon = attributes.get("epsilon", 1e-5)
    return nets.model(
        f"""g (float16[2,3,4,4] x) => (float16[2,4,4,4] y) {{
            c = Conv(x, w)
            [bn] y = BatchNormalization<epsilon={epsilon:.3e}>(c, one, zero, zero, v)
        }}""",
        {"w": w, "one": one, "zero": 0 * one, "v": variance},
    )


def test_weight_that_would_be_inf_in_half_precision_stays() -> None:
    report = unchanged(half_conv(1e-4, 1000), "BNF013")  # 1000 / sqrt(1.1e-4) is 95,000
    assert "overflows on channel 2" in report.kept[0].sentence


def test_weight_that_would_vanish_in_half_precision_stays() -> None:
    report = unchanged(half_conv(6e4, 1e-4), "BNF013")
    assert "underflows on channel 2" in report.kept[0].sentence


def test_dead_channel_in_half_precision_folds_to_finite_weights() -> None:
    # 1e-5 is 0 as a normal fp16 number: whoever adds it in fp16 divides by almost nothing.
    model, report = nets.folded(half_conv(0, 1e-3), 1e-3)
    assert nets.verdicts(report) == {"bn": "backward"}
    expected = np.float64(np.float16(1e-3)) / np.sqrt(np.float64(np.float32(1e-5)))
    assert nets.constant(model, "w")[2, 0, 0, 0] == np.float16(expected)


def test_scale_that_is_not_finite_stays() -> None:
    report = unchanged(half_conv(0, 1, epsilon=0), "BNF013")
    assert "channel 2 is not finite" in report.kept[0].sentence


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan], ids=str)
def test_division_that_is_not_finite_stays(bad: float, rng: np.random.Generator) -> None:
    divisor = nets.weight(rng, 4, 1, 1)
    divisor[1] = bad
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [div] y = Div(c, k)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), "k": divisor},
    )
    result = bnfold.fold(proto)
    if np.isinf(bad):  # dividing by it empties the channel, and nothing else
        assert nets.verdicts(result.report) == {"div": "backward"}
        assert not nets.constant(result.model, "w")[1].any()
        return
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"div": "BNF013"}


def test_one_fold_out_of_range_leaves_the_others_in(rng: np.random.Generator) -> None:
    huge = np.full(4, 1e6, np.float32)
    proto = nets.model(
        """g (float16[2,3,4,4] x) => (float16[2,4,4,4] y, float16[2,4,4,4] z) {
            c = Conv(x, w)
            [bad] y = BatchNormalization(c, big, zero, zero, one)
            d = Conv(x, w2)
            [good] z = BatchNormalization(d, one, one, zero, one)
        }""",
        {
            "w": nets.weight(rng, 4, 3, 1, 1, dtype=np.float16),
            "w2": nets.weight(rng, 4, 3, 1, 1, dtype=np.float16),
            "big": huge, "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32),
        },
    )  # fmt: skip
    _, report = nets.folded(proto, 1e-3)
    assert nets.verdicts(report) == {"bad": "BNF013", "good": "backward"}


# ---- 6. two float types meet ----


def test_half_conv_and_single_batchnorm_commit_in_half(rng: np.random.Generator) -> None:
    constants = {
        "w": nets.weight(rng, 4, 3, 1, 1, dtype=np.float16),
        **nets.batch_norm(rng, "a", 4),
    }
    constants["a_g"][1] = 0.5  # 1e-6 is out of the range of half precision
    proto = nets.model(
        """g (float16[2,3,4,4] x) => (float16[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        constants,
    )
    model, report = quiet(proto, tolerance=1e-3)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT16}


# ---- 7. an initializer that a caller may override ----


def overridable(rng: np.random.Generator, name: str, ir_version: int) -> onnx.ModelProto:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        ir=ir_version,
    )
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
    )
    return proto


@pytest.mark.parametrize(("name", "code"), [("a_v", "BNF002"), ("a_g", "BNF002"), ("w", "BNF003")])
@pytest.mark.parametrize("ir_version", [4, 8])
def test_override_of_an_initializer_is_kept(
    name: str, code: str, ir_version: int, rng: np.random.Generator
) -> None:
    proto = overridable(rng, name, ir_version)
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": code}
    other = {**nets.feeds(proto), name: 2 * nets.constant(proto, name) + 1}
    before, after = nets.run(proto, other), nets.run(model, other)
    np.testing.assert_array_equal(after["y"], before["y"])


@pytest.mark.parametrize("name", ["a_v", "w"])
def test_initializer_that_may_be_overridden_folds_when_it_is_trusted(
    name: str, rng: np.random.Generator
) -> None:
    model, report = nets.folded(overridable(rng, name, 8), trust_initializers=True)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert nets.operators(model) == {"Conv": 1}


# ---- 8. optional inputs and outputs given as "" ----


def test_empty_bias_is_no_bias(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w, "")
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert len(model.graph.node[0].input) == 3


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 17])
def test_empty_outputs_of_a_batchnorm_are_no_outputs(opset: int, rng: np.random.Generator) -> None:
    empty = '"", ""' if opset >= 14 else '"", "", "", ""'
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{
            c = Conv(x, w)
            [bn] y, {empty} = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        opset=opset,
    )
    result = bnfold.fold(proto)  # from 14 on, shape inference counts empty outputs too
    assert nets.verdicts(result.report) == {"bn": "backward"}
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.runtime_says(result.model) == ""
    proto.graph.node[1].output[1:] = []
    assert nets.difference(proto, result.model) <= 1e-6


def test_empty_optional_inputs_elsewhere_do_not_disturb(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,2,2] y) {
            k = Clip(x, "", six)
            c = Conv(k, w)
            [bn] b = BatchNormalization(c, a_g, a_b, a_m, a_v)
            d, "" = Dropout(b, "", "")
            y = Resize(d, "", "", sizes)
        }""",
        {
            "six": np.array(6, np.float32), "sizes": np.array([2, 4, 2, 2]),
            "w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4),
        },
    )  # fmt: skip
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert nets.operators(model)["BatchNormalization"] == 0


# ---- 9. what somebody else reads ----

SHARED = {
    "weight of two Convs": (
        "c = Conv(x, w) d = Conv(x, w)", "z = Relu(d)", "BNF005", ("Conv(d)",),
    ),
    "weight of a Conv and an operator that is none": (
        "c = Conv(x, w)", "z = Mul(w, s)", "BNF005", ("Mul(z)",),
    ),
    "weight behind Identity": (
        "v = Identity(w) c = Conv(x, v) d = Conv(x, w)", "z = Relu(d)", "BNF005", ("Conv(d)",),
    ),
    "weight that is an output": ("c = Conv(x, w)", "z = Identity(w)", "BNF005", ("output 'z'",)),
    "Conv with a second reader": (
        "c = Conv(x, w)", "z = Sigmoid(c)", "BNF018", ("Sigmoid(z)", "'y'"),
    ),
    "Conv with a second reader behind Identity": (
        "i = Conv(x, w) c = Identity(i)", "z = Sigmoid(i)", "BNF018", ("Sigmoid(z)", "'y'"),
    ),
    "Conv with a Relu beside the step": (
        "c = Conv(x, w)", "z = Relu(c)", "BNF018", ("'z'", "'y'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "other", "code", "witness"), SHARED.values(), ids=SHARED.keys())
def test_what_another_operator_reads_is_left_alone(
    make: str, other: str, code: str, witness: tuple[str, ...], rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,3,4,4] x, float s) => (float[2,4,4,4] y, float[A,B,C,D] z) {{
            {make}
            {other}
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert nets.verdicts(report) == {"bn": code}
    assert nets.witness(report, "bn") == witness
    _, report = nets.folded(proto, level="local")
    reader = f"{proto.graph.node[-2].op_type}(z)"
    second = {"BNF005": ("BNF005", witness), "BNF018": ("BNF007", (reader,))}
    assert (nets.verdicts(report)["bn"], nets.witness(report, "bn")) == second[code]


def test_conv_whose_output_is_an_output_of_the_graph_is_left_alone(
    rng: np.random.Generator,
) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] c) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    assert nets.witness(unchanged(proto, "BNF018"), "bn") == ("'c'", "'y'")
    assert nets.witness(unchanged(proto, "BNF008", level="local"), "bn") == ("'c'",)


def test_two_batchnorms_of_one_conv_stand_in_each_others_way(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {
            c = Conv(x, w)
            [one] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
            [two] z = BatchNormalization(c, b_g, b_b, b_m, b_v)
        }""",
        {
            "w": nets.weight(rng, 4, 3, 1, 1),
            **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "b", 4),
        },
    )  # fmt: skip
    # Both have a channel of scale 0: neither can be undone for the other.
    unchanged(proto, "BNF016")
    report = unchanged(proto, "BNF007", level="local")
    assert nets.witness(report, "one") == ("two",)
    assert nets.witness(report, "two") == ("one",)


def test_of_two_batchnorms_of_one_conv_that_can_be_undone_one_folds(
    rng: np.random.Generator,
) -> None:
    constants = {
        "w": nets.weight(rng, 4, 3, 1, 1),
        **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "b", 4),
    }  # fmt: skip
    constants["a_g"] = np.array([-1.5, 0.5, 2, 1], np.float32)
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {
            c = Conv(x, w)
            [one] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
            [two] z = BatchNormalization(c, b_g, b_b, b_m, b_v)
        }""",
        constants,
    )
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"one": "around", "two": "BNF016"}
    assert nets.operators(model) == {"Conv": 1, "BatchNormalization": 1}


def test_constants_that_are_outputs_too_stay_what_they_are(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[4,1,1] k, float[4] b) {
            c = Conv(x, w, b)
            [mul] y = Mul(c, k)
        }""",
        {
            "w": nets.weight(rng, 4, 3, 1, 1), "b": nets.weight(rng, 4),
            "k": nets.weight(rng, 4, 1, 1),
        },
    )  # fmt: skip
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"mul": "backward"}
    for name in ("k", "b"):
        np.testing.assert_array_equal(nets.constant(model, name), nets.constant(proto, name))


def test_bias_and_statistics_shared_by_all_fold_into_constants_of_their_own(
    rng: np.random.Generator,
) -> None:
    proto = nets.model(
        """g (float[2,4,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w, k)
            [one] d = BatchNormalization(c, k, k, k, v)
            t = Tanh(d)
            e = Conv(t, w2, k)
            [two] f = BatchNormalization(e, k, k, k, v)
            r = Relu(f)
            [three] y = Add(r, v4)
        }""",
        {
            "w": nets.weight(rng, 4, 4, 1, 1), "w2": nets.weight(rng, 4, 4, 1, 1),
            "k": nets.weight(rng, 4), "v": np.full(4, 2, np.float32),
            "v4": nets.weight(rng, 4, 1, 1),
        },
    )  # fmt: skip
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"one": "backward", "two": "backward", "three": "BNF017"}
    biases = [node.input[2] for node in model.graph.node if node.op_type == "Conv"]
    assert len(set(biases)) == 2


# ---- 10. biases and factors that must be scaled too; see also test_onnx_folds ----

SCALED = {
    "Conv bias": "c = Conv(x4, w4, k) [s] y = Mul(c, four)",
    "Gemm alpha": "g = Gemm<alpha=0.5>(x, w) [s] y = Mul(g, row)",
    "Gemm beta": "g = Gemm<beta=0.5>(x, w, k) [s] y = Mul(g, row)",
    "Gemm beta of 0": "g = Gemm<beta=0.0>(x, w, k) [s] y = Add(g, row)",
    "Gemm alpha, shift before it": "[s] a = Add(x, row) y = Gemm<alpha=0.5>(a, w, k)",
    "Gemm C absent": "g = Gemm(x, w) [s] y = Add(g, row)",
    "Gemm C of one column": "g = Gemm(x, w, column) [s] y = Mul(g, row)",
    "Gemm C of all": "g = Gemm(x, w, matrix) [s] y = Mul(g, row)",
}


@pytest.mark.parametrize("body", SCALED.values(), ids=SCALED.keys())
def test_bias_alpha_and_beta_are_taken_along(body: str, rng: np.random.Generator) -> None:
    image = "x4" in body
    x, y = ("float[2,3,4,4] x4", "float[2,3,4,4]") if image else ("float[3,3] x", "float[3,3]")
    constants = {
        "w4": nets.weight(rng, 3, 3, 1, 1), "k": nets.weight(rng, 3), "w": nets.weight(rng, 3, 3),
        "four": nets.weight(rng, 3, 1, 1), "row": nets.weight(rng, 3),
        "column": nets.weight(rng, 3, 1), "matrix": nets.weight(rng, 3, 3),
    }  # fmt: skip
    used = {name: value for name, value in constants.items() if name in nets.words(body)}
    model, report = quiet(nets.model(f"g ({x}) => ({y} y) {{ {body} }}", used))
    assert len(model.graph.node) == 1
    assert nets.verdicts(report)["s"] in ("backward", "forward")


# ---- 11. names ----


def test_new_constants_never_take_a_name_that_is_there(rng: np.random.Generator) -> None:
    taken = ["w_bias", "bias", "w_folded", "w_bias_1", "w_folded_1"]
    spare = " ".join(
        f"{name} = Relu({last})" for name, last in zip(taken, ["x", *taken], strict=False)
    )
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {{
            {spare}
            c = Conv({taken[-1]}, w)
            [one] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
            d = Conv(x, v)
            [two] z = BatchNormalization(d, b_g, b_b, b_m, b_v)
        }}""",
        {
            "w": nets.weight(rng, 4, 3, 1, 1), "v": nets.weight(rng, 4, 3, 1, 1),
            **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "b", 4),
        },
    )  # fmt: skip
    model, _ = quiet(proto)
    made = [name for node in model.graph.node for name in node.output]
    made += [tensor.name for tensor in model.graph.initializer]
    assert len(made) == len(set(made))
    assert nets.operators(model) == {"Relu": 5, "Conv": 2}


def test_new_constants_never_take_a_name_of_a_subgraph(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x, bool b) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] d = BatchNormalization(c, a_g, a_b, a_m, a_v)
            y = If(b) <
                then_branch = t () => (float[2,4,4,4] w_bias) { w_bias = Relu(d) },
                else_branch = e () => (float[2,4,4,4] u) { u = Neg(d) }>
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    model, report = nets.folded(proto)
    assert "w_bias" not in {tensor.name for tensor in model.graph.initializer}
    assert nets.verdicts(report)["bn"] == "backward"


# ---- 12. grouped ConvTranspose ----


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_conv_transpose_folds_on_its_own_axis(
    groups: int, rng: np.random.Generator
) -> None:
    # As many input channels as output channels of a group: the wrong axis would fit too.
    proto = nets.model(
        f"""g (float[2,8,4,4] x) => (float[2,C,H,W] y) {{
            c = ConvTranspose<group={groups}, strides=[2,2], pads=[1,1,1,1]>(x, w, k)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }}""",
        {
            "w": nets.weight(rng, 8, 8, 3, 3), "k": nets.weight(rng, 8 * groups),
            **nets.batch_norm(rng, "a", 8 * groups),
        },
    )  # fmt: skip
    _, report = quiet(proto)
    assert nets.verdicts(report) == {"bn": "backward"}


# ---- 13. Linear, then BatchNorm1d over (N, C, L) ----


@pytest.mark.parametrize("length", [5, 4], ids=["C != L", "C == L"])
def test_batchnorm_over_another_axis_than_the_matmul_stays(
    length: int, rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,4,6] x) => (float[2,4,{length}] y) {{
            m = MatMul(x, w)
            [bn] y = BatchNormalization(m, a_g, a_b, a_m, a_v)
        }}""",
        {"w": nets.weight(rng, 6, length), **nets.batch_norm(rng, "a", 4)},
    )
    assert nets.witness(unchanged(proto, "BNF006"), "bn") == ("MatMul(m)",)
    unchanged(proto, "BNF006", level="local")


# ---- 15. signs, unknown sizes, broadcasts, incomplete sums ----


@pytest.mark.parametrize("negative", [(), (2,), (0, 1, 2, 3)], ids=["none", "one", "all"])
def test_only_a_positive_scale_passes_a_relu(
    negative: tuple[int, ...], rng: np.random.Generator
) -> None:
    factors = np.abs(nets.weight(rng, 4, 1, 1))
    factors[list(negative)] *= -1
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,3,4,4] y) {
            c = Conv(x, w)
            r = Relu(c)
            [mul] m = Mul(r, k)
            s = Relu(m)
            y = Conv(s, w2)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), "w2": nets.weight(rng, 3, 4, 1, 1), "k": factors},
    )
    unchanged(proto, "BNF014", level="local")
    if negative:
        report = unchanged(proto, "BNF015")
        assert nets.witness(report, "mul")[0] in ("Relu(r)", "Relu(s)")
        assert f"on channel {negative[0]}" in report.steps[0].sentence
        return
    model, report = quiet(proto)
    assert nets.operators(model) == {"Conv": 2, "Relu": 2}


def test_channel_whose_size_is_unknown_stays(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[N,C,4,4] x) => (float[N,D,4,4] y) {
            [mul] m = Mul(x, k)
            y = Conv(m, w)
        }""",
        {"w": nets.weight(rng, 3, 4, 1, 1), "k": nets.weight(rng, 4, 1, 1)},
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"mul": "BNF006"}


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
def test_constant_that_enlarges_its_input_is_no_step(
    operator: str, rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,3,4,4] x) => (float[2,5,4,4] y) {{
            c = Conv(x, w)
            y = {operator}(c, k)
        }}""",
        {"w": nets.weight(rng, 1, 3, 1, 1), "k": nets.weight(rng, 5, 1, 1)},
    )
    model, report = quiet(proto)
    assert nets.same(proto, model)
    assert not report.steps


PADDED = {
    "pads": ("Conv<pads=[1,1,1,1]>", (4, 3, 3, 3), "BNF010"),
    "asymmetric pads": ("Conv<pads=[0,0,0,1]>", (4, 3, 3, 3), "BNF010"),
    "SAME_UPPER": ('Conv<auto_pad="SAME_UPPER">', (4, 3, 3, 3), "BNF010"),
    "SAME_LOWER": ('Conv<auto_pad="SAME_LOWER">', (4, 3, 2, 2), "BNF010"),
    "SAME_UPPER, stride, kernel 1": (
        'Conv<auto_pad="SAME_UPPER", strides=[2,2]>', (4, 3, 1, 1), "forward",
    ),
    "VALID": ('Conv<auto_pad="VALID">', (4, 3, 3, 3), "forward"),
    "no pads": ("Conv", (4, 3, 3, 3), "forward"),
    "pads of 0": ("Conv<pads=[0,0,0,0]>", (4, 3, 3, 3), "forward"),
    "transposed, border": ("ConvTranspose", (3, 4, 3, 3), "BNF010"),
    "transposed, output_padding": (
        "ConvTranspose<strides=[2,2], output_padding=[1,1]>", (3, 4, 2, 2), "BNF010",
    ),
    "transposed, gaps": ("ConvTranspose<strides=[2,2]>", (3, 4, 1, 1), "BNF010"),
    "transposed, output_shape": ("ConvTranspose<output_shape=[5,5]>", (3, 4, 1, 1), "BNF010"),
    "transposed, kernel 1": ("ConvTranspose", (3, 4, 1, 1), "forward"),
}  # fmt: skip


@pytest.mark.parametrize(("conv", "shape", "verdict"), PADDED.values(), ids=PADDED.keys())
def test_shift_never_passes_zeros_or_an_incomplete_sum(
    conv: str, shape: tuple[int, ...], verdict: str, rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,3,5,5] x) => (float[2,4,H,W] y) {{
            r = Relu(x)
            [bn] b = BatchNormalization(r, a_g, a_b, a_m, a_v)
            y = {conv}(b, w, k)
        }}""",
        {"w": nets.weight(rng, *shape), "k": nets.weight(rng, 4), **nets.batch_norm(rng, "a", 3)},
    )
    _, report = quiet(proto)
    assert nets.verdicts(report) == {"bn": verdict}


@pytest.mark.parametrize(("conv", "shape"), [row[:2] for row in PADDED.values()], ids=PADDED.keys())
def test_scale_passes_every_conv(
    conv: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,3,5,5] x) => (float[2,4,H,W] y) {{
            r = Relu(x)
            [mul] b = Mul(r, s)
            y = {conv}(b, w, k)
        }}""",
        {"w": nets.weight(rng, *shape), "k": nets.weight(rng, 4), "s": nets.weight(rng, 3, 1, 1)},
    )
    _, report = quiet(proto)
    assert nets.verdicts(report) == {"mul": "forward"}


# ---- 16. old and unusual models ----


def test_model_of_ir_version_3_folds_and_stays_one(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
        ir=3, opset=8,
    )  # fmt: skip
    nets.declare_initializers(proto)
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert model.ir_version == 3
    assert {value.name for value in model.graph.input} == {"x", "w", "w_bias"}


def test_ai_onnx_is_the_default_domain_by_its_other_name(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    sound = onnx.ModelProto.FromString(proto.SerializeToString())
    proto.opset_import[0].domain = "ai.onnx"
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.verdicts(result.report) == {"bn": "backward"}
    assert nets.runtime_says(result.model) == ""
    result.model.opset_import[0].domain = ""
    assert nets.difference(sound, result.model) <= 1e-6


def test_graph_that_is_not_sorted_folds(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] b = BatchNormalization(c, a_g, a_b, a_m, a_v)
            y = Relu(b)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    sound = onnx.ModelProto.FromString(proto.SerializeToString())
    proto.graph.node.reverse()
    result = bnfold.fold(ir.from_proto(proto))
    assert nets.verdicts(result.report) == {"bn": "backward"}
    result.model.graph.sort()
    assert nets.difference(sound, ir.to_proto(result.model)) <= 1e-6


def test_weight_made_by_constant_of_shape_folds(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            w = ConstantOfShape<value = float[1] {0.25}>(shape)
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"shape": np.array([4, 3, 1, 1]), **nets.batch_norm(rng, "a", 4)},
    )
    model, report = quiet(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert nets.operators(model) == {"Conv": 1}


SUBGRAPHS = {
    "If": """y = If(b) <
        then_branch = t () => (float[2,4,4,4] u) { u = Relu(c) },
        else_branch = e () => (float[2,4,4,4] v) { v = Neg(x4) }>""",
    "Loop": """y = Loop(n, "", x4) <
        body = l (int64 i, bool k, float[2,4,4,4] p) => (bool k2, float[2,4,4,4] q) {
            k2 = Identity(k) q = Add(p, c) }>""",
    "Scan": """y = Scan<num_scan_inputs=1,
        body = s (float[4,4,4] p) => (float[2,4,4,4] q) { q = Add(p, c) }>(x4)""",
}  # fmt: skip


@pytest.mark.parametrize("control", SUBGRAPHS.values(), ids=SUBGRAPHS.keys())
def test_value_that_a_subgraph_captures_keeps_its_units(
    control: str, rng: np.random.Generator
) -> None:
    proto = nets.model(
        f"""g (float[2,3,4,4] x, float[2,4,4,4] x4, bool b) => (float[2,4,4,4] z, y) {{
            n = Constant<value = int64 {{2}}>()
            c = Conv(x, w)
            [bn] z = BatchNormalization(c, a_g, a_b, a_m, a_v)
            {control}
        }}""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    shape = [2, 2, 4, 4, 4] if control.startswith("y = Scan") else [2, 4, 4, 4]
    proto.graph.output[1].CopyFrom(
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    )
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert nets.verdicts(report)["bn"] == "BNF018"
    assert nets.witness(report, "bn") == ("'c'", "'z'")
    _, report = nets.folded(proto, level="local")
    assert nets.verdicts(report)["bn"] == "BNF009"
    assert nets.witness(report, "bn") == ("'c'",)


def test_sequences_and_optionals_do_not_disturb(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, seq(float[2,4,4,4]) s,
                                    optional(float[2,4,4,4]) o) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
            s = SequenceConstruct(y, y)
            o = Optional(y)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.verdicts(result.report) == {"bn": "backward"}
    assert result.model.graph.output == proto.graph.output
    assert nets.runtime_says(result.model) == ""


def test_conv_whose_output_enters_a_sequence_is_left_alone(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, seq(float[2,4,4,4]) s) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
            s = SequenceConstruct(c)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report) == {"bn": "BNF018"}
    assert nets.witness(result.report, "bn") == ("SequenceConstruct(s)", "'y'")


# ---- 17. one that can't fold stops no other, and what was given stays as it was ----


def test_steps_that_stay_stop_no_other(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {
            [no_linear] p = BatchNormalization(x, p_g, p_b, p_m, p_v)
            q = Relu(p)
            c = Conv(q, w)
            [good] d = BatchNormalization(c, a_g, a_b, a_m, a_v)
            t = Tanh(d)
            e = Conv(t, w2)
            [training] f, rm, rv = BatchNormalization<training_mode=1>(e, a_g, a_b, a_m, a_v)
            z = Conv(f, w3)
            [boundary] r = BatchNormalization(z, a_g, a_b, a_m, a_v)
            y = Relu(r)
        }""",
        {
            "w": nets.weight(rng, 4, 3, 1, 1), "w2": nets.weight(rng, 4, 4, 1, 1),
            "w3": nets.weight(rng, 4, 4, 1, 1),
            **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "p", 3),
        },
    )  # fmt: skip
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {
        "no_linear": "BNF017", "good": "backward", "training": "BNF001", "boundary": "BNF018",
    }  # fmt: skip


def test_the_model_given_is_never_changed(rng: np.random.Generator) -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,4,4] y) {
            c = Conv(x, w)
            [bn] y = BatchNormalization(c, a_g, a_b, a_m, a_v)
        }""",
        {"w": nets.weight(rng, 4, 3, 1, 1), **nets.batch_norm(rng, "a", 4)},
    )
    before = proto.SerializeToString(deterministic=True)
    given = ir.from_proto(proto)
    result = bnfold.fold(given)
    assert result.model is not given
    assert ir.to_proto(given).SerializeToString(deterministic=True) == ir.to_proto(
        ir.from_proto(proto)
    ).SerializeToString(deterministic=True)
    assert proto.SerializeToString(deterministic=True) == before
    assert len(given.graph) == 2


# ---- the judges can say no ----


def test_runtime_is_heard_when_an_initializer_dangles(rng: np.random.Generator) -> None:
    proto = nets.model("g (float[2] x) => (float[2] y) { y = Relu(x) }", {"w": nets.weight(rng, 2)})
    assert "w" in nets.runtime_says(proto)
    with pytest.raises(AssertionError):
        nets.assert_nothing_dangles(proto)


def test_difference_sees_one_weight_off_by_one_part_in_a_million(
    rng: np.random.Generator,
) -> None:
    w = nets.weight(rng, 4, 3, 1, 1)
    text = "g (float[2,3,4,4] x) => (float[2,4,4,4] y) { y = Conv(x, w) }"
    other = w.copy()
    other[np.unravel_index(np.abs(w).argmax(), w.shape)] *= 1 + 1e-5
    assert nets.difference(nets.model(text, {"w": w}), nets.model(text, {"w": other})) > 1e-7
