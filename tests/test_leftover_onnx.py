"""A BatchNormalization that stays in an ONNX model, written in another form, end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import DTypeLike

import bnfold
from bnfold.cli import main
from bnfold.onnx_leftover import rewritten
from bnfold.onnx_pass import FoldAffineSteps
from bnfold.verify.judge import Verdict
from tests import nets

BN = "BatchNormalization"
FORMS = {"affine": ("Mul", "Add"), "depthwise": ("Conv",)}
TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


def statistics(name: str, channels: int = 4, dtype: DTypeLike = np.float32) -> Any:
    """As `nets.batch_norm`, without scales that a half can't hold."""
    found = nets.batch_norm(np.random.default_rng(3), name, channels, dtype)
    found[f"{name}_g"] = np.linspace(-1.5, 2.0, channels).astype(dtype)
    return found


def fenced(
    sizes: str = "N,4,5,6", kind: str = "float", *, attributes: str = "", **header: Any
) -> Any:
    """A BatchNormalization between operators that let no units through."""
    return nets.model(
        f"""g ({kind}[{sizes}] x) => ({kind}[{sizes}] y) {{
            a = Sigmoid(x) [bn] b = {BN}{attributes}(a, n_g, n_b, n_m, n_v) y = Sigmoid(b) }}""",
        statistics("n", dtype=TYPES.get(kind, np.float32)), **header,
    )  # fmt: skip


def forms(report: Any) -> dict[str, str]:
    return {step.name: step.form for step in report.kept}


RANKS = {
    ("N,4", "affine"): "affine", ("N,4", "depthwise"): "",
    **{(sizes, form): form for sizes in ("N,4,5", "N,4,5,6", "N,4,2,H,3") for form in FORMS},
    ("N,4,2,2,2,2", "affine"): "affine", ("N,4,2,2,2,2", "depthwise"): "",
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "form"), RANKS)
def test_every_rank_takes_the_forms_that_it_has(sizes: str, form: str) -> None:
    model, report = nets.folded(fenced(sizes), leftover=form)
    taken = RANKS[sizes, form]
    assert forms(report) == {"bn": taken}
    assert dict(nets.operators(model)) == {
        "Sigmoid": 2,
        **dict.fromkeys(FORMS.get(taken, (BN,)), 1),
    }
    assert nets.runtime_says(model) == ""


VERSIONS = {6: "<is_test=1>", 7: "", 9: "<momentum=0.5>", 13: "", 14: "<training_mode=0>", 15: "",
            17: "", 21: "<epsilon=0.001>"}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", VERSIONS)
def test_every_version_of_the_operator_set_takes_it(opset: int, form: str) -> None:
    proto = fenced("2,4,5,6", attributes=VERSIONS[opset], opset=opset, ir=3 if opset < 7 else 8)
    if opset < 7:
        nets.declare_initializers(proto)
    onnx.checker.check_model(proto, full_check=True)
    result = bnfold.fold(proto, leftover=form)
    onnx.checker.check_model(result.model, full_check=True)
    # Before version 7 an Add needs attributes to broadcast.
    assert forms(result.report) == {"bn": form if opset >= 7 or form == "depthwise" else ""}
    nets.assert_nothing_dangles(result.model)
    if opset >= 7:
        assert nets.difference(proto, result.model) < 1e-6


KINDS = {
    ("float16", 17, "affine"): True, ("float16", 17, "depthwise"): True,
    ("double", 17, "affine"): True,
    ("double", 17, "depthwise"): False,  # no runtime has such a Conv
    ("bfloat16", 17, "affine"): True,
    ("bfloat16", 17, "depthwise"): False, ("bfloat16", 22, "depthwise"): True,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "opset", "form"), KINDS)
def test_every_type_takes_the_forms_that_its_operators_have(
    kind: str, opset: int, form: str
) -> None:
    proto = fenced(kind=kind, opset=opset, ir=10)
    if kind == "bfloat16":
        for tensor in proto.graph.initializer:
            wide = onnx.numpy_helper.to_array(tensor)
            made = onnx.helper.make_tensor(
                tensor.name, onnx.TensorProto.BFLOAT16, wide.shape, wide.ravel()
            )
            tensor.CopyFrom(made)
    _, report = nets.folded(proto, tolerance=1e-2 if "16" in kind else 1e-6, leftover=form)
    assert forms(report) == {"bn": form if KINDS[kind, opset, form] else ""}


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_computed_in_float64_and_cast_once(form: str) -> None:
    model, _ = nets.folded(fenced(), leftover=form)
    g, b, m, v = (statistics("n")[f"n_{p}"].astype(np.float64) for p in "gbmv")
    scale = g / np.sqrt(v + float(np.float32(1e-5)))
    found = [onnx.numpy_helper.to_array(t).ravel() for t in model.graph.initializer]
    np.testing.assert_array_equal(found[0], scale.astype(np.float32))
    np.testing.assert_array_equal(found[1], (b - m * scale).astype(np.float32))


PURE = {
    "a scale": ({"n_b": 0.0, "n_m": 0.0}, {"affine": ["Mul"], "depthwise": ["Conv"]}),
    "a shift": ({"n_g": 2.0, "n_v": 4.0 - 2.0**-10}, {"affine": ["Add"], "depthwise": ["Conv"]}),
    "nothing": ({"n_g": 2.0, "n_v": 4.0 - 2.0**-10, "n_b": 0.0, "n_m": 0.0},
                {"affine": [BN], "depthwise": [BN]}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("given", "made"), PURE.values(), ids=PURE.keys())
def test_a_pure_scale_or_shift_needs_one_operator_alone(
    given: dict[str, float], made: dict[str, list[str]], form: str
) -> None:
    proto = fenced(attributes=f"<epsilon={2.0**-10}>")
    for tensor in proto.graph.initializer:
        if tensor.name in given:
            value = np.full(4, given[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    # The tensors before and after it are the model's own, so that not even an identity goes.
    proto.graph.output.append(onnx.helper.make_tensor_value_info("a", 1, ["N", 4, 5, 6]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("b", 1, ["N", 4, 5, 6]))
    model, _ = nets.folded(proto, leftover=form)
    kinds = [node.op_type for node in model.graph.node if node.op_type != "Sigmoid"]
    assert kinds == made[form]


def test_one_operator_stays_what_it_is() -> None:
    proto = nets.model(
        """g (float[N,3,2,2] x) => (float[N,3,2,2] y) {
            a = Sigmoid(x) b = Mul(a, c) d = Sigmoid(b) e = Sub(c, d) f = Sigmoid(e)
            h = Div(f, c) y = Sigmoid(h) }""",
        {"c": np.array([2, 3, 4], np.float32).reshape(3, 1, 1)},
    )
    for form in FORMS:
        model, report = nets.folded(proto, leftover=form)
        assert set(forms(report).values()) == {""}
        assert nets.same(proto, model)


def test_names_of_tensors_nodes_and_constants_stay() -> None:
    for form, names in {"affine": {"n_g", "bn_shift"}, "depthwise": {"n_g", "n_b"}}.items():
        model, _ = nets.folded(fenced(), leftover=form)
        assert {tensor.name for tensor in model.graph.initializer} == names
        maker = next(node for node in model.graph.node if "b" in node.output)
        assert maker.op_type == FORMS[form][-1]
        assert "bn" in {node.name for node in model.graph.node}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_others_read_stay_theirs(form: str) -> None:
    proto = nets.model(
        f"""g (float[N,4,5] x) => (float[N,4,5] y, float[4] n_b2) {{
            a = Sigmoid(x) [one] b = {BN}(a, n_g, n_b, n_m, n_v) c = Sigmoid(b)
            [two] d = {BN}(c, n_g, n_g, n_m, n_v) y = Sigmoid(d) n_b2 = Sigmoid(n_b) }}""",
        statistics("n"),
    )
    model, report = nets.folded(proto, leftover=form)
    assert forms(report) == {"one": form, "two": form}
    np.testing.assert_array_equal(nets.constant(model, "n_b"), statistics("n")["n_b"])


@pytest.mark.parametrize("form", FORMS)
def test_in_training_mode_it_stays_as_it_is(form: str) -> None:
    proto = nets.model(
        f"""g (float[N,4,5] x) => (float[N,4,5] y) {{
            [bn] y, m, v = {BN}<training_mode=1>(x, n_g, n_b, n_m, n_v) }}""",
        statistics("n"),
    )  # fmt: skip
    result = bnfold.fold(proto, leftover=form)
    assert forms(result.report) == {"bn": ""}
    assert nets.same(proto, result.model)


@pytest.mark.parametrize("form", FORMS)
def test_inside_a_subgraph(form: str) -> None:
    proto = nets.model(
        f"""g (float[2,4,5,5] x, bool t) => (float[2,4,5,5] y) {{
            y = If(t) <
                then_branch = p () => (float[2,4,5,5] b) {{
                    [inner] n = {BN}(x, n_g, n_b, n_m, n_v) b = Sigmoid(n) }},
                else_branch = q () => (float[2,4,5,5] c) {{ c = Sigmoid(x) }}>
        }}""",
        statistics("n"),
    )
    result = bnfold.fold(proto, leftover=form)
    onnx.checker.check_model(result.model, full_check=True)
    nets.assert_nothing_dangles(result.model)
    assert forms(result.report) == {"inner": form}
    assert {node.op_type for node in nets.nodes(result.model)} == {"If", "Sigmoid", *FORMS[form]}
    given = {"x": nets.feeds(fenced("2,4,5,5"))["x"], "t": np.array(True)}
    before, after = (nets.run(each, given)["y"] for each in (proto, result.model))
    np.testing.assert_allclose(after, before, rtol=1e-5)


def with_function(*, stated: bool) -> onnx.ModelProto:
    """A step in a function, which may state the type and shape of what it reads (IR version 10)."""
    constants = " ".join(f"{name} = Constant<value_floats = [0.5, 1.5]>()" for name in "gbmv")
    text = f"""<domain: "f", opset_import: ["" : 17]> block (a) => (d) {{
        {constants} e = Sigmoid(a) [bn] c = {BN}(e, g, b, m, v) d = Sigmoid(c) }}"""
    proto = nets.model(
        "g (float[1,2,3] x) => (float[1,2,3] y) { y = f.block(x) }", domains=["f"], ir=10
    )
    proto.functions.append(onnx.parser.parse_function(text))
    if stated:
        info = onnx.helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, [1, 2, 3])
        proto.functions[0].value_info.append(info)
    return proto


@pytest.mark.parametrize("form", FORMS)
def test_inside_a_function(form: str) -> None:
    model, report = nets.folded(with_function(stated=True), leftover=form)
    assert forms(report) == {"bn": form}
    inside = [node.op_type for node in model.functions[0].node if node.op_type != "Constant"]
    assert inside == ["Sigmoid", *FORMS[form], "Sigmoid"]
    assert nets.runtime_says(model) == ""


def test_in_a_function_that_does_not_state_a_shape_it_stays() -> None:
    """What goes in has the shapes and types of whoever calls it."""
    report = bnfold.fold(with_function(stated=False), leftover="depthwise").report
    assert forms(report) == {"bn": ""}


def test_half_precision_that_overflows_keeps_its_form() -> None:
    proto = fenced(kind="float16")
    for tensor in proto.graph.initializer:
        if tensor.name in ("n_m", "n_v"):
            value = np.full(4, 6e4 if tensor.name == "n_m" else 1e-3, np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    for form in FORMS:
        result = bnfold.fold(proto, leftover=form)
        assert forms(result.report) == {"bn": ""}
        assert nets.same(proto, result.model)


def mixed(seed: int = 0) -> onnx.ModelProto:
    """A fold before a step that stays, with a merge into it, and another level's leftovers."""
    rng = np.random.default_rng(seed)
    return nets.model(
        f"""g (float[1,3,8,8] x) => (float[1,4,8,8] y) {{
            [conv] c = Conv<pads=[1,1,1,1]>(x, w) [bn0] d = {BN}(c, n_g, n_b, n_m, n_v)
            a = Sigmoid(d) [bn1] b = {BN}(a, m_g, m_b, m_m, m_v)
            [bn2] e = {BN}(b, k_g, k_b, k_m, k_v) f = Sigmoid(e)
            [bn3] h = {BN}(f, l_g, l_b, l_m, l_v) y = Sigmoid(h) }}""",
        {"w": nets.weight(rng, 4, 3, 3, 3),
         **{k: v for name in "nmkl" for k, v in statistics(name).items()}},
    )  # fmt: skip


@pytest.mark.parametrize("level", ["max", "local"])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_step_absorbed_goes_with_it(form: str, level: str) -> None:
    model, report = nets.folded(mixed(), leftover=form, level=level)
    assert sorted(forms(report).values()) == [form, form]
    assert BN not in nets.operators(model)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_run_finds_nothing_more_to_do(form: str) -> None:
    model, _ = nets.folded(mixed(), leftover=form)
    again, report = nets.folded(model, leftover=form)
    assert not report.changed
    assert nets.same(model, again)


# ---- the check ----


@pytest.mark.parametrize("form", FORMS)
def test_the_check_knows_such_a_fold_and_passes_it(form: str) -> None:
    reference = mixed()
    candidate, _ = nets.folded(reference, leftover=form)
    result = bnfold.check(reference, candidate, samples=2)
    assert result.verdict is Verdict.PASS
    assert [tier.tier for tier in result.tiers] == ["A", "B", "C", "D"]


DEFECTS = {"the scale": 0, "the shift": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", DEFECTS.values(), ids=DEFECTS.keys())
def test_the_check_catches_one_channel_that_is_off(which: int, form: str) -> None:
    reference = mixed()
    candidate, _ = nets.folded(reference, leftover=form)
    last = [name for node in candidate.graph.node for name in node.input[1:]][-2:]
    tensor = next(t for t in candidate.graph.initializer if t.name == last[which])
    wrong = onnx.numpy_helper.to_array(tensor).copy()
    wrong[2] *= np.float32(1.001)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    result = bnfold.check(reference, candidate, samples=2)
    failing = {tier.tier for tier in result.tiers if tier.verdict is Verdict.FAIL}
    assert {"A", "B"} <= failing


@pytest.mark.parametrize("form", FORMS)
def test_optimize_checks_a_model_of_which_only_the_form_changes(form: str, tmp_path: Path) -> None:
    onnx.save(fenced("2,4,5,6"), tmp_path / "net.onnx")
    result = bnfold.optimize(tmp_path / "net.onnx", tmp_path / "out.onnx", leftover=form)
    assert result.written
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert forms(result.report) == {"bn": form}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_with_which_the_check_fails_is_taken_back(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(mixed(), tmp_path / "net.onnx")

    def off(facts: Any, editor: Any, index: int, site: Any, kind: Any, merged: Any) -> Any:
        bent = copy.copy(merged) if site.node.name != "bn3" else merged.after(merged)
        return rewritten(facts, editor, index, site, kind, bent)

    sound = bnfold.fold(mixed(), leftover=form)
    monkeypatch.setattr("bnfold.onnx_commit.rewritten", off)
    result = bnfold.optimize(tmp_path / "net.onnx", tmp_path / "out.onnx", leftover=form)
    assert result.dropped == ("bn3",)
    assert result.written
    assert forms(result.report) == {**forms(sound.report), "bn3": ""}


# ---- the ways in ----


def test_every_way_in_takes_the_option(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(fenced(), path)
    wanted = {"bn": "depthwise"}
    assert forms(bnfold.explain(path, leftover="depthwise")) == wanted
    assert forms(bnfold.fold(path, leftover="depthwise").report) == wanted
    run = FoldAffineSteps(leftover="depthwise")
    done = run(ir.from_proto(fenced()))
    assert done.modified
    assert forms(run.report) == wanted
    assert "leftover='depthwise'" in repr(run)
    assert not run(done.model).modified


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(fenced("2,4,5,6"), path)
    said = CliRunner().invoke(main, ["explain", str(path), "--leftover", "depthwise"])
    assert "it becomes a depthwise 1x1 convolution" in " ".join(said.output.split())
    out = tmp_path / "out.onnx"
    done = CliRunner().invoke(main, ["optimize", str(path), "-o", str(out), "--leftover", "affine"])
    assert done.exit_code == 0, done.output
    assert nets.operators(onnx.load(out)) == {"Sigmoid": 2, "Mul": 1, "Add": 1}
