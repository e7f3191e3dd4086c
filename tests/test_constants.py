"""Constants are what evaluates to a constant, and nothing else: they are found where they hide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import bnfold
from bnfold.errors import ModelError
from tests import nets

F64 = NDArray[np.float64]
BN = "BatchNormalization"
EPSILON = float(np.float32(1e-5))


def stored() -> dict[str, nets.Array]:
    """What the constants here are made from; a net takes what its text names."""
    rng = np.random.default_rng(0)
    return {
        "w": nets.weight(rng, 4, 3, 2, 2), "flat": nets.weight(rng, 48),
        "turned": nets.weight(rng, 2, 2, 3, 4), "half": nets.weight(rng, 4, 3, 2, 2, dtype="f2"),
        "wide": nets.weight(rng, 4, 3, 2, 2, dtype="f8"), "upper": nets.weight(rng, 2, 3, 2, 2),
        "lower": nets.weight(rng, 2, 3, 2, 2), "large": nets.weight(rng, 6, 3, 2, 2),
        "thin": nets.weight(rng, 4, 3), "whole": rng.integers(-3, 4, (4, 3, 2, 2)),
        "shape": np.array([4, 3, 2, 2]), "one": np.ones(1, np.float32),
        "gain": nets.weight(rng, 4, 1, 1, 1), "small": np.full((), 1e-3, np.float32),
        "last": np.array([2, 3]), "others": np.array([1, 2, 3]), "zero": np.array([0]),
        "four": np.array([4]), "rows": np.array([1, 4, -1]), "lines": np.array([4, -1]),
        "ones4": np.ones(4, np.float32), "zeros4": np.zeros(4, np.float32),
        "ones12": np.ones(12, np.float32), "zeros12": np.zeros(12, np.float32),
        "column": nets.weight(rng, 4, 1, 1), **nets.batch_norm(rng, "n", 4),
    }  # fmt: skip


def net(body: str, extra: Mapping[str, nets.Array] | None = None, **header: Any) -> onnx.ModelProto:
    """A model from an image with the constants that ``body`` names."""
    everything = {**stored(), **(extra or {})}
    used = {name: value for name, value in everything.items() if name in nets.words(body)}
    return nets.model(f"g (float[2,3,4,4] x) => (float[2,4,3,3] y) {{ {body} }}", used, **header)


def statistics() -> tuple[F64, F64]:
    """Scale and shift of the BatchNorm ``n``."""
    g, b, m, v = (stored()[f"n_{p}"].astype(np.float64) for p in "gbmv")
    scale = g / np.sqrt(v + EPSILON)
    return scale, b - m * scale


def wide(name: str) -> F64:
    return stored()[name].astype(np.float64)


# ---- a weight behind other operators ----

WEIGHTS: dict[str, tuple[str, F64]] = {
    "Identity": ("v = Identity(w)", wide("w")),
    "Identity of Identity": ("u = Identity(w) v = Identity(u)", wide("w")),
    "Cast from half": ("v = Cast<to = 1>(half)", wide("half")),
    "Cast from double": ("v = Cast<to = 1>(wide)", wide("wide")),
    "Cast from integers": ("v = Cast<to = 1>(whole)", wide("whole")),
    "Cast to integers and back": (
        "u = Cast<to = 7>(w) v = Cast<to = 1>(u)", np.trunc(wide("w")),
    ),
    "CastLike": ("v = CastLike(half, one)", wide("half")),
    "Reshape": ("v = Reshape(flat, shape)", wide("flat").reshape(4, 3, 2, 2)),
    "Reshape with 0 and -1": (
        "s = Constant<value_ints = [0, 0, -1, 2]>() u = Reshape(w, s) v = Identity(u)", wide("w"),
    ),
    "Unsqueeze, Expand": (
        "u = Unsqueeze(thin, last) v = Expand(u, shape)",
        np.broadcast_to(wide("thin")[:, :, None, None], (4, 3, 2, 2)),
    ),
    "Transpose": ("v = Transpose<perm = [3,2,1,0]>(turned)", wide("turned").transpose(3, 2, 1, 0)),
    "Transpose without perm": ("v = Transpose(turned)", wide("turned").T),
    "Sqrt": ("u = Abs(w) v = Sqrt(u)", np.sqrt(np.abs(wide("w")))),
    "Neg": ("v = Neg(w)", -wide("w")),
    "Mul": ("v = Mul(w, gain)", wide("w") * wide("gain")),
    "Div, Sub, Add": (
        "a = Div(w, gain) b = Sub(a, gain) v = Add(w, b)",
        wide("w") / wide("gain") - wide("gain") + wide("w"),
    ),
    "Pow, Exp, Reciprocal": (
        "two = Constant<value_float = 2.0>() a = Pow(w, two) b = Exp(a) v = Reciprocal(b)",
        1 / np.exp(wide("w") ** 2),
    ),
    "Concat": (
        "v = Concat<axis = 0>(upper, lower)", np.concatenate([wide("upper"), wide("lower")]),
    ),
    "Slice": ("v = Slice(large, zero, four, zero)", wide("large")[:4]),
    "Gather": (
        "at = Constant<value_ints = [5, 1, 3, 0]>() v = Gather(large, at)",
        wide("large")[[5, 1, 3, 0]],
    ),
    "Split": (
        "n = Constant<value_ints = [2, 4]>() u, v = Split<axis = 0>(large, n)", wide("large")[2:],
    ),
    "Where": (
        "u = Neg(w) p = Less(w, small) v = Where(p, u, w)",
        np.where(wide("w") < wide("small"), -wide("w"), wide("w")),
    ),
    "Shape, ConstantOfShape": (
        "s = Shape(w) u = ConstantOfShape<value = float[1] {0.75}>(s) v = Mul(u, w)",
        0.75 * wide("w"),
    ),
    "ConstantOfShape": (
        "v = ConstantOfShape<value = float[1] {0.75}>(shape)", np.full((4, 3, 2, 2), 0.75),
    ),
    "Constant value_floats": (
        f"u = Constant<value_floats = [{', '.join(f'{i}.5' for i in range(12))}]>() "
        "s = Constant<value_ints = [4, 3, 1, 1]>() r = Reshape(u, s) v = Expand(r, shape)",
        np.broadcast_to(np.arange(12).reshape(4, 3, 1, 1) + 0.5, (4, 3, 2, 2)),
    ),
    "Constant value_float": (
        "u = Constant<value_float = -1.5>() v = Expand(u, shape)", np.full((4, 3, 2, 2), -1.5),
    ),
    "Constant value_int": (
        "u = Constant<value_int = 3>() f = Cast<to = 1>(u) v = Expand(f, shape)",
        np.full((4, 3, 2, 2), 3.0),
    ),
    "Constant value": (
        "u = Constant<value = float[4,1,1,1] {1.0, -2.0, 3.0, 0.5}>() v = Expand(u, shape)",
        np.broadcast_to(np.reshape([1, -2, 3, 0.5], (4, 1, 1, 1)), (4, 3, 2, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "weight"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weight_is_found_behind_operators_over_constants(make: str, weight: F64) -> None:
    proto = net(f"{make} c = Conv(x, v) [bn] y = {BN}(c, n_g, n_b, n_m, n_v)")
    model, report = nets.folded(proto)
    assert nets.verdicts(report)["bn"] == "backward"
    assert set(nets.verdicts(report).values()) <= {"backward", "evaluated"}
    assert nets.operators(model) == {"Conv": 1}
    assert nets.runtime_says(model) == ""
    scale, shift = statistics()
    held = [nets.constant(model, name) for name in model.graph.node[0].input[1:]]
    np.testing.assert_array_equal(held[0], (weight * scale.reshape(-1, 1, 1, 1)).astype(np.float32))
    np.testing.assert_array_equal(held[1], shift.astype(np.float32))


@pytest.mark.parametrize(("make", "weight"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weight_that_nothing_folds_into_stays_where_it_is_unless_it_is_arithmetic(
    make: str, weight: F64
) -> None:
    del weight
    proto = net(f"{make} y = Conv(x, v)")
    model, report = nets.folded(proto)
    assert set(nets.verdicts(report).values()) <= {"evaluated"}
    if not report.steps:
        assert nets.same(proto, model)


# ---- parameters behind other operators ----

PARAMETERS: dict[str, str] = {
    "Identity": "p = Identity(n_v)",
    "Expand": "p = Expand(one, four)",
    "Expand to the Shape of another": "s = Shape(n_g) p = Expand(one, s)",
    "CastLike": "h = Cast<to = 10>(n_v) p = CastLike(h, n_g)",
    "Cast from double": "h = Cast<to = 11>(n_v) p = Cast<to = 1>(h)",
    "Sqrt of a square": "two = Constant<value_float = 2.0>() q = Pow(n_v, two) p = Sqrt(q)",
    "Squeeze": "p = Squeeze(c4, others)",
    "Reshape": "p = Reshape(c4, four)",
    "ConstantOfShape": "p = ConstantOfShape<value = float[1] {2.0}>(four)",
    "Shape of the weight": ("s = Shape<end = 1>(w) p = ConstantOfShape<value = float[1] {2.0}>(s)"),
    "arithmetic": "a = Mul(n_v, n_v) b = Add(a, small) p = Sqrt(b)",
}


@pytest.mark.parametrize("make", PARAMETERS.values(), ids=PARAMETERS.keys())
@pytest.mark.parametrize("place", ["scale", "variance"])
def test_batchnorm_parameters_are_found_behind_operators(make: str, place: str) -> None:
    read = "p, n_b, n_m, n_v" if place == "scale" else "n_g, n_b, n_m, p"
    proto = net(
        f"{make} c = Conv(x, w) [bn] y = {BN}(c, {read})",
        {"c4": np.full((4, 1, 1, 1), 2, np.float32)},
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report)["bn"] == "backward"
    assert nets.operators(model) == {"Conv": 1}


OPERANDS: dict[str, str] = {
    "Identity": "p = Identity(column)",
    "Unsqueeze": "axes = Constant<value_ints = [1, 2]>() p = Unsqueeze(n_v, axes)",
    "Reshape": "s = Constant<value_ints = [-1, 1, 1]>() p = Reshape(n_v, s)",
    "Cast": "h = Cast<to = 11>(column) p = Cast<to = 1>(h)",
    "Constant": "p = Constant<value = float[4,1,1] {1.0, -2.0, 3.0, 0.5}>()",
    "Constant scalar": "p = Constant<value_float = -1.5>()",
    "Expand": "s = Constant<value_ints = [4, 1, 1]>() p = Expand(one, s)",
}


@pytest.mark.parametrize("make", OPERANDS.values(), ids=OPERANDS.keys())
@pytest.mark.parametrize("step", ["Mul(c, p)", "Mul(p, c)", "Div(c, p)", "Sub(p, c)"])
def test_constants_of_arithmetic_are_found_behind_operators(make: str, step: str) -> None:
    model, report = nets.folded(net(f"{make} c = Conv(x, w) [s] y = {step}"))
    assert nets.verdicts(report)["s"] in ("backward", "identity")
    assert nets.operators(model) == {"Conv": 1}


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 18, 21])
def test_axes_are_found_wherever_the_version_has_them(opset: int) -> None:
    axes = "<axes = [1, 2]>(n_v)" if opset < 13 else "(n_v, axes)"
    mean = "<axes = [1,2,3]>(w)" if opset < 18 else "(w, others)"
    early = "axes = Constant<value = int64[2] {1, 2}>() " if opset >= 13 else ""
    proto = net(
        f"""{early}p = Unsqueeze{axes} m = ReduceMean{mean} v = Sub(w, m)
            c = Conv(x, v) [s] y = Mul(c, p)""",
        opset=opset,
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"Sub(v)": "evaluated", "s": "backward"}
    assert nets.operators(model) == {"Conv": 1}
    weight = wide("w") - wide("w").mean(axis=(1, 2, 3), keepdims=True)
    exact = (weight * wide("n_v").reshape(-1, 1, 1, 1)).astype(np.float32)
    np.testing.assert_array_equal(nets.constant(model, model.graph.node[0].input[1]), exact)


def test_constants_inside_a_body_are_found_outside_it_too() -> None:
    proto = nets.model(
        f"""g (float[2,3,4,4] x, bool t) => (float[2,4,3,3] y) {{
            v = Identity(w) p = Sqrt(n_v)
            y = If(t) <
                then_branch = th () => (float[2,4,3,3] b) {{
                    u = Transpose<perm = [0,1,3,2]>(v) c = Conv(x, u)
                    [bn] b = {BN}(c, n_g, n_b, n_m, p) }},
                else_branch = el () => (float[2,4,3,3] e) {{ e = Conv(x, v2) }}>
        }}""",
        {name: stored()[name] for name in ("w", "n_g", "n_b", "n_m", "n_v")}
        | {"v2": stored()["large"][:4]},
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert {node.op_type for node in nets.nodes(model)} == {"If", "Conv"}


# ---- weight standardisation ----


def standardised(epsilon: float) -> F64:
    w = wide("w")
    centred = w - w.mean(axis=(1, 2, 3), keepdims=True)
    result: F64 = centred / np.sqrt((centred**2).mean(axis=(1, 2, 3), keepdims=True) + epsilon)
    return result


def over_channels() -> F64:
    """Standardised per kernel: over the last two axes."""
    w = wide("w")
    centred = w - w.mean(axis=(2, 3), keepdims=True)
    result: F64 = centred / np.sqrt((centred**2).mean(axis=(2, 3), keepdims=True) + EPSILON)
    return result


SMALL = float(np.float32(1e-3))

STANDARDISATIONS: dict[str, tuple[int, str, F64]] = {
    "mean and variance": (
        17,
        """m = ReduceMean<axes = [1,2,3]>(w) d = Sub(w, m) q = Mul(d, d)
           s = ReduceMean<axes = [1,2,3]>(q) e = Add(s, small) r = Sqrt(e) v = Div(d, r)""",
        standardised(SMALL),
    ),
    "mean and variance, version 18": (
        18,
        """m = ReduceMean(w, others) d = Sub(w, m) two = Constant<value_float = 2.0>()
           q = Pow(d, two) s = ReduceMean(q, others) e = Add(s, small) r = Sqrt(e)
           v = Div(d, r)""",
        standardised(SMALL),
    ),
    "with a gain": (
        17,
        """m = ReduceMean<axes = [1,2,3]>(w) d = Sub(w, m) q = Mul(d, d)
           s = ReduceMean<axes = [1,2,3]>(q) e = Add(s, small) r = Sqrt(e) n = Div(d, r)
           v = Mul(n, gain)""",
        standardised(SMALL) * wide("gain"),
    ),
    "the reciprocal of the root": (
        17,
        """m = ReduceMean<axes = [1,2,3]>(w) d = Sub(w, m) q = Mul(d, d)
           s = ReduceMean<axes = [1,2,3]>(q) e = Add(s, small) r = Sqrt(e) i = Reciprocal(r)
           v = Mul(d, i)""",
        standardised(SMALL),
    ),
    "BatchNormalization in training mode": (
        17,
        f"""u = Reshape(w, rows)
            n, rm, rv = {BN}<training_mode = 1>(u, ones4, zeros4, zeros4, ones4)
            v = Reshape(n, shape)""",
        standardised(EPSILON),
    ),
    "BatchNormalization in training mode, Shape of the weight": (
        15,
        f"""u = Reshape(w, rows) s = Shape(w)
            n, rm, rv = {BN}<training_mode = 1>(u, ones4, zeros4, zeros4, ones4)
            v = Reshape(n, s)""",
        standardised(EPSILON),
    ),
    "InstanceNormalization": (
        17,
        """u = Reshape(w, rows) n = InstanceNormalization(u, ones4, zeros4)
           v = Reshape(n, shape)""",
        standardised(EPSILON),
    ),
    "LayerNormalization": (
        17,
        """u = Reshape(w, lines) n = LayerNormalization(u, ones12, zeros12)
           v = Reshape(n, shape)""",
        standardised(EPSILON),
    ),
    "LayerNormalization over all axes but the first": (
        17, "o = Constant<value_float = 1.0>() k = Shape<start = 1>(w) l = Expand(o, k) "
        "v = LayerNormalization<axis = 1>(w, l)",
        standardised(EPSILON),
    ),
    "InstanceNormalization of each kernel": (
        17, "v = InstanceNormalization(w, ones3, zeros3)", over_channels(),
    ),
}  # fmt: skip

THREE = {"ones3": np.ones(3, np.float32), "zeros3": np.zeros(3, np.float32)}
STANDARD = (STANDARDISATIONS.values(), STANDARDISATIONS.keys())


@pytest.mark.parametrize(("opset", "make", "weight"), STANDARD[0], ids=STANDARD[1])
def test_weight_standardisation_is_evaluated_away(opset: int, make: str, weight: F64) -> None:
    model, report = nets.folded(net(f"{make} y = Conv(x, v)", THREE, opset=opset))
    assert set(nets.verdicts(report).values()) == {"evaluated"}
    assert nets.operators(model) == {"Conv": 1}
    assert nets.runtime_says(model) == ""
    held = nets.constant(model, model.graph.node[0].input[1])
    np.testing.assert_array_equal(held, weight.astype(np.float32))


@pytest.mark.parametrize(("opset", "make", "weight"), STANDARD[0], ids=STANDARD[1])
def test_weight_standardisation_and_batchnorm_round_once(
    opset: int, make: str, weight: F64
) -> None:
    body = f"{make} c = Conv(x, v) [bn] y = {BN}(c, n_g, n_b, n_m, n_v)"
    model, report = nets.folded(net(body, THREE, opset=opset))
    assert nets.verdicts(report)["bn"] == "backward"
    assert nets.operators(model) == {"Conv": 1}
    held = nets.constant(model, model.graph.node[0].input[1])
    scale, _ = statistics()
    np.testing.assert_array_equal(held, (weight * scale.reshape(-1, 1, 1, 1)).astype(np.float32))


def test_standardised_weight_of_two_convs_is_evaluated_once_and_shared() -> None:
    body = f"""{STANDARDISATIONS["mean and variance"][1]} a = Conv(x, v) b = Conv(x, v)
        [s] c = Mul(a, column) y = Max(b, c)"""
    model, report = nets.folded(net(body))
    assert nets.verdicts(report)["s"] == "BNF005"
    assert nets.operators(model) == {"Conv": 2, "Mul": 1, "Max": 1}
    assert model.graph.node[0].input[1] == model.graph.node[1].input[1]


# ---- what is no constant ----

RANDOM = {
    "RandomNormal": "v = RandomNormal<shape = [4,3,2,2], seed = 1.0>()",
    "RandomUniform": "v = RandomUniform<shape = [4,3,2,2]>()",
    "RandomNormalLike": "v = RandomNormalLike(w)",
    "RandomUniformLike": "v = RandomUniformLike<seed = 1.0>(w)",
    "Bernoulli": "u = Sigmoid(w) v = Bernoulli(u)",
    "Dropout in training": "h = Constant<value_float = 0.5>() t = Constant<value = bool {1}>() "
    "v = Dropout(w, h, t)",
    "arithmetic over it": "u = RandomNormalLike(w) v = Mul(u, gain)",
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())
def test_what_is_drawn_at_random_is_never_a_constant(make: str) -> None:
    proto = net(f"{make} c = Conv(x, v) [bn] y = {BN}(c, n_g, n_b, n_m, n_v)")
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report)["bn"] == "BNF003"
    assert not result.report.folded


DYNAMIC = {
    "Shape of an activation": "s = Shape(x) p = ConstantOfShape(s) m = ReduceMean(p) v = Add(w, m)",
    "an activation": "m = ReduceMean(x) v = Mul(w, m)",
    "a custom operator": "v = custom.Identity(w)",
}


@pytest.mark.parametrize("make", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_what_the_model_computes_from_its_inputs_is_no_constant(make: str) -> None:
    proto = net(f"{make} c = Conv(x, v) [s] y = {BN}(c, n_g, n_b, n_m, n_v)", domains=["custom"])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert nets.verdicts(result.report)["s"] == "BNF003"


def test_what_an_if_chooses_is_no_constant() -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x, bool t) => (float[2,4,3,3] y) {
            v = If(t) < then_branch = th () => (float[4,3,2,2] a) { a = Identity(w) },
                        else_branch = el () => (float[4,3,2,2] b) { b = Neg(w) }>
            c = Conv(x, v) [s] y = Mul(c, column) }""",
        {name: stored()[name] for name in ("w", "column")},
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report)["s"] == "BNF003"
    assert nets.operators(model)["If"] == 1


# ---- quantised weights ----

QUANTISED = {
    "one scale": "v = DequantizeLinear(q, one_scale, one_zero)",
    "a scale for each channel": "v = DequantizeLinear<axis = 0>(q, scales, zeros)",
    "quantised in the graph": (
        "i = QuantizeLinear(w, one_scale, one_zero) v = DequantizeLinear(i, one_scale, one_zero)"
    ),
    "behind Identity": "u = DequantizeLinear(q, one_scale, one_zero) v = Identity(u)",
    "behind Transpose": (
        "u = DequantizeLinear(q, one_scale, one_zero) v = Transpose<perm = [0,1,3,2]>(u)"
    ),
    "behind Reshape": ("u = DequantizeLinear(q, one_scale, one_zero) v = Reshape(u, square)"),
}
INTEGERS: dict[str, nets.Array] = {
    "q": np.random.default_rng(1).integers(-100, 100, (4, 3, 2, 2)).astype(np.int8),
    "one_scale": np.array(0.01, np.float32), "one_zero": np.array(0, np.int8),
    "square": np.array([4, 3, 2, 2]),
    "scales": np.array([0.01, 0.02, 0.03, 0.04], np.float32), "zeros": np.zeros(4, np.int8),
}  # fmt: skip


@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("opset", [13, 21])
def test_quantised_weight_is_never_evaluated_away(make: str, opset: int) -> None:
    proto = net(
        f"{make} c = Conv(x, v) [bn] y = {BN}(c, n_g, n_b, n_m, n_v)",
        INTEGERS, opset=opset, ir=10,
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    if " QuantizeLinear" in make or "Reshape" in make:
        assert nets.same(proto, result.model)
        assert nets.verdicts(result.report) == {"bn": "BNF004"}
        return
    assert nets.verdicts(result.report) == {"bn": "backward"}
    assert nets.operators(result.model)["DequantizeLinear"] == 1
    assert nets.constant(result.model, "q").dtype == np.int8


def test_arithmetic_over_a_quantised_weight_is_not_evaluated_away() -> None:
    proto = net(
        "u = DequantizeLinear(q, one_scale, one_zero) v = Mul(u, gain) y = Conv(x, v)", INTEGERS
    )
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert not result.report.folded


# ---- types ----


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_folded_weight_keeps_the_type_of_the_conv(dtype: type) -> None:
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    name = {10: "float16", 16: "bfloat16", 11: "double"}[number]
    proto = nets.model(
        f"""g ({name}[2,3,4,4] x) => ({name}[2,4,3,3] y) {{
            v = Cast<to = {number}>(w) c = Conv(x, v)
            k = CastLike(column, v) [s] y = Mul(c, k) }}""",
        {name: stored()[name] for name in ("w", "column")}, opset=22, ir=10,
    )  # fmt: skip
    model, report = nets.folded(proto, 1e-2)
    assert nets.verdicts(report) == {"s": "backward"}
    held = nets.constant(model, model.graph.node[0].input[1])
    assert held.dtype == dtype
    exact = wide("w") * wide("column").reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(held, nets.rounded(exact, dtype))


# ---- no growth ----


def bytes_of(proto: onnx.ModelProto) -> int:
    return sum(len(onnx.numpy_helper.to_array(t).tobytes()) for t in proto.graph.initializer)


GROWING = {
    "Expand, then arithmetic": "s = Constant<value_ints = [64, 64, 3, 3]>() "
    "e = Expand(one, s) v = Mul(e, kernel) z = Conv(x64, v)",
    "a sum that broadcasts": "v = Add(tall, flat3) z = Conv(x64, v)",
    "ConstantOfShape, then arithmetic": "s = Constant<value_ints = [64, 64, 3, 3]>() "
    "e = ConstantOfShape<value = float[1] {0.5}>(s) v = Neg(e) z = Conv(x64, v)",
    "integers, widened": "e = Cast<to = 1>(bytes) v = Mul(e, kernel) z = Conv(x64, v)",
}


@pytest.mark.parametrize("body", GROWING.values(), ids=GROWING.keys())
def test_nothing_is_evaluated_that_makes_the_file_larger(body: str) -> None:
    rng = np.random.default_rng(0)
    everything = {
        "one": np.ones(1, np.float32), "kernel": nets.weight(rng, 64, 1, 1, 1),
        "tall": nets.weight(rng, 64, 64, 1, 1), "flat3": nets.weight(rng, 1, 1, 3, 3),
        "bytes": rng.integers(-99, 99, (64, 64, 3, 3)).astype(np.int8),
    }  # fmt: skip
    used = {name: value for name, value in everything.items() if name in nets.words(body)}
    text = f"g (float[1,64,4,4] x64) => (float[1,64,2,2] z) {{ {body} }}"
    proto = nets.model(text, used)
    model, _ = nets.folded(proto)
    assert bytes_of(model) <= bytes_of(proto)


def test_small_constants_may_grow() -> None:
    body = "e = Expand(one, shape) v = Mul(e, gain) y = Conv(x, v)"
    model, report = nets.folded(net(body))
    assert nets.verdicts(report) == {"Mul(v)": "evaluated"}
    assert nets.operators(model) == {"Conv": 1}


def test_step_by_an_expanded_constant_is_not_stored_expanded() -> None:
    proto = net(
        """s = Constant<value_ints = [4, 1, 1]>() p = Expand(one, s)
           c = Conv(x, w) r = Relu(c) [a] d = Add(r, p) [b] e = Add(d, column) y = Relu(e)"""
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"a": "merged", "b": "BNF020"}
    assert bytes_of(model) <= bytes_of(proto)


# ---- constants of kinds that no fold can use ----


def test_strings_do_not_disturb() -> None:
    proto = net(f"c = Conv(x, w) [bn] y = {BN}(c, n_g, n_b, n_m, n_v)")
    proto.graph.node.extend([
        onnx.helper.make_node("Constant", [], ["words"], value_strings=["a", "b"]),
        onnx.helper.make_node("Constant", [], ["word"], value_string="a"),
        onnx.helper.make_node("Identity", ["words"], ["words_out"]),
        onnx.helper.make_node("Identity", ["word"], ["word_out"]),
    ])  # fmt: skip
    for name, dims in {"words_out": [2], "word_out": []}.items():
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, dims)
        proto.graph.output.append(info)
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert nets.verdicts(result.report) == {"bn": "backward"}


def test_sparse_tensors_are_refused_in_our_words() -> None:
    proto = net("c = Conv(x, few) [s] y = Mul(c, column)")
    values = onnx.numpy_helper.from_array(np.array([1.5, 2.5], np.float32), "values")
    at = onnx.numpy_helper.from_array(np.array([2, 40]), "at")
    sparse = onnx.helper.make_sparse_tensor(values, at, [4, 3, 2, 2])
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["few"], sparse_value=sparse))
    onnx.checker.check_model(proto, full_check=True)
    with pytest.raises(ModelError, match=r"[Ss]parse"):
        bnfold.fold(proto)


def test_constant_that_is_an_output_stays_one() -> None:
    proto = nets.model(
        """g (float[2,3,4,4] x) => (float[2,4,3,3] y, float[4,3,2,2] v) {
            v = Mul(w, gain) c = Conv(x, v) [s] y = Mul(c, column) }""",
        {name: stored()[name] for name in ("w", "gain", "column")},
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report)["s"] == "BNF005"
    assert [value.name for value in model.graph.output] == ["y", "v"]
