"""Linear regions of ONNX models become one operator: exact in float64, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import DTypeLike

import bnfold
from bnfold import onnx_merge
from bnfold.merged import MergedTensors, merged_tensors
from bnfold.verify.judge import Verdict
from bnfold.verify.oracle import Oracle
from tests import nets

EXACT = 1e-12


def constants(shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> dict[str, nets.Array]:
    """A weight for every shape; (n,) under a name that starts with "bn" is a BatchNorm."""
    rng = np.random.default_rng(0)
    found: dict[str, nets.Array] = {}
    for name, shape in shapes.items():
        if name.startswith("bn"):
            found |= nets.batch_norm(rng, name, shape[0], dtype)
        else:
            found[name] = nets.weight(rng, *shape, dtype=dtype)
    return found


def bn(name: str, x: str) -> str:
    return f"BatchNormalization({x}, {name}_g, {name}_b, {name}_m, {name}_v)"


def block(rank: int = 4, extra: str = "") -> str:
    """A block of RepVGG over x, to y."""
    pads = ",".join(["1"] * 2 * (rank - 2))
    return f"""
        a = Conv<pads=[{pads}]{extra}>(x, w3) an = {bn("bn1", "a")} b = Conv(x, w1)
        bm = {bn("bn2", "b")} i = {bn("bn3", "x")} s = Add(an, bm) y = Add(s, i)"""


def weights(rank: int = 4) -> dict[str, tuple[int, ...]]:
    spatial = rank - 2
    return {"w3": (4, 4, *[3] * spatial), "w1": (4, 4, *[1] * spatial), "bn1": (4,), "bn2": (4,),
            "bn3": (4,)}  # fmt: skip


def model(
    body: str, shapes: Mapping[str, tuple[int, ...]], dtype: str = "double",
    x: str = "N,4,6,6", y: str = "N,4,6,6", **header: int,
) -> onnx.ModelProto:  # fmt: skip
    kinds = {"double": np.float64, "float": np.float32, "float16": np.float16,
             "bfloat16": ml_dtypes.bfloat16}  # fmt: skip
    text = f"g ({dtype}[{x}] x) => ({dtype}[{y}] y) {{ {body} }}"
    return nets.model(text, constants(shapes, kinds[dtype]), **header)


# ---- families ----


@dataclass(frozen=True, slots=True)
class Family:
    """A net from ``x`` to ``y``, and which operators are left of it."""

    body: str
    shapes: Mapping[str, tuple[int, ...]]
    left: Mapping[str, int]
    x: str = "N,4,6,6"
    y: str = "N,4,6,6"


P1 = "pads=[1,1,1,1]"
CONV = {"Conv": 1}
FAMILIES = {
    "RepVGG": Family(block(), weights(), CONV),
    "behind a Relu": Family(f"x1 = Relu(x) {block().replace('x,', 'x1,')}", weights(),
                            {"Relu": 1, "Conv": 1}),
    "ACNet": Family(
        f"""a = Conv<{P1}>(x, w) b = Conv<pads=[1,0,1,0]>(x, u) c = Conv<pads=[0,1,0,1]>(x, v)
            an = {bn("bn1", "a")} bm = {bn("bn2", "b")} cn = {bn("bn3", "c")}
            y = Sum(an, bm, cn)""",
        {"w": (4, 4, 3, 3), "u": (4, 4, 3, 1), "v": (4, 4, 1, 3), "bn1": (4,), "bn2": (4,),
         "bn3": (4,)}, CONV,
    ),
    "MobileOne": Family(
        f"""a = Conv<group=4, {P1}>(x, w) b = Conv<group=4>(x, u) an = {bn("bn1", "a")}
            bm = {bn("bn2", "b")} i = {bn("bn3", "x")} s = Add(i, an) y = Add(s, bm)""",
        {"w": (4, 1, 3, 3), "u": (4, 1, 1, 1), "bn1": (4,), "bn2": (4,), "bn3": (4,)}, CONV,
    ),
    "diverse branches": Family(
        f"""a = Conv(x, k1) b = {bn("bn1", "a")} c = Conv<{P1}>(x, w) z = Conv(x, u)
            p = AveragePool<kernel_shape=[3,3], {P1}, count_include_pad=1>(z)
            s = Sub(c, b) y = Add(p, s)""",
        {"k1": (4, 4, 1, 1), "w": (4, 4, 3, 3), "u": (4, 4, 1, 1), "bn1": (4,)}, CONV,
    ),
    "halving": Family(
        f"a = Conv<strides=[2,2], {P1}>(x, w, q) b = Conv<strides=[2,2]>(x, u) y = Add(a, b)",
        {"w": (8, 4, 3, 3), "u": (8, 4, 1, 1), "q": (8,)}, CONV, y="N,8,3,3",
    ),
    "dilated": Family(
        "a = Conv<dilations=[2,2], pads=[2,2,2,2]>(x, w) b = Conv(x, u) y = Sum(x, b, a)",
        {"w": (4, 4, 3, 3), "u": (4, 4, 1, 1)}, CONV,
    ),
    "even, padded on one side": Family(
        "a = Conv<pads=[0,1,1,0]>(x, w) y = Add(x, a)", {"w": (4, 4, 2, 2)}, CONV,
    ),
    "1x1 then 3x3": Family(
        f"a = Conv(x, u) b = {bn('bn1', 'a')} y = Conv(b, w)",
        {"u": (4, 4, 1, 1), "bn1": (4,), "w": (4, 4, 3, 3)}, CONV, y="N,4,4,4",
    ),
    "3x3 then 1x1": Family(
        f"a = Conv<{P1}>(x, w, q) b = {bn('bn1', 'a')} y = Conv(b, u, q)",
        {"w": (4, 4, 3, 3), "bn1": (4,), "u": (4, 4, 1, 1), "q": (4,)}, CONV,
    ),
    "Pad then 3x3": Family(
        "n = Constant<value_ints=[0,0,1,2,0,0,0,1]>() p = Pad(x, n) y = Conv(p, w, q)",
        {"w": (4, 4, 3, 3), "q": (4,)}, CONV, y="N,4,5,7",
    ),
    "Gemm then Gemm": Family(
        "a = Gemm<alpha=0.5, beta=2.0>(x, w, q) y = Gemm<transB=1, alpha=-1.5>(a, u, r)",
        {"w": (4, 8), "q": (8,), "u": (3, 8), "r": (1, 3)}, {"Gemm": 1}, x="N,4", y="N,3",
    ),
    "MatMul then MatMul": Family(
        "a = MatMul(x, w) b = Add(a, q) y = MatMul(b, u)",
        {"w": (4, 8), "q": (8,), "u": (8, 3)}, {"MatMul": 1, "Add": 1}, x="N,5,4", y="N,5,3",
    ),
    "MatMul beside MatMul": Family(
        "a = MatMul(x, w) b = MatMul(x, u) c = Mul(b, t) d = Add(x, c) y = Sub(a, d)",
        {"w": (4, 4), "u": (4, 4), "t": (4,)}, {"MatMul": 1}, x="N,5,4", y="N,5,4",
    ),
    "MatMul from the left": Family(
        "a = MatMul(w, x) b = MatMul(u, a) c = Add(b, q) y = Sub(x, c)",
        {"w": (8, 4), "u": (4, 8), "q": (4, 1)}, {"MatMul": 1, "Add": 1}, x="N,4,5", y="N,4,5",
    ),
    "Gemm beside a shift": Family(
        "a = Gemm(x, w) b = Add(x, q) y = Add(b, a)", {"w": (4, 4), "q": (4,)}, {"Gemm": 1},
        x="N,4", y="N,4",
    ),
    "another term": Family(
        f"z = Relu(x) a = Conv(x, u) s = Add(a, z) b = Conv<{P1}>(x, w) y = Add(b, s)",
        {"u": (4, 4, 1, 1), "w": (4, 4, 3, 3)}, {"Relu": 1, "Conv": 1, "Add": 1},
    ),
}  # fmt: skip


def family(name: str, dtype: str = "double") -> onnx.ModelProto:
    one = FAMILIES[name]
    opset = 22 if dtype == "bfloat16" else 17
    return model(one.body, one.shapes, dtype, one.x, one.y, opset=opset)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_region_is_one_operator_and_says_the_same(name: str) -> None:
    after, report = nets.folded(family(name), EXACT)
    assert nets.operators(after) == FAMILIES[name].left
    assert set(nets.verdicts(report).values()) <= {"joined"}


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_that_are_stated_stay_true(name: str) -> None:
    nets.folded(onnx.shape_inference.infer_shapes(family(name)), EXACT)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_runtime_takes_it_in_silence(name: str) -> None:
    assert nets.runtime_says(bnfold.fold(family(name, "float")).model) == ""


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_is_rounded_once(name: str, dtype: str) -> None:
    """The same numbers in float64 are exact; here each is the nearest of its type."""
    proto = family(name, dtype)
    eps = {"float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    after, _ = nets.folded(proto, 4 * eps)
    wide, _ = nets.folded(widened(proto), EXACT)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    exact = {t.name: onnx.numpy_helper.to_array(t) for t in wide.graph.initializer}
    assert stored.keys() == exact.keys()
    for key, array in stored.items():
        expected = nets.rounded(exact[key], array.dtype) if array.dtype.kind != "i" else exact[key]
        assert array.tobytes() == expected.tobytes()


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the same numbers in float64."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in made.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    return made


def assert_one_conv(proto: onnx.ModelProto, tolerance: float = EXACT, **options: bool) -> None:
    after, report = nets.folded(proto, tolerance, **options)
    assert nets.operators(after)["Conv"] == 1
    assert not {"BatchNormalization", "Add"} & set(nets.operators(after))
    assert set(nets.verdicts(report).values()) == {"joined"}


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_images_of_any_rank(rank: int) -> None:
    shape = ",".join(["N", "4", *["5"] * (rank - 2)])
    assert_one_conv(model(block(rank), weights(rank), x=shape, y=shape))


@pytest.mark.parametrize("opset", range(9, 23))
def test_any_version_of_the_operators(opset: int) -> None:
    assert_one_conv(model(block(), weights(), opset=opset))


@pytest.mark.parametrize("shape", ["N,4,H,W", "1,4,H,6"])
def test_sizes_need_not_be_known(shape: str) -> None:
    proto = model(block(), weights(), x=shape, y=shape)
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after) == {"Conv": 1}
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (2, 7), (6, 6)):
        given = {"x": rng.normal(size=(1, 4, height, 6 if "6" in shape else width))}
        np.testing.assert_allclose(Oracle(after).run(given)["y"], Oracle(proto).run(given)["y"],
                                   atol=1e-11)  # fmt: skip


AUTOMATIC = {
    "SAME_UPPER": ("", "6,6"), "SAME_LOWER": ("", "6,6"), "VALID": ("", "4,6"),
    "SAME_UPPER, halving": (", strides=[2,2]", "3,3"),
    "SAME_LOWER, halving": (", strides=[2,2]", "3,3"),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOMATIC)
def test_padding_that_is_stated_by_name(name: str) -> None:
    stride, made = AUTOMATIC[name]
    head = f'auto_pad="{name.split(",")[0]}"{stride}'
    body = f"a = Conv<{head}>(x, w) b = Conv<{head}, dilations=[1,2]>(x, u) y = Add(a, b)"
    proto = model(body, {"w": (4, 4, 3, 1), "u": (4, 4, 3, 1)}, y=f"N,4,{made}")
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after) == {"Conv": 1}


def test_padding_by_name_that_depends_on_a_size_that_is_not_known_joins_nothing() -> None:
    head = 'auto_pad="SAME_UPPER", strides=[2,2]'
    body = f"a = Conv<{head}>(x, w) b = Conv<{head}>(x, u) y = Add(a, b)"
    proto = model(body, {"w": (4, 4, 3, 3), "u": (4, 4, 1, 1)}, x="N,4,H,W", y="N,4,P,Q")
    after, report = nets.folded(proto, EXACT)
    assert nets.same(proto, after)
    assert not report.joints


# ---- where numbers and nodes stand ----


def test_a_bias_in_a_constant_node() -> None:
    body = "q = Constant<value_floats=[1.0, -2.0, 3.0, 0.5]>() a = Conv(x, u, q) y = Add(a, x)"
    after, _ = nets.folded(model(body, {"u": (4, 4, 1, 1)}, "float"), 1e-6)
    assert nets.operators(after)["Conv"] == 1
    assert "Add" not in nets.operators(after)


def test_weights_in_constant_nodes_behind_identities() -> None:
    proto = model("u = Identity(u0) v = Identity(u) a = Conv(x, v) y = Add(x, a)",
                  {"u0": (4, 4, 1, 1)})  # fmt: skip
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after) == {"Conv": 1}


def test_constants_of_the_type_of_a_tensor_between() -> None:
    """torch.onnx.export makes the bias of a Conv without one so, if it does not optimise."""
    body = """a = Conv(x, u) n = Shape(q) z = Constant<value_float=0.0>() c = CastLike(z, a)
              e = Expand(c, n) y = Conv(a, w, e)"""
    shapes = {"u": (4, 4, 1, 1), "w": (4, 4, 3, 3), "q": (4,)}
    after, _ = nets.folded(model(body, shapes, y="N,4,4,4"), EXACT)
    assert nets.operators(after) == CONV


@pytest.mark.parametrize(
    "first",
    ["Conv<pads=[1,1,1,1]>(x, w3) y = Conv(a, w1)", "Conv(x, w1) y = Conv<pads=[1,1,1,1]>(a, w3)"],
)
@pytest.mark.parametrize("asked", ["Size", "Shape"])
def test_sizes_that_are_asked_for_keep_the_tensor_between(first: str, asked: str) -> None:
    body = (
        f"a = {first} n = {asked}(a) c = Cast<to=11>(n) d = ReduceSum<keepdims=0>(c) z = Add(y, d)"
    )
    shapes = {"w3": (4, 4, 3, 3), "w1": (4, 4, 1, 1)}
    proto = model(body.replace("z = Add", "y_out = Add"), shapes, y="N,4,6,6")
    proto.graph.output[0].name = "y_out"
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after)["Conv"] == 2


def test_constants_that_others_read_stay_as_they_are() -> None:
    """One bias and one BatchNorm for two blocks, one of which is none."""
    body = """a = Conv(x, u, q) s = Add(a, x) r = Relu(s) b = Conv(r, w, q) c = Add(b, r)
              y = Add(c, q4)"""
    proto = model(body, {"u": (4, 4, 1, 1), "w": (4, 4, 1, 1), "q": (4,), "q4": (4, 1, 1)})
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after) == {"Conv": 2, "Relu": 1}


def test_initializers_that_are_inputs_at_ir_version_3() -> None:
    proto = model(block(), weights(), ir=3, opset=9)
    nets.declare_initializers(proto)
    assert_one_conv(proto)


def test_initializers_that_are_inputs_can_change_unless_they_are_trusted() -> None:
    proto = model(block(), weights())
    nets.declare_initializers(proto)
    after, report = nets.folded(proto)
    assert nets.same(proto, after)
    assert not report.joints
    trusted = bnfold.fold(proto, trust_initializers=True)
    assert nets.operators(trusted.model) == {"Conv": 1}


def test_names_of_what_is_left_stay() -> None:
    proto = model(f"{block().replace('y =', '[last] t =')} y = Relu(t)", weights())
    after, report = nets.folded(proto, EXACT)
    conv, relu = after.graph.node
    assert (list(conv.output), list(relu.input), list(relu.output)) == (["t"], ["t"], ["y"])
    assert conv.input[1] == "w3"
    (joint,) = report.joints
    assert joint.into == "Conv(a)"
    assert "last" in joint.operators


def test_a_joint_that_others_read_is_read_with_its_bias() -> None:
    """A MatMul that stands for more gains an Add: what reads the whole reads that."""
    body = """a = MatMul(x, w) b = Mul(a, t) c = Add(b, q) s = Add(x, c) r = Relu(s)
              d = MatMul(s, u) e = MatMul(s, v) f = Add(d, e) y = Add(f, r)"""
    shapes = {"w": (4, 4), "u": (4, 4), "v": (4, 4), "t": (4,), "q": (4,)}
    after, _ = nets.folded(model(body, shapes, x="N,5,4", y="N,5,4"), EXACT)
    assert nets.operators(after)["MatMul"] == 2


def test_what_takes_axes_away_is_no_term_of_a_sum() -> None:
    body = """r = Relu(x) a = Conv(r, u) n = Constant<value_ints=[2,3]>()
              y = ReduceSum<keepdims=0>(a, n)"""
    proto = model(body, {"u": (4, 4, 1, 1)}, x="N,4,1,1", y="N,4")
    after, report = nets.folded(proto, EXACT)
    assert nets.operators(after)["ReduceSum"] == 1
    assert not report.joints


@pytest.mark.parametrize("norm", ["ReduceL1", "ReduceL2"])
def test_a_norm_that_takes_axes_away_is_not_linear(norm: str) -> None:
    body = f"r = Relu(x) a = Conv(r, u) b = {norm}<axes=[2,3], keepdims=0>(a) y = Gemm(b, w)"
    proto = model(body, {"u": (4, 4, 1, 1), "w": (4, 3)}, x="N,4,1,1", y="N,3")
    after, report = nets.folded(proto, EXACT)
    assert nets.operators(after)["Gemm"] == 1
    assert not report.joints


@pytest.mark.parametrize("flattened", ["Squeeze(a)", "Reshape(a, n)"])
def test_one_channel_behind_a_flattening_is_still_an_axis(flattened: str) -> None:
    body = f"n = Constant<value_ints=[2,4]>() a = Conv(x, u) b = {flattened} y = Gemm(b, w)"
    proto = model(body, {"u": (4, 4, 1, 1), "w": (4, 1)}, x="2,4,1,1", y="2,1")
    after, report = nets.folded(proto, EXACT)
    assert "Gemm" not in nets.operators(after)
    assert len(report.joints) == 1


def test_a_sum_that_is_an_output_is_not_left_with_one_operand() -> None:
    text = """g (double[N,4,6,6] x, double[N,4,6,6] k) => (double[N,4,6,6] y) {
        a = Conv(x, w) s = Add(k, a) y = Sum(s, x, x) }"""
    after, _ = nets.folded(nets.model(text, constants({"w": (4, 4, 1, 1)}, np.float64)), EXACT)
    assert [value.name for value in after.graph.output] == ["y"]


@pytest.mark.parametrize(
    ("body", "shapes", "x", "y"),
    [
        ("p = Conv(x, w) y = Add(p, x)", {"w": (3, 1, 1, 1)}, "N,1,4,4", "N,3,4,4"),
        ("p = Conv(x, w) q = Mul(p, e) y = Add(q, x)", {"w": (1, 1, 1, 1), "e": (1, 3, 1, 1)},
         "N,1,4,4", "N,3,4,4"),
        ("p = Conv(x, w) q = Mul(p, e) y = Add(q, x)", {"w": (3, 3, 1, 1), "e": (2, 1, 1, 1)},
         "1,3,4,4", "2,3,4,4"),
        ("p = Conv<strides=[2,2]>(x, w) y = Add(p, x)", {"w": (3, 3, 1, 1)}, "N,3,H,W", "N,3,P,Q"),
        ("p = Gemm(x, w) q = Add(p, e) y = Add(q, x)", {"w": (3, 3), "e": (1, 1, 3)}, "N,3",
         "1,N,3"),
    ],
)  # fmt: skip
def test_what_is_broadcast_is_no_term_of_a_sum(
    body: str, shapes: Mapping[str, tuple[int, ...]], x: str, y: str
) -> None:
    proto = model(body, shapes, x=x, y=y)
    onnx.checker.check_model(proto, full_check=True)
    assert not bnfold.fold(proto).report.joints


@pytest.mark.parametrize("also", ["", ", double[N,4,6,6] s"])
def test_a_joint_that_a_body_captures_is_captured_under_its_name(also: str) -> None:
    body = """p = MatMul(x, w) q = Mul(p, e) r = Add(q, e) s = Add(r, x)
        o = Constant<value_int=1>() t = Cast<to=9>(o)
        y = If(t) <then_branch = th () => (double[N,4,6,6] a) { a = Relu(s) },
                   else_branch = el () => (double[N,4,6,6] b) { b = Abs(s) }>"""
    text = f"g (double[N,4,6,6] x) => (double[N,4,6,6] y{also}) {{ {body} }}"
    proto = nets.model(text, constants({"w": (6, 6), "e": (6,)}, np.float64))
    after, report = nets.folded(proto, EXACT)
    assert len(report.joints) == 1
    assert {name for node in nets.nodes(after) for name in node.input} >= {"s"}


def test_a_term_that_is_made_late_joins_one_of_an_early_sum() -> None:
    """What is left stands before the first sum that reads it."""
    body = f"""u = Relu(x) v = Tanh(x) w = Sigmoid(x) p = Conv(x, k1) s = Add(p, u)
               q = Conv<{P1}>(x, k3) r = Add(v, q) t = Add(w, r) y = Add(s, t)"""
    proto = model(body, {"k1": (4, 4, 1, 1), "k3": (4, 4, 3, 3)})
    after, _ = nets.folded(proto, EXACT)
    assert nets.operators(after)["Conv"] == 1


# ---- bodies and functions ----


def joined_inside(body: str) -> None:
    """A model that states the shapes in its bodies has one Conv, in a body, afterwards."""
    proto = onnx.shape_inference.infer_shapes(model(body, weights()))
    after, report = nets.folded(proto, EXACT)
    assert [node.op_type for node in nets.nodes(after)].count("Conv") == 1
    assert len(report.joints) == 1


def test_a_block_in_the_branch_of_an_if() -> None:
    joined_inside(f"""c = Constant<value_int=1>() t = Cast<to=9>(c)
        y = If(t) <then_branch = th () => (double[N,4,6,6] y1) {{ {renamed(block())} }},
                   else_branch = el () => (double[N,4,6,6] e) {{ e = Relu(x) }}>""")


def test_a_block_in_the_body_of_a_loop() -> None:
    joined_inside(f"""n = Constant<value_int=2>() m = Constant<value_int=1>() t = Cast<to=9>(m)
        y = Loop(n, t, x) <body = b (int64 k, bool go, double[N,4,6,6] h)
            => (bool on, double[N,4,6,6] z) {{ on = Identity(go)
                {renamed(block()).replace("(x,", "(h,")} z = Relu(y1) }}>""")


def renamed(body: str) -> str:
    return body.replace("y = ", "y1 = ")


def test_a_tensor_that_a_body_captures_is_not_lost_in_a_joint() -> None:
    body = """a = Conv(x, u) b = Add(a, x) c = Constant<value_int=1>() t = Cast<to=9>(c)
        z = If(t) <then_branch = th () => (double[N,4,6,6] p) { p = Relu(a) },
                   else_branch = el () => (double[N,4,6,6] q) { q = Relu(b) }>
        y = Add(z, b)"""
    after, report = nets.folded(model(body, {"u": (4, 4, 1, 1)}), EXACT)
    assert nets.operators(after)["Conv"] == 1
    assert not report.joints


def with_function(body: str, constant_nodes: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (double[N,2,6] x) => (double[N,2,6] y) {{ h = own.block(x) y = own.block(h) }}
        <domain: "own", opset_import: ["": 17]>
        block (x) => (y) {{ {constant_nodes} {body} }}""")


def test_operators_in_a_function_are_joined_once() -> None:
    given = """u = Constant<value = double[2,2,1] {1.0, 2.0, 3.0, -4.0}>()
               v = Constant<value = double[2,2,1] {0.5, 2.0, 1.0, -1.0}>()
               t = Constant<value = double[2,1] {1.0, 2.0}>()"""
    proto = with_function("a = Conv(x, u) b = Add(a, t) y = Conv(b, v)", given)
    after, report = nets.folded(proto, EXACT)
    kinds = sorted(node.op_type for node in after.functions[0].node)
    assert kinds == ["Constant", "Constant", "Conv"]
    assert len(report.joints) == 1


# ---- files, ranges, rollback ----


def two_blocks(dtype: str = "float") -> onnx.ModelProto:
    """Two sums of two Convs, one behind the other; no step anywhere."""
    body = f"""[one] a = Conv<{P1}>(x, w) [two] b = Conv(x, u) [first] s = Add(a, b) r = Relu(s)
               [three] c = Conv<{P1}>(r, v) [four] d = Conv(r, k) [second] t = Add(c, d)
               y = Relu(t)"""
    shapes = {"w": (5, 4, 3, 3), "u": (5, 4, 1, 1), "v": (4, 5, 3, 3), "k": (4, 5, 1, 1)}
    return model(body, shapes, dtype, x="2,4,6,6", y="2,4,6,6")


def test_from_file_to_file_with_weights_beside_it(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(two_blocks(), source, save_as_external_data=True, size_threshold=0)
    result = bnfold.optimize(source, target)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    after = onnx.load(target)
    onnx.checker.check_model(after, full_check=True)
    assert nets.operators(after) == {"Conv": 2, "Relu": 2}
    assert nets.difference(two_blocks(), after) < 1e-6
    nets.assert_nothing_dangles(after)


def test_a_joint_that_is_wrong_is_taken_back_and_the_other_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*args: object, **options: object) -> MergedTensors:
        right = merged_tensors(*args, **options)  # type: ignore[arg-type]
        wrong = right.weight * np.float32(1.01) if right.weight.shape[0] == 5 else right.weight
        return MergedTensors(wrong, right.bias)

    monkeypatch.setattr(onnx_merge, "merged_tensors", off)
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(two_blocks(), source)
    result = bnfold.optimize(source, target)
    assert result.dropped == ("first",)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert nets.operators(onnx.load(target)) == {"Conv": 3, "Add": 1, "Relu": 2}
    assert [(k.name, k.code) for k in result.report.apart] == [("first", "BNF026")]


def test_a_product_that_is_too_small_for_its_type_stays_two_factors() -> None:
    serial = model("a = Conv(x, w1) y = Conv(a, w2)", {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1)},
                   "float16")  # fmt: skip
    for tensor in serial.graph.initializer:
        small = np.full((4, 4, 1, 1), 3e-4, np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(small, tensor.name))
    result = bnfold.fold(serial)
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Conv"]
    assert [step.code for step in result.report.apart] == ["BNF013"]


def test_what_leaves_the_range_of_its_type_stays_apart() -> None:
    proto = two_blocks("float16")
    for tensor in proto.graph.initializer:
        if tensor.name in ("w", "u"):
            large = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * large + np.float16(4e4), tensor.name))
    after = bnfold.fold(proto)
    assert nets.operators(after.model) == {"Conv": 3, "Add": 1, "Relu": 2}
    ((name, code),) = [(kept.name, kept.code) for kept in after.report.apart]
    assert (name, code) == ("first", "BNF013")


@pytest.mark.parametrize("body", [
    "a = Conv(x, w) y = Conv(a, u)",
    "a = Conv(x, w) b = Conv(x, u) y = Concat<axis=1>(a, b)",
])  # fmt: skip
def test_nodes_in_memory_may_stand_in_any_order(body: str) -> None:
    shapes = {"w": (4, 4, 1, 1), "u": (4, 4, 1, 1)}
    made = "N,8,6,6" if "Concat" in body else "N,4,6,6"
    proto = model(body, shapes, y=made)
    turned = onnx.ModelProto()
    turned.CopyFrom(proto)
    turned.graph.ClearField("node")
    turned.graph.node.extend(reversed(proto.graph.node))
    assert nets.same(bnfold.fold(turned).model, bnfold.fold(proto).model)


def test_a_second_fold_finds_nothing_more() -> None:
    for name in FAMILIES:
        once = bnfold.fold(family(name)).model
        assert nets.same(once, bnfold.fold(once).model)


def test_level_local_joins_nothing() -> None:
    after, report = nets.folded(model(block(), weights()), EXACT, level="local")
    assert nets.operators(after)["Conv"] == 2
    assert not report.joints
