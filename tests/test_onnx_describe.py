"""What is known of a model: every reason has a case, and no corner of a graph is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnfold
from bnfold.channel_graph import Affine, Anchor, ConstantStep, Linear, Opaque, Operator, Sum, Tie
from bnfold.errors import InvalidModelError
from bnfold.onnx_describe import Described, describe
from bnfold.onnx_shapes import infer_shapes
from bnfold.planning import Reason
from tests import nets

BN = "BatchNormalization"


def constants() -> dict[str, nets.Array]:
    """What the nets here are made of; `net` takes what its text names."""
    rng = np.random.default_rng(0)
    return {
        "w": nets.weight(rng, 4, 3, 1, 1), "v": nets.weight(rng, 4, 4, 1, 1),
        "u": nets.weight(rng, 4, 3, 3, 3), "mat": nets.weight(rng, 4, 5), "k": nets.weight(rng, 4),
        "k4": nets.weight(rng, 4, 1, 1), "two": np.array([2], np.float32),
        "big": np.full((4, 1, 1), 1e30, np.float32), "shape4": np.array([2, 4, 4, 4]),
        "minus": np.array([1, -2, 1, 3], np.float32).reshape(4, 1, 1),
        "dead": np.array([1, 2, 0, 3], np.float32).reshape(4, 1, 1),
        "up": np.array([1, 2, 0.5, 3], np.float32).reshape(4, 1, 1),
        "k4p": np.array([1.5, 3, 0.25, 3], np.float32).reshape(4, 1, 1),
        "a_p": np.array([1.5, 1e-3, -0.25, 3], np.float32),
        "q": np.ones((4, 3, 1, 1), np.int8), "qs": np.array(0.5, np.float32),
        "q3": np.full(3, 0.5, np.float32),
        "q3z": np.zeros(3, np.int8), **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "p", 3),
    }  # fmt: skip


def net(
    body: str, inputs: str = "", outputs: str = "float[2,4,4,4] y", **header: int
) -> onnx.ModelProto:
    """A model over the image ``x`` and further inputs, with the constants that ``body`` names."""
    read = ", ".join(part for part in ("float[2,3,4,4] x", inputs) if part)
    words = nets.words(body)
    used = {name: value for name, value in constants().items() if name in words}
    return nets.model(f"g ({read}) => ({outputs}) {{ {body} }}", used, **header)


def described(proto: onnx.ModelProto, **options: bool) -> Described:
    model = ir.from_proto(proto)
    return describe(model, infer_shapes(model), **options)


def kinds(proto: onnx.ModelProto) -> dict[str, type[Operator]]:
    """What each operator is taken for."""
    return {operator.name: type(operator) for operator in described(proto).graph.operators}


# ---- every reason has a case ----


@dataclass(frozen=True, slots=True)
class Case:
    """A net in which the step ``s`` stays at ``level``, and what stands in its way."""

    body: str
    witness: tuple[str, ...]
    inputs: str = ""
    outputs: str = "float[2,4,4,4] y"
    level: str = "max"


FOUR = "float[2,4,4,4] z"

REASONS: dict[Reason, Case] = {
    Reason.TRAINING_MODE: Case(
        f"c = Conv(x, w) [s] y, rm, rv = {BN}<training_mode=1>(c, a_g, a_b, a_m, a_v)", ("s",)
    ),
    Reason.NOT_CONSTANT: Case(
        f"c = Conv(x, w) [s] y = {BN}(c, a_g, a_b, a_m, var)", ("'var'",), "float[4] var"
    ),
    Reason.WEIGHT_NOT_CONSTANT: Case(
        "c = Conv(x, z) [s] y = Mul(c, two)", ("Conv(c)",), "float[4,3,1,1] z"
    ),
    Reason.WEIGHT_TYPE: Case(
        "d = DequantizeLinear<axis = 1>(q, q3, q3z) c = Conv(x, d) [s] y = Mul(c, k4)",
        ("Conv(c)",),
    ),
    Reason.SHARED_WEIGHT: Case(
        "c = Conv(x, w) d = Conv(x, w) [s] b = Mul(c, two) y = Max(b, d)", ("Conv(d)",)
    ),
    Reason.CHANNEL_AXIS: Case("c = Conv(x, w) [s] y = Mul(c, k)", ("Conv(c)",)),
    Reason.OTHER_READER: Case(
        "c = Conv(x, w) [s] b = Mul(c, two) y = Max(b, c)", ("Max(y)",), level="local"
    ),
    Reason.GRAPH_BOUNDARY: Case(
        "c = Conv(x, w) [s] y = Mul(c, two)", ("'c'",), "",
        "float[2,4,4,4] y, float[2,4,4,4] c", "local",
    ),
    Reason.CAPTURED: Case(
        """c = Conv(x, w) [s] b = Mul(c, two) d = If(t) <
            then_branch = th () => (float[2,4,4,4] e) { e = Relu(c) },
            else_branch = el () => (float[2,4,4,4] f) { f = Abs(c) }> y = Max(b, d)""",
        ("'c'",), "bool t", level="local",
    ),
    Reason.ZERO_PADDING: Case(
        f"r = Relu(x) [s] b = {BN}(r, p_g, p_b, p_m, p_v) y = Conv<pads=[1,1,1,1]>(b, u)",
        ("Conv(y)",),
    ),
    Reason.BIAS_NOT_CONSTANT: Case(
        "c = Conv(x, w, z) [s] y = Mul(c, two)", ("Conv(c)",), "float[4] z"
    ),
    Reason.EXTRA_OPERATOR: Case(
        "r = Relu(z) [s] b = Add(r, k) y = MatMul(b, mat)", ("MatMul(y)",), FOUR,
        "float[2,4,4,5] y",
    ),
    Reason.RANGE: Case("c = Conv(x, w) [s] d = Mul(c, big) y = Mul(d, big)", ("Conv(c)",)),
    Reason.NO_LINEAR_NEIGHBOUR: Case(
        "r = Relu(z) [s] b = Mul(r, two) y = Relu(b)", ("Relu(r) before it", "Relu(y) after it"),
        FOUR, level="local",
    ),
    Reason.SIGN: Case(
        "c = Conv(x, w) e = Relu(c) [s] b = Mul(e, minus) r = Relu(b) y = Conv(r, v)",
        ("Relu(e)", "Relu(r)"),
    ),
    Reason.ZERO_SCALE: Case(
        "c = Conv(x, w) e = Relu(c) [s] b = Mul(e, dead) r = Relu(b) y = Conv(r, v)",
        ("Relu(r)",),
    ),
    Reason.SHIFT: Case(
        "c = Conv(x, w) e = Relu(c) [s] b = Add(e, k4) r = Relu(b) y = Conv(r, v)", ("Relu(r)",)
    ),
    Reason.FENCED: Case(
        "e = Sigmoid(z) [s] b = Mul(e, k4) y = Sigmoid(b)", ("Sigmoid(e)", "Sigmoid(y)"), FOUR
    ),
    Reason.OTHER_PATH: Case(
        f"""c = Conv(x, w) e = Relu(c) [s] b = {BN}(e, a_p, a_b, a_m, a_v) m = Add(b, e)
            r = Relu(m) y = Conv(r, v)""",
        ("Add(m)",),
    ),
    Reason.OTHER_STEP: Case(
        "c = Conv(x, w) e = Relu(c) [t] d = Mul(e, up) [s] b = Mul(e, k4p) y = Max(d, b)",
        ("t",),
    ),
}  # fmt: skip


# What only a torch model meets: tests/test_torch_reasons.py has the cases.
OF_TORCH = {
    Reason.HOOK, Reason.IN_PLACE, Reason.IN_CODE, Reason.SEVERAL_CALLS, Reason.NOT_CAPTURED,
}  # fmt: skip
# What keeps linear operators apart, and no step: tests/test_joining.py has the cases.
OF_JOINTS = {Reason.GROWS, Reason.BORDER, Reason.GEOMETRY}
# What only a check that fails brings about: tests/test_rollback.py has the cases.
OF_CHECKS = {Reason.ROLLED_BACK}


def test_every_reason_has_a_case() -> None:
    assert set(REASONS) | OF_TORCH | OF_JOINTS | OF_CHECKS == set(Reason)


def test_every_reason_has_a_code_and_a_sentence_of_its_own() -> None:
    assert len({reason.code for reason in Reason}) == len(Reason)
    assert len({reason.sentence for reason in Reason}) == len(Reason)
    assert all(re.fullmatch(r"BNF\d{3}", reason.code) for reason in Reason)


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.slug)
def test_step_that_stays_names_its_reason_and_what_stands_in_the_way(reason: Reason) -> None:
    case = REASONS[reason]
    proto = net(case.body, case.inputs, case.outputs, opset=19)
    _, report = nets.folded(proto, level=case.level)
    step = next(step for step in report.steps if step.name == "s")
    assert (step.verdict, step.code, step.reason) == ("kept", reason.code, reason.slug)
    assert step.witness == case.witness
    assert all(name in step.sentence for name in case.witness) or "{" not in reason.sentence
    if reason is not Reason.RANGE:  # which is known only once the weights are computed
        assert nets.verdicts(bnfold.explain(proto, level=case.level))["s"] == reason.code


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.slug)
def test_step_that_stays_names_what_is_in_the_model_and_what_would_free_it(reason: Reason) -> None:
    case = REASONS[reason]
    proto = net(case.body, case.inputs, case.outputs, opset=19)
    report = nets.folded(proto, level=case.level)[1]
    named = names(proto)
    for step in report.kept:
        assert step.witness
        assert {re.sub(r" (before|after) it$", "", w) for w in step.witness} <= named
        code = next(other for other in Reason if other.code == step.code)
        assert bool(step.hint) == bool(code.hint)
        assert "{" not in step.hint
        assert all(w in step.hint for w in step.witness) or "{" not in code.hint


def names(proto: onnx.ModelProto) -> set[str]:
    """What a witness may be: a node, by name or by what it makes, or a tensor in quotes."""
    found = {f"'{value.name}'" for graph in graphs(proto) for value in graph.input}
    for node in nets.nodes(proto):
        found |= {node.name or f"{node.op_type}({node.output[0]})"}
        found |= {f"'{name}'" for name in node.output}
    return found


def test_a_name_that_is_in_no_model_would_be_seen() -> None:
    proto = net(REASONS[Reason.CAPTURED].body, "bool t")
    assert {"Conv(c)", "s", "'c'", "'x'", "If(d)", "Relu(e)", "'f'"} <= names(proto)
    assert not {"Conv(d)", "c", "'w'", "Mul(b)", "Max(y) after it"} & names(proto)


# ---- what an operator is taken for ----


def test_operators_are_taken_for_what_they_are() -> None:
    proto = net(
        f"""c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v) r = Relu(b) i = Identity(r)
            d = Dropout(i) [sum] s = Add(d, c) t = Tanh(s) [mul] y = Mul(t, k4)"""
    )
    assert kinds(proto) == {
        "Conv(c)": Linear, "bn": Affine, "Relu(r)": Tie, "Identity(i)": Tie, "Dropout(d)": Tie,
        "sum": Sum, "Tanh(t)": Opaque, "mul": Affine,
    }  # fmt: skip


NO_STEPS = {
    "sum of two activations": "y = Add(c, c)",
    "constant along two axes": "both = Expand(k4, shape4) y = Mul(c, both)",
    "gate that is computed": "p = GlobalAveragePool(c) y = Mul(c, p)",
    "power": "y = Pow(c, two)",
    "division of a constant": "y = Div(k4, c)",
}


@pytest.mark.parametrize("body", NO_STEPS.values(), ids=NO_STEPS.keys())
def test_what_is_no_step_is_not_reported(body: str) -> None:
    model, report = nets.folded(net(f"c = Conv(x, w) {body}"))
    assert not report.steps
    assert "Conv" in nets.operators(model)


def test_integer_arithmetic_is_no_step() -> None:
    proto = nets.model(
        "g (int64[2,4] x) => (int64[2,4] y) { a = Add(x, one) b = Mul(a, one) y = Neg(b) }",
        {"one": np.array(1)},
    )
    assert not bnfold.fold(proto).report.steps


@pytest.mark.parametrize(
    ("dropout", "opset", "verdict"),
    [
        ("Dropout(c)", 17, "backward"),
        ("Dropout(c, half)", 17, "backward"),
        ("Dropout(c, half, no)", 17, "backward"),
        ("Dropout(c, half, yes)", 17, "BNF018"),
        ("Dropout(c, half, t)", 17, "BNF018"),
        ("Dropout(c)", 7, "backward"),
        ("Dropout<is_test=1>(c)", 6, "backward"),
        ("Dropout(c)", 6, "BNF018"),
    ],
)
def test_units_pass_a_dropout_only_when_it_does_nothing(
    dropout: str, opset: int, verdict: str
) -> None:
    mul = "Mul<broadcast=1>" if opset < 7 else "Mul"
    proto = nets.model(
        f"""g (float[2,3,4,4] x, bool t) => (float[2,4,4,4] y) {{
            c = Conv(x, w) d = {dropout} [mul] y = {mul}(d, two) }}""",
        {"w": constants()["w"], "two": constants()["two"], "half": np.array(0.5, np.float32),
         "yes": np.array(True), "no": np.array(False)},
        opset=opset,
    )  # fmt: skip
    report = bnfold.explain(proto)
    assert nets.verdicts(report) == {"mul": verdict}
    assert nets.witness(report, "mul") == (() if verdict == "backward" else ("Dropout(d)", "'y'"))


def test_mask_that_is_read_makes_a_dropout_opaque() -> None:
    proto = net(
        "c = Conv(x, w) d, mask = Dropout(c) [mul] y = Mul(d, two)", "",
        "float[2,4,4,4] y, bool[2,4,4,4] mask",
    )  # fmt: skip
    report = bnfold.explain(proto)
    assert nets.verdicts(report) == {"mul": "BNF018"}
    assert nets.witness(report, "mul") == ("Dropout(d)", "'y'")


# ---- subgraphs ----

INSIDE = f"c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v)"

BODIES = {
    "If": f"""y = If(t) <
        then_branch = th () => (float[2,4,4,4] b) {{ {INSIDE} }},
        else_branch = el () => (float[2,4,4,4] e) {{ e = Conv(x, w2) }}>""",
    "Loop": f"""n = Constant<value_int = 3>() go = Constant<value = bool {{1}}>()
        y = Loop(n, go, z) <body = lo (int64 i, bool g, float[2,4,4,4] p) =>
            (bool g2, float[2,4,4,4] s) {{ g2 = Identity(g) {INSIDE} s = Add(p, b) }}>""",
    "Scan": f"""[keep] y = Scan<num_scan_inputs = 1,
        body = sc (float[2,4,4,4] p, float[2,3,4,4] r) => (float[2,4,4,4] s) {{
            {INSIDE.replace("(x", "(r")} s = Add(p, b) }}>(z, xs)""",
    "If in Loop": f"""n = Constant<value_int = 2>() go = Constant<value = bool {{1}}>()
        y = Loop(n, go, z) <body = lo (int64 i, bool g, float[2,4,4,4] p) =>
            (bool g2, float[2,4,4,4] s) {{ g2 = Identity(g) o = If(t) <
                then_branch = th () => (float[2,4,4,4] b) {{ {INSIDE} }},
                else_branch = el () => (float[2,4,4,4] e) {{ e = Relu(p) }}> s = Add(p, o) }}>""",
}


def with_body(control: str, own: bool) -> onnx.ModelProto:
    """``control``, its weights initializers of the body (``own``) or of the main graph."""
    rng = np.random.default_rng(1)
    proto = nets.model(
        f"""g (float[2,3,4,4] x, float[2,4,4,4] z, float[2,2,3,4,4] xs, bool t)
            => (float[2,4,4,4] y) {{ {control} }}""",
        {"w2": nets.weight(rng, 4, 3, 1, 1)} if "w2" in control else {},
    )
    made = {name: constants()[name] for name in ("w", "a_g", "a_b", "a_m", "a_v")}
    graph = next(g for g in graphs(proto) if any(n.op_type == BN for n in g.node))
    target = graph if own else proto.graph
    target.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in made.items())
    return proto


def graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [proto.graph]
    for graph in found:
        found.extend(a.g for n in graph.node for a in n.attribute if a.HasField("g"))
    return found


@pytest.mark.parametrize("own", [True, False], ids=["own weights", "weights of the main graph"])
@pytest.mark.parametrize("control", BODIES.values(), ids=BODIES.keys())
def test_steps_fold_inside_a_body(control: str, own: bool) -> None:
    proto = with_body(control, own)
    model, report = nets.folded(proto)
    assert nets.verdicts(report)["bn"] == "backward"
    assert BN not in {node.op_type for node in nets.nodes(model)}
    names = [tensor.name for graph in graphs(model) for tensor in graph.initializer]
    assert not {name for name in names if name.startswith("a_")}
    if "Scan" not in control:  # ONNX Runtime has no Scan over these shapes without a warning
        assert nets.runtime_says(model) == ""


def test_value_from_outside_is_not_restored_by_a_step_inside() -> None:
    proto = net(
        f"""c = Conv(x, w) y = If(t) <
            then_branch = th () => (float[2,4,4,4] b) {{
                [bn] b = {BN}(c, a_g, a_b, a_m, a_v) }},
            else_branch = el () => (float[2,4,4,4] e) {{ e = Relu(c) }}>""",
        "bool t",
    )
    for level, code in (("max", "BNF018"), ("local", "BNF009")):
        model, report = nets.folded(proto, level=level)
        assert nets.same(proto, model)
        assert nets.verdicts(report) == {"bn": code}
        assert "'c'" in nets.witness(report, "bn")


def test_value_captured_two_levels_down_keeps_its_units() -> None:
    proto = net(
        f"""c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v) d = If(t) <
            then_branch = th () => (float[2,4,4,4] e) {{ e = If(t) <
                then_branch = th2 () => (float[2,4,4,4] f) {{ f = Relu(c) }},
                else_branch = el2 () => (float[2,4,4,4] h) {{ h = Abs(b) }}> }},
            else_branch = el () => (float[2,4,4,4] i) {{ i = Abs(b) }}> y = Max(b, d)""",
        "bool t",
    )
    for level, code in (("max", "BNF018"), ("local", "BNF009")):
        model, report = nets.folded(proto, level=level)
        assert nets.same(proto, model)
        assert nets.verdicts(report) == {"bn": code}
        assert "'c'" in nets.witness(report, "bn")


def test_output_of_a_step_may_be_captured() -> None:
    proto = net(
        f"""c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v) y = If(t) <
            then_branch = th () => (float[2,4,4,4] e) {{ e = Relu(b) }},
            else_branch = el () => (float[2,4,4,4] i) {{ i = Abs(b) }}>""",
        "bool t",
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert BN not in nets.operators(model)


def test_weight_read_in_a_body_too_is_shared() -> None:
    proto = net(
        """c = Conv(x, w) [mul] b = Mul(c, two) d = If(t) <
            then_branch = th () => (float[2,4,4,4] e) { e = Conv(x, w) },
            else_branch = el () => (float[2,4,4,4] i) { i = Abs(b) }> y = Max(b, d)""",
        "bool t",
    )
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {"mul": "BNF005"}
    assert nets.witness(report, "mul") == ("Conv(e)",)


@pytest.mark.parametrize("swapped", [False, True], ids=["activation first", "constant first"])
def test_one_name_in_two_branches_is_two_values(swapped: bool) -> None:
    active = "h = Relu(z) o = Abs(h)"
    fixed = "h = Constant<value_floats = [3.0]>() c = Conv(x, w) [mul] o = Mul(c, h)"
    first, second = (fixed, active) if swapped else (active, fixed)
    proto = net(
        f"""y = If(t) <
            then_branch = th () => (float[2,4,4,4] o) {{ {first} }},
            else_branch = el () => (float[2,4,4,4] o) {{ {second} }}>""",
        f"bool t, {FOUR}",
    )
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {"mul": "backward"}


# ---- functions ----

FUNCTION = f"""<domain: "f", opset_import: ["" : 17]>
    block (a) => (b) {{
        s = Constant<value_ints = [4, 3, 1, 1]>()
        flat = Constant<value_floats = [{", ".join(f"{0.1 * i - 0.5:.1f}" for i in range(12))}]>()
        w = Reshape(flat, s)
        one = Constant<value_floats = [1.0, -1.5, 0.25, 2.0]>()
        var = Constant<value_floats = [1.0, 0.5, 0.25, 2.0]>()
        c = Conv(a, w)
        [bn] b = {BN}(c, one, one, one, var)
    }}"""


def with_function(
    text: str, call: str, given: Mapping[str, nets.Array] | None = None
) -> onnx.ModelProto:
    proto = nets.model(
        f"g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{ {call} }}", given, domains=["f"]
    )
    proto.functions.append(onnx.parser.parse_function(text))
    return proto


def test_steps_fold_inside_a_function() -> None:
    model, report = nets.folded(with_function(FUNCTION, "y = f.block(x)"))
    assert nets.verdicts(report) == {"bn": "backward"}
    inside = [node.op_type for node in model.functions[0].node]
    assert sorted(inside) == ["Constant", "Constant", "Conv"]
    assert nets.runtime_says(model) == ""


def test_function_that_is_called_twice_folds_once() -> None:
    text = FUNCTION.replace("[4, 3, 1, 1]", "[3, 3, 1, 1]")
    text = re.sub(
        r"(flat = Constant<value_floats = \[)[^]]*", r"\g<1>" + ", ".join(["0.5"] * 9), text
    )
    text = text.replace(", 2.0]", "]")
    proto = with_function(text, "z = f.block(x) y = f.block(z)")
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "backward"}
    assert nets.operators(model) == {"block": 2}


def test_weight_that_is_an_input_of_a_function_is_not_constant() -> None:
    text = f"""<domain: "f", opset_import: ["" : 17]>
        block (a, w, k, v) => (b) {{ c = Conv(a, w) [bn] b = {BN}(c, k, k, k, v) }}"""
    given = {"w": constants()["w"], "k": constants()["k"], "v": constants()["a_v"]}
    proto = with_function(text, "y = f.block(x, w, k, v)", given)
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert nets.verdicts(report) == {"bn": "BNF002"}


def test_step_whose_attribute_a_caller_sets_is_no_step() -> None:
    text = f"""<domain: "f", opset_import: ["" : 17]>
        block <e> (a, w, k, v) => (b) {{
            c = Conv(a, w) b = {BN}<epsilon: float = @e>(c, k, k, k, v) }}"""
    given = {"w": constants()["w"], "k": constants()["k"], "v": constants()["a_v"]}
    proto = with_function(text, "y = f.block<e = 0.5>(x, w, k, v)", given)
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert not report.folded


def test_linear_operator_whose_attribute_a_caller_sets_takes_no_shift() -> None:
    text = """<domain: "f", opset_import: ["" : 17]>
        block <p> (a) => (b) {
            s = Constant<value_ints = [4, 3, 3, 3]>()
            w = ConstantOfShape<value = float[1] {0.5}>(s)
            one = Constant<value_float = 1.0>()
            r = Relu(a)
            [add] t = Add(r, one)
            b = Conv<pads: ints = @p>(t, w)
        }"""
    proto = with_function(text, "y = f.block<p = [1,1,1,1]>(x)")
    _, report = nets.folded(proto)
    assert not report.folded


def test_function_that_redefines_batchnorm_is_believed() -> None:
    text = f"""<domain: "", opset_import: ["" : 17]>
        {BN} (a, g, b, m, v) => (y) {{ y = Relu(a) }}"""
    proto = net(f"c = Conv(x, w) y = {BN}(c, a_g, a_b, a_m, a_v)")
    proto.functions.append(onnx.parser.parse_function(text))
    result = bnfold.fold(proto)
    assert nets.same(proto, result.model)
    assert not result.report.steps


def test_function_of_another_domain_may_be_named_batchnorm() -> None:
    text = f"""<domain: "f", opset_import: ["" : 17]>
        {BN} (a, g, b, m, v) => (y) {{ y = Relu(a) }}"""
    names = ("w", "a_g", "a_b", "a_m", "a_v")
    given = {name: constants()[name] for name in names}
    proto = with_function(text, f"c = Conv(x, w) y = f.{BN}(c, a_g, a_b, a_m, a_v)", given)
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert not report.steps


# ---- initializers that are inputs too ----


@pytest.mark.parametrize(
    ("ir_version", "trust", "verdict"),
    [(3, False, "backward"), (4, False, "BNF002"), (10, False, "BNF002"), (4, True, "backward")],
)
def test_initializer_that_is_an_input_is_constant_when_nobody_can_override_it(
    ir_version: int, trust: bool, verdict: str
) -> None:
    proto = net(f"c = Conv(x, w) [bn] y = {BN}(c, a_g, a_b, a_m, a_v)", ir=ir_version, opset=8)
    nets.declare_initializers(proto)
    model, report = nets.folded(proto, trust_initializers=trust)
    assert nets.verdicts(report) == {"bn": verdict}
    if verdict == "backward":
        left = {value.name for value in model.graph.input}
        assert not left & {"a_g", "a_b", "a_m", "a_v"}


# ---- shapes that are not known ----

ANY_SIZE = {
    "batch": "float[N,3,8,8] x",
    "batch and space": "float[N,3,H,W] x",
    "nameless": "float[?,3,?,?] x",
    "everything": "float[A,B,C,D] x",
}


@pytest.mark.parametrize("given", ANY_SIZE.values(), ids=ANY_SIZE.keys())
@pytest.mark.parametrize("step", [f"{BN}(c, a_g, a_b, a_m, a_v)", "Mul(c, k4)", "Add(k4, c)"])
def test_symbolic_sizes_stop_no_fold_after_a_conv(given: str, step: str) -> None:
    proto = net(f"c = Conv(x, w) [s] y = {step}", outputs="float[A,B,C,D] y")
    proto.graph.input[0].CopyFrom(onnx.parser.parse_graph(f"g ({given}) => () {{}}").input[0])
    assert nets.verdicts(bnfold.explain(proto)) == {"s": "backward"}
    sized = onnx.ModelProto.FromString(proto.SerializeToString())
    sized.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    before, after = bnfold.fold(proto), bnfold.fold(sized)
    assert before.model.graph.node == after.model.graph.node
    if "3" in given:
        nets.folded(proto)  # it can be run


UNKNOWN_RANK = {
    "batchnorm": (f"c = Conv(u0, w) [s] y = {BN}(c, a_g, a_b, a_m, a_v)", "backward"),
    "constant": ("r = Relu(u0) [s] h = Mul(r, k3) y = Conv(h, w)", "BNF006"),
    "constant after a Conv": ("h = Conv(u0, w) [s] y = Mul(h, k4)", "backward"),
    "scalar of rank 0": ("r = Relu(u0) [s] h = Mul(r, qs) y = Conv(h, w)", "forward"),
    "scalar of rank 1": ("r = Relu(u0) [s] h = Mul(r, two) y = Conv(h, w)", "BNF006"),
    "matmul": ("h = MatMul(u0, square) [s] y = Mul(h, row)", "BNF006"),
    "matmul and scalar": ("h = MatMul(u0, square) [s] y = Mul(h, qs)", "backward"),
    "bias of a matmul": ("h = MatMul(u0, square) [s] y = Add(h, row)", "none"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "verdict"), UNKNOWN_RANK.values(), ids=UNKNOWN_RANK.keys())
def test_unknown_rank_stops_what_it_must(body: str, verdict: str) -> None:
    proto = net(f"u0 = Reshape(x, n) {body}", "int64[R] n", "float[A,B,C,D] y")
    rng = np.random.default_rng(3)
    for name, value in {"k3": nets.weight(rng, 3, 1, 1), "square": nets.weight(rng, 4, 6),
                        "row": nets.weight(rng, 6)}.items():  # fmt: skip
        if re.search(rf"\b{name}\b", body):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto)
    assert nets.verdicts(result.report) == ({} if verdict == "none" else {"s": verdict})
    onnx.checker.check_model(result.model, full_check=True)
    given = {"x": nets.weight(rng, 2, 3, 4, 4), "n": np.array([2, 3, 4, 4])}
    before, after = nets.run(proto, given)["y"], nets.run(result.model, given)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_shapes_need_not_be_stated() -> None:
    body = "c = Conv(x, w) r = Relu(c) [s] m = Mul(r, k4) [t] y = Add(m, k4) "
    proto = net(body + "z = Conv(y, v)", outputs="float[2,4,4,4] z")
    assert not proto.graph.value_info
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"s": "forward", "t": "forward"}
    assert nets.operators(model) == {"Conv": 2, "Relu": 1}


def test_wider_shapes_that_are_stated_give_way_to_inferred_ones() -> None:
    proto = net("c = Conv(x, w) r = Relu(c) [s] m = Mul(r, k4) y = Conv(m, v)")
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["a", "b", "c", "d"])
    )
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {"s": "forward"}


# ---- names ----


def test_nodes_without_a_name_of_their_own_are_called_by_what_they_make() -> None:
    proto = net(
        f"""c = Conv(x, w) [twice] d = {BN}(c, a_g, a_b, a_m, a_v) t1 = Relu(d) e = Conv(t1, v)
            [twice] f = {BN}(e, a_g, a_b, a_m, a_v) t2 = Relu(f) h = Conv(t2, v2)
            y = {BN}(h, a_g, a_b, a_m, a_v)"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(constants()["v"], "v2"))
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {f"{BN}({v})": "backward" for v in "dfy"}
    assert [step.into for step in report.steps] == [("Conv(c)",), ("Conv(e)",), ("Conv(h)",)]


def test_output_keeps_its_name_whatever_vanishes() -> None:
    proto = net(
        f"""c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v) i = Identity(b)
            [mul] y = Mul(i, two)"""
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "backward", "mul": "backward"}
    assert set(nets.operators(model)) == {"Conv", "Identity"}


# ---- values that are read by many, or are outputs ----


def test_step_folds_into_all_that_read_it() -> None:
    rng = np.random.default_rng(2)
    proto = net(
        f"""r = Relu(x) [bn] b = {BN}(r, p_g, p_b, p_m, p_v)
            c = Conv(b, w) d = Conv(b, u2) e = Conv(b, u3) s = Max(c, d) y = Max(s, e)"""
    )
    for name in ("u2", "u3"):
        tensor = onnx.numpy_helper.from_array(nets.weight(rng, 4, 3, 1, 1), name)
        proto.graph.initializer.append(tensor)
    _, report = nets.folded(proto)
    assert nets.verdicts(report) == {"bn": "forward"}
    assert report.steps[0].into == ("Conv(c)", "Conv(d)", "Conv(e)")


@pytest.mark.parametrize(
    ("other", "outputs", "code"),
    [
        ("d = Relu(b)", "float[2,3,4,4] d", "BNF018"),
        ("", "float[2,3,4,4] b", "BNF018"),
        ("d = Conv<pads=[0,0,0,1]>(b, w2)", "float[2,4,4,5] d", "BNF010"),
    ],
)
def test_step_folds_into_all_that_read_it_or_into_none(other: str, outputs: str, code: str) -> None:
    proto = net(
        f"r = Relu(x) [bn] b = {BN}(r, p_g, p_b, p_m, p_v) y = Conv(b, w) {other}",
        outputs=f"float[2,4,4,4] y, {outputs}",
    )
    if "w2" in other:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constants()["w"], "w2"))
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert nets.verdicts(report) == {"bn": code}


def test_conv_that_reads_a_step_twice_is_no_reader_that_can_take_it() -> None:
    proto = nets.model(
        """g (float[3,3,1,1] x) => (float[3,3,1,1] y) {
            r = Relu(x) [s] a = Mul(r, k) y = Conv(a, a) }""",
        {"k": np.full((3, 1, 1), 2, np.float32)},
    )
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert set(nets.verdicts(report)) == {"s"}


def test_step_between_input_and_output_stays_even_when_it_does_nothing() -> None:
    proto = nets.model(
        "g (float[2,3] x) => (float[2,3] y) { [s] y = Mul(x, one) }", {"one": np.array([1], "f")}
    )
    model, report = nets.folded(proto)
    assert nets.same(proto, model)
    assert nets.verdicts(report) == {"s": "BNF008"}


def test_step_that_does_nothing_vanishes() -> None:
    proto = nets.model(
        "g (float[2,3] x) => (float[2,3] y) { r = Relu(x) [s] m = Mul(r, one) y = Relu(m) }",
        {"one": np.array([1], "f")},
    )
    model, report = nets.folded(proto)
    assert nets.verdicts(report) == {"s": "identity"}
    assert nets.operators(model) == {"Relu": 2}


# ---- in memory ----


@pytest.mark.parametrize("where", ["main graph", "branch"])
def test_nodes_may_stand_in_any_order(where: str) -> None:
    inner = f"c = Conv(x, w) [bn] b = {BN}(c, a_g, a_b, a_m, a_v) r = Relu(b)"
    body = (
        f"{inner} y = Abs(r)"
        if where == "main graph"
        else f"""y = If(t) <
        then_branch = th () => (float[2,4,4,4] r) {{ {inner} }},
        else_branch = el () => (float[2,4,4,4] e) {{ e = Conv(x, v2) }}>"""
    )
    proto = net(body, "bool t")
    if where == "branch":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constants()["w"], "v2"))
    sound = onnx.ModelProto.FromString(proto.SerializeToString())
    for graph in graphs(proto):
        graph.node.reverse()
    model = ir.from_proto(proto)
    folded = bnfold.fold(model)
    assert nets.verdicts(folded.report) == {"bn": "backward"}
    folded.model.graph.sort()
    assert nets.difference(sound, ir.to_proto(folded.model)) <= 1e-6


# ---- anchors and readers, as facts ----


def test_anchors_say_who_outside_reads_a_value() -> None:
    graph = described(net(REASONS[Reason.CAPTURED].body, "bool t")).graph
    anchors = {graph.values[value].name: anchor for value, anchor in graph.anchors.items()}
    assert anchors["x"] is Anchor.INPUT
    assert anchors["y"] is Anchor.OUTPUT
    assert anchors["c"] is Anchor.CAPTURED


def test_readers_of_a_weight_are_counted_by_storage() -> None:
    graph = described(net("i = Identity(w) c = Conv(x, i) d = Conv(x, w) y = Max(c, d)")).graph
    weights = [op.weight for op in graph.operators if isinstance(op, Linear)]
    assert {w.storage for w in weights if w} == {"w"}
    assert all(w is not None and w.readers == ("Conv(c)", "Conv(d)") for w in weights)


def test_constant_steps_are_told_from_steps() -> None:
    proto = net("k2 = Mul(w, two) c = Conv(x, k2) [s] y = Mul(c, two)")
    assert kinds(proto) == {"Mul(k2)": ConstantStep, "Conv(c)": Linear, "s": Affine}


# ---- BatchNormalizations that mean nothing ----

MEANINGLESS = {
    "negative variance": ("a_v", np.array([1, -1, 1, 1], "f"), "variance of channel 1 is -1.0"),
    "variance that is no number": ("a_v", np.array([1, 1, np.nan, 1], "f"), "channel 2 is nan"),
    "too few": ("a_g", np.ones(3, "f"), r"scale has shape \[3\] for 4 channels"),
    "a matrix": ("a_m", np.ones((4, 1), "f"), r"mean has shape \[4, 1\] for 4 channels"),
}


@pytest.mark.parametrize(("name", "value", "words"), MEANINGLESS.values(), ids=MEANINGLESS.keys())
def test_batchnorm_that_means_nothing_is_refused_by_name(
    name: str, value: nets.Array, words: str
) -> None:
    proto = net(f"c = Conv(x, w) [bn] y = {BN}(c, a_g, a_b, a_m, a_v)")
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    with pytest.raises(InvalidModelError, match=f"node 'bn': .*{words}; "):
        bnfold.fold(proto)
