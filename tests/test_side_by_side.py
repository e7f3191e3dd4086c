"""Linear operators over one tensor, put together by a Concat, become one with all their rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfold
from bnfold.affine import AffineMap
from bnfold.channel_graph import POINT, Affine, Anchor, ChannelGraph, Linear, ValueId
from bnfold.errors import UsageError
from bnfold.passes import plan_max
from bnfold.planning import How, Joining, Kept, Plan, Reason
from tests import nets
from tests.channel_graphs import Builder

BN = "BatchNormalization"


# ---- nets in one line a node; constants are drawn by their names ----


def image(lines: str, outputs: str = "y", space: str = "5, 6", **header: Any) -> onnx.ModelProto:
    """A net over the image x, with constants of the shapes that their names end in."""
    ends = ", ".join(f"float[N, K{k}, H{k}, W{k}] {name}" for k, name in enumerate(outputs.split()))
    text = f"net (float[N, 3, {space}] x) => ({ends}) {{\n{lines}\n}}"
    return with_constants(nets.model(text, **header))


def matrix(lines: str, shape: str = "N, 3", outputs: str = "y", **header: Any) -> onnx.ModelProto:
    ends = ", ".join(f"float[{shape.replace('3', 'K')}] {name}" for name in outputs.split())
    return with_constants(
        nets.model(f"net (float[{shape}] x) => ({ends}) {{\n{lines}\n}}", **header)
    )


def with_constants(proto: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    made = {v.name for v in proto.graph.input} | {o for n in nets.nodes(proto) for o in n.output}
    for name in [name for node in nets.nodes(proto) for name in node.input]:
        if name and name not in made:
            made.add(name)
            shape = [int(k) for k in name.split("_")[-1][1:].split("x")]
            values = rng.normal(0, 0.5, shape) + (2 if "var" in name else 0)
            proto.graph.initializer.append(
                onnx.numpy_helper.from_array(values.astype(np.float32), name)
            )
    return proto


def left(proto: onnx.ModelProto, **options: Any) -> Counter[str]:
    """The operators of the folded net, which says the same, and runs without a warning."""
    model, _ = nets.folded(proto, **options)
    assert not nets.runtime_says(model)
    return nets.operators(model)


def batch_norm(name: str, channels: int) -> str:
    parameters = ", ".join(f"{name}_{kind}_w{channels}" for kind in ("g", "b", "m", "var"))
    return f"{name}n = {BN}({name}, {parameters})"


A = "a = Conv<pads=[1,1,1,1]>(x, a_w4x3x3x3)"
B = "b = Conv<pads=[1,1,1,1]>(x, b_w2x3x3x3, b_w2)"
C = "c = Conv<pads=[1,1,1,1]>(x, c_w3x3x3x3)"
POINTWISE = "o = Conv(x, o_w4x3x1x1)"
E = "e = Relu(x)"
OVER_E = "p = Conv(e, p_w3x3x1x1) q = Conv(e, q_w2x3x1x1)"
JOINED = "y = Concat<axis=1>"

WHOLE = {
    "two": f"{A} {B} {JOINED}(a, b)",
    "three, in another order": f"{A} {B} {C} {JOINED}(c, a, b)",
    "no bias": f"{A} {C} {JOINED}(a, c)",
    "a BatchNormalization on each":
        f"{A} {B} {batch_norm('a', 4)} {batch_norm('b', 2)} {JOINED}(an, bn)",
    "a scale on one": f"{A} {B} b2 = Mul(b, s_w2x1x1) {JOINED}(a, b2)",
    "an Identity and a shift on one":
        f"{A} {B} b2 = Identity(b) b3 = Add(b2, s_w2x1x1) {JOINED}(a, b3)",
    "a step before and one after":
        "x0 = Mul(x, u_w3x1x1) a = Conv(x0, a_w4x3x1x1) b = Conv(x0, b_w2x3x1x1)"
        " z = Concat<axis=1>(a, b) y = Mul(z, s_w6x1x1)",
    "strides and dilations":
        "a = Conv<strides=[2,1],dilations=[1,2],pads=[0,1,0,1]>(x, a_w4x3x2x2)"
        f" b = Conv<strides=[2,1],dilations=[1,2],pads=[0,1,0,1]>(x, b_w2x3x2x2) {JOINED}(a, b)",
    "paddings that are spelled differently":
        f"{A} b = Conv<auto_pad=\"SAME_UPPER\">(x, b_w2x3x3x3) {JOINED}(a, b)",
    "a Concat in a Concat":
        f"{A} {B} {C} z = Concat<axis=1>(a, b) z2 = Mul(z, s_w6x1x1) {JOINED}(z2, c)",
    "one that is a sum of two":
        f"{A} {B} a2 = Conv(x, a2_w4x3x1x1) a3 = Add(a, a2) {JOINED}(b, a3)",
    "an axis from the back": f"{A} {B} y = Concat<axis=-3>(a, b)",
}  # fmt: skip


@pytest.mark.parametrize("lines", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("space", ["7, 8", "H, W"])
def test_what_a_concat_puts_together_is_one_operator(lines: str, space: str) -> None:
    assert left(image(lines, space=space)) == {"Conv": 1}


PARTS = {
    "neighbours beside another one":
        (f"{A} {B} {POINTWISE} {JOINED}(a, b, o)", {"Conv": 2, "Concat": 1}),
    "two pairs": (f"{E} {A} {B} {OVER_E} {JOINED}(p, q, a, b)",
                  {"Relu": 1, "Conv": 2, "Concat": 1}),
    "with a step behind":
        (f"{A} {B} {POINTWISE} z = Concat<axis=1>(o, a, b) y = Mul(z, s_w10x1x1)",
         {"Conv": 2, "Concat": 1}),
    "beside the input itself": (f"{A} {B} {JOINED}(x, a, b)", {"Conv": 1, "Concat": 1}),
    "two pairs of one kind, apart":
        (f"{A} {B} {POINTWISE} {C} d = Conv<pads=[1,1,1,1]>(x, d_w2x3x3x3) {JOINED}(a, b, o, c, d)",
         {"Conv": 3, "Concat": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "wanted"), PARTS.values(), ids=PARTS)
def test_neighbours_in_a_larger_concat_are_one_input_of_it(
    lines: str, wanted: dict[str, int]
) -> None:
    assert left(image(lines, space="H, W")) == wanted


APART = {
    "kernels of two sizes (a fire module)": f"{A} {POINTWISE} {JOINED}(a, o)",
    "strides": f"{POINTWISE} b = Conv<strides=[2,2]>(x, b_w4x3x1x1)"
               " o2 = MaxPool<kernel_shape=[1,1],strides=[2,2]>(o) y = Concat<axis=1>(o2, b)",
    "two sources": f"{E} {POINTWISE} p = Conv(e, p_w3x3x1x1) {JOINED}(o, p)",
    "groups": "a = Conv<group=3>(x, a_w6x1x1x1) b = Conv<group=3>(x, b_w3x1x1x1)"
              f" {JOINED}(a, b)",
    "an axis of positions": f"{A} b = Conv<pads=[1,1,1,1]>(x, b_w4x3x3x3) y = Concat<axis=2>(a, b)",
    "one weight": f"{A} b = Conv<pads=[1,1,1,1]>(x, a_w4x3x3x3) {JOINED}(a, b)",
    "the same twice": f"{A} {JOINED}(a, a)",
    "a constant between": "{a} {b} k = Constant<value=float[1,1,1,1]{{2}}>() r = Shape(a)"
                          " k2 = Expand(k, r) y = Concat<axis=1>(a, k2, b)",
    "a Relu on each": f"{A} {B} a2 = Relu(a) b2 = Relu(b) {JOINED}(a2, b2)",
    "a step along positions": f"{A} {B} b2 = Mul(b, s_w5x1) {JOINED}(a, b2)",
    "other readers": f"{A} {B} a2 = Relu(a) a3 = Add(a, a2) b2 = Sigmoid(b) b3 = Mul(b, b2)"
                     f" z = Concat<axis=1>(a, b) z2 = Concat<axis=1>(a3, b3) y = Add(z, z2)",
    "a reader between": f"{A} {B} b2 = Mul(b, s_w2x1x1) b3 = Relu(b) {JOINED}(a, b2, b3)",
}  # fmt: skip


@pytest.mark.parametrize("lines", APART.values(), ids=APART)
def test_what_is_not_alike_stays_apart(lines: str) -> None:
    proto = image(lines.format(a=A, b=B) if "{a}" in lines else lines)
    convolutions = nets.operators(proto)["Conv"]
    assert left(proto)["Conv"] == convolutions


def test_an_output_of_the_graph_stays() -> None:
    proto = image(f"{A} {B} {JOINED}(a, b)", "y a")
    assert left(proto, horizontal=True)["Conv"] == 2


# ---- matrices ----

HEADS = {
    "three heads of Gemm": (
        "a = Gemm<transB=1>(x, a_w4x3, a_w4) b = Gemm<alpha=2.0,beta=0.5>(x, b_w3x2, b_w2)"
        " c = Gemm(x, c_w3x5) y = Concat<axis=1>(a, b, c)", "N, 3", {"Gemm": 1}),
    "a MatMul beside a Gemm": (
        "a = MatMul(x, a_w3x4) b = Gemm(x, b_w3x2, b_w2) y = Concat<axis=1>(a, b)", "N, 3",
        {"Gemm": 1}),
    "tokens": ("a = MatMul(x, a_w3x4) b = MatMul(x, b_w3x2) y = Concat<axis=-1>(a, b)", "N, L, 3",
               {"MatMul": 1}),
    "tokens, a bias on the second": (
        "a = MatMul(x, a_w3x4) b = MatMul(x, b_w3x2) b2 = Add(b, b_w2) y = Concat<axis=2>(a, b2)",
        "N, L, 3", {"MatMul": 1, "Add": 1}),
    "tokens, a bias on the first": (
        "a = MatMul(x, a_w3x4) a2 = Add(a_w4, a) b = MatMul(x, b_w3x2) y = Concat<axis=2>(b, a2)",
        "N, L, 3", {"MatMul": 1, "Add": 1}),
    "weights on the left": (
        "a = MatMul(a_w4x3, x) b = MatMul(b_w2x3, x) y = Concat<axis=1>(a, b)", "N, 3, L",
        {"MatMul": 1}),
    "the other axis": (
        "a = MatMul(x, a_w3x4) b = MatMul(x, b_w3x4) y = Concat<axis=1>(a, b)", "N, L, 3",
        {"MatMul": 2, "Concat": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "shape", "wanted"), HEADS.values(), ids=HEADS)
def test_heads_side_by_side_are_one_matrix(lines: str, shape: str, wanted: dict[str, int]) -> None:
    proto = matrix(lines, shape)
    for k, dim in enumerate(proto.graph.output[0].type.tensor_type.shape.dim):
        dim.dim_param = f"y_{k}"
    assert left(proto) == wanted


# ---- what takes a copy ----

COPIED = {
    "others read one": (
        f"{A} {B} r = Relu(a) {JOINED}(a, b)", "y r", {"Conv": 1, "Relu": 1, "Slice": 1}),
    "others read both": (
        f"{A} {B} r = Relu(a) s = Relu(b) {JOINED}(a, b)", "y r s",
        {"Conv": 1, "Relu": 2, "Slice": 2}),
    "a reader before the second": (
        f"{A} r = Relu(a) {B} {JOINED}(b, a)", "y r", {"Conv": 1, "Relu": 1, "Slice": 1}),
    "apart": (f"{A} {B} {POINTWISE} {JOINED}(a, o, b)", "y", {"Conv": 2, "Concat": 1, "Slice": 2}),
    "a pair, and one apart": (
        f"{A} {B} {C} {POINTWISE} {JOINED}(c, b, o, a)", "y", {"Conv": 2, "Concat": 1, "Slice": 2}),
    "a pair, one of it read elsewhere": (
        f"{A} {B} {POINTWISE} r = Relu(b) {JOINED}(a, b, o)", "y r",
        {"Conv": 2, "Concat": 1, "Relu": 1, "Slice": 1}),
    "two pairs that alternate": (
        f"{E} {A} {B} {OVER_E} {JOINED}(p, a, q, b)", "y",
        {"Relu": 1, "Conv": 2, "Concat": 1, "Slice": 4}),
    "nothing": (f"{A} {B} {JOINED}(a, b)", "y", {"Conv": 1}),
    "steps on the way, and a Concat of what is cut": (
        f"{A} {B} {C} {batch_norm('a', 4)} {batch_norm('b', 2)} r = Relu(bn)"
        f" z = Concat<axis=1>(an, bn) {JOINED}(z, c)", "y r",
        {"Conv": 2, "Concat": 1, "Relu": 1, "Slice": 1}),
}  # fmt: skip


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(("lines", "outputs", "wanted"), COPIED.values(), ids=COPIED)
def test_what_is_read_elsewhere_is_cut_where_that_is_asked_for(
    lines: str, outputs: str, wanted: dict[str, int], opset: int
) -> None:
    proto = image(lines, outputs, opset=opset)
    assert left(proto, horizontal=True) == wanted
    plain = nets.operators(bnfold.fold(proto).model)
    assert plain["Slice"] == 0
    assert (plain["Conv"] > wanted["Conv"]) == ("Slice" in wanted)


def test_a_body_of_an_if_is_cut_inside() -> None:
    body = f"{A} {B} r = Relu(a) z = Concat<axis=1>(a, b) r2 = Concat<axis=1>(r, b) o = Add(z, r2)"
    text = f"""net (float[N, 3, 5, 6] x, bool t) => (float[N, 6, 5, 6] y) {{
        y = If (t) <then_branch = one () => (float[N, 6, 5, 6] o) {{ {body} }},
                    else_branch = two () => (float[N, 6, 5, 6] i) {{ i = Identity(k_w1x6x5x6) }}>
    }}"""
    proto = with_constants(nets.model(text))
    model = bnfold.fold(proto, horizontal=True).model
    onnx.checker.check_model(model, full_check=True)
    counted = Counter(node.op_type for node in nets.nodes(model))
    assert (counted["Conv"], counted["Slice"]) == (1, 2)
    x = {"x": np.random.default_rng(1).normal(size=(2, 3, 5, 6)).astype(np.float32)}
    before, after = (nets.run(p, x | {"t": np.array(True)}) for p in (proto, model))
    assert np.allclose(before["y"], after["y"], rtol=1e-6, atol=1e-6)


def test_copies_are_of_level_max() -> None:
    with pytest.raises(UsageError, match="horizontal goes with level 'max'"):
        bnfold.fold(image(f"{A} {B} {JOINED}(a, b)"), level="local", horizontal=True)


# ---- as a file, and back ----


@pytest.mark.parametrize("horizontal", [False, True])
def test_the_check_passes(tmp_path: Path, horizontal: bool) -> None:
    lines = (
        f"{A} {B} {C} {POINTWISE} {batch_norm('a', 4)} {batch_norm('b', 2)} r = Relu(b2)"
        f" b2 = Identity(c) z = Concat<axis=1>(an, bn, o, c) {batch_norm('z', 13)} y = Relu(zn)"
    ).replace("r = Relu(b2) b2 = Identity(c)", "r = Relu(c)")
    onnx.save(image(lines, "y r"), tmp_path / "in.onnx")
    result = bnfold.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", horizontal=horizontal, samples=3
    )
    assert result.check is not None
    assert result.written, str(result.check)
    assert not result.dropped
    made = nets.operators(onnx.load(tmp_path / "out.onnx"))
    assert (made["Conv"], made["Slice"]) == ((2, 2) if horizontal else (3, 0))


def test_what_does_not_fit_its_type_stays_apart() -> None:
    proto = image(f"{A} {B} a2 = Mul(a, s_w4x1x1) {JOINED}(a2, b)")
    for tensor in proto.graph.initializer:
        if tensor.name in ("a_w4x3x3x3", "s_w4x1x1"):
            values = onnx.numpy_helper.to_array(tensor) * np.float32(1e25)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    result = bnfold.fold(proto)
    assert nets.operators(result.model) == {"Conv": 2, "Mul": 1, "Concat": 1}
    assert [step.code for step in result.report.kept] == ["BNF013"]
    assert [step.code for step in result.report.apart] == ["BNF013"]


# ---- on the channel graph ----


def graph_of(build: Builder, *, stackable: bool = True) -> ChannelGraph:
    """The net as a front end would state it that knows what its operators read."""
    graph = build.done().graph
    operators = tuple(
        replace(op, taps=(POINT,)) if isinstance(op, Linear) else op for op in graph.operators
    )
    return replace(graph, operators=operators, stackable=stackable)


def two(build: Builder) -> tuple[ValueId, ValueId]:
    """Two branches over one input, a step on the second."""
    x = build.input(3)
    b = build.linear(x, 2)
    return build.linear(x, 4), build.step(b, AffineMap.of([2.0, -3.0], [0.0, 1.0]))


def test_the_plan_says_what_becomes_of_whom() -> None:
    build = Builder()
    build.concat(*two(build))
    plan = plan_max(graph_of(build))
    (merge,) = plan.merges
    assert (merge.kind, merge.operators, merge.into) == (Joining.SIDE_BY_SIDE, (0, 1, 2, 3), 0)
    assert [(fold.step, fold.how, fold.into) for fold in plan.folds] == [(2, How.JOINED, (0,))]
    assert (merge.cuts, merge.parts, plan.concats) == ((), (), {})


def merges(plan: Plan) -> int:
    return len(plan.merges)


def test_nothing_is_offered_to_a_front_end_that_cannot_write_it() -> None:
    build = Builder()
    build.concat(*two(build))
    assert not merges(plan_max(graph_of(build, stackable=False), horizontal=True))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_what_is_refused_stays(which: int) -> None:
    build = Builder()
    build.concat(*two(build))
    graph = graph_of(build)
    kept = Kept(which, Reason.RANGE, ("it",))
    plan = plan_max(graph, {which: kept}, horizontal=True)
    assert not merges(plan)
    assert (kept in plan.kept) == isinstance(graph.operators[which], Affine)


@pytest.mark.parametrize("anchor", Anchor)
def test_what_somebody_else_sees_stays(anchor: Anchor) -> None:
    build = Builder()
    a, b = two(build)
    build.concat(a, b)
    build.anchors[a] = anchor
    assert not merges(plan_max(graph_of(build), horizontal=True))


def test_a_cut_is_a_range_of_what_is_made() -> None:
    build = Builder()
    a, b = two(build)
    build.concat(b, build.relu(build.input(1)), a)
    graph = graph_of(build)
    plan = plan_max(graph, horizontal=True)
    (merge,) = plan.merges
    assert [(cut.value, cut.begin, cut.end) for cut in merge.cuts] == [(b, 0, 2), (a, 2, 6)]
    assert merge.target == len(graph.values)
    assert merge.parts == (b, a)
    assert not merges(plan_max(graph))


# ---- at random ----


def some_net(rng: np.random.Generator) -> onnx.ModelProto:
    """Branches over one of two tensors, in one of two geometries, with steps and other readers."""
    lines, outputs, order = [E], ["y"], []
    for k in range(int(rng.integers(2, 7))):
        source, size, out = (
            rng.choice(["x", "e"]),
            rng.choice([1, 3], p=[0.7, 0.3]),
            rng.integers(1, 4),
        )
        bias = f", k{k}_w{out}" if rng.random() < 0.5 else ""
        pads = f"<pads=[{','.join([str(size // 2)] * 4)}]>"
        lines.append(f"b{k} = Conv{pads}({source}, w{k}_w{out}x3x{size}x{size}{bias})")
        name = f"b{k}"
        if rng.random() < 0.5:
            lines.append(batch_norm(name, int(out)))
            name += "n"
        if rng.random() < 0.3:
            lines.append(f"r{k} = Relu({name})")
            outputs.append(f"r{k}")
        order.append(name)
    cut = int(rng.integers(1, len(order)))
    first = list(rng.permutation(order))
    if rng.random() < 0.4 and cut > 1:
        lines.append(f"z = Concat<axis=1>({', '.join(first[:cut])})")
        first = ["z", *first[cut:]]
    lines.append(f"{JOINED}({', '.join(first)})")
    return image(" ".join(lines), " ".join(outputs), space=str(rng.choice(["5, 6", "H, W"])))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_a_folded_net_says_the_same(seed: int, horizontal: bool) -> None:
    proto = some_net(np.random.default_rng(seed))
    model, _ = nets.folded(proto, 1e-4, horizontal=horizontal)  # a Relu may leave next to nothing
    before, after = nets.operators(proto), nets.operators(model)
    assert after["Conv"] <= before["Conv"]
    assert after[BN] == 0
    if not horizontal:
        assert after.total() <= before.total()
        assert after["Slice"] == 0
