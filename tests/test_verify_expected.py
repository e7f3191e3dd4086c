"""A folded model is recognised by its form, and its tensors hold what the plan says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.onnx_read import from_proto
from bnfold.onnx_shapes import infer_shapes
from bnfold.verify.check import check
from bnfold.verify.expected import Expected, Held
from bnfold.verify.judge import Verdict
from bnfold.verify.onnx_expected import recognised
from bnfold.verify.oracle import Oracle
from bnfold.verify.tiers import NOT_OURS
from tests import nets
from tests.solver_nets import ROWS, net

# ---- what a tensor holds ----

SCALE, SHIFT = np.array([2.0, -0.5, 4.0]), np.array([1.0, 0.0, -3.0])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_units_lie_on_their_axis(axis: int) -> None:
    shape = [2, 2, 2, 2]
    shape[axis] = 3
    u = np.random.default_rng(0).normal(size=shape)
    along = [-1 if k == axis else 1 for k in range(4)]
    v = u * SCALE.reshape(along) + SHIFT.reshape(along)
    np.testing.assert_allclose(Held("v", (axis,), SCALE, SHIFT).stored(v), u, rtol=1e-12)


def test_units_along_two_axes_are_in_row_major_order() -> None:
    scale = np.arange(1.0, 7.0)
    u = np.random.default_rng(0).normal(size=(4, 2, 5, 3))
    v = u * scale.reshape(1, 2, 1, 3)
    held = Held("v", (1, 3), scale, np.zeros(1))
    np.testing.assert_allclose(held.stored(v), u, rtol=1e-12)


def test_a_single_scale_is_for_all() -> None:
    v = np.arange(6.0).reshape(2, 3)
    held = Held("v", (), np.array([2.0]), np.array([1.0]))
    np.testing.assert_array_equal(held.stored(v), (v - 1) / 2)
    np.testing.assert_array_equal(Held("v").stored(v), v)


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_a_channel_of_which_nobody_knows_is_no_number(scale: float) -> None:
    v = np.ones((2, 3))
    found = Held("v", (1,), np.array([1.0, scale, 2.0]), np.zeros(3)).stored(v)
    known = np.isfinite(found)
    assert known[:, 0].all()
    assert known[:, 2].all()
    assert scale == np.inf or not known[:, 1].any()


def test_units_that_do_not_fit_the_tensor_are_not_known() -> None:
    assert not np.isfinite(Held("v", (1,), SCALE, SHIFT).stored(np.ones((2, 4)))).any()


def test_what_float64_loses_is_known_where_the_shift_cancels() -> None:
    """A channel of scale 1e-9: nine of the sixteen digits are gone."""
    scale, shift = np.array([1e-9, 1.0]), np.array([1.0, 1.0])
    u = np.random.default_rng(0).normal(size=(50, 2))
    held = Held("v", (1,), scale, shift)
    v = u * scale + shift
    lost, blur = np.abs(held.stored(v) - u), held.blur(v)
    assert (lost <= blur).all()
    assert lost[:, 0].max() > 1e-9
    assert blur[:, 1].max() < 1e-13
    assert not Held("v").blur(v).any()


# ---- recognised ----


def expected(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> Expected | None:
    def read() -> Any:
        model = from_proto(reference, "reference")
        return model, infer_shapes(model)

    return recognised(read, candidate)


NAMES = (
    "pre-activation block, positive gammas", "LeViT", "BatchNorm behind a Concat of four Convs",
    "forward through AveragePool", "RepVGG: three branches, one the identity",
)  # fmt: skip


def row(name: str) -> onnx.ModelProto:
    found = ROWS[name]
    return net(found.body, found.inputs, found.outputs, opset=found.opset)


@pytest.mark.parametrize("level", ["max", "local"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fold_of_either_level_is_recognised_with_its_weights(name: str, level: str) -> None:
    reference = row(name)
    result = bnfold.fold(reference, level=level)
    if not result.report.folded:
        return
    found = expected(reference, result.model)
    assert found is not None
    weights = found.weights()
    assert weights
    for tensor, value in weights.items():
        np.testing.assert_array_equal(nets.constant(result.model, tensor), value)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_holds_what_the_plan_says(name: str) -> None:
    reference = row(name)
    candidate = bnfold.fold(reference).model
    found = expected(reference, candidate)
    assert found is not None
    assert found.held is not None
    feeds = nets.feeds(reference)
    true, stored = (values(proto, feeds) for proto in (reference, candidate))
    moved = 0
    for name_of_u, held in found.held.items():
        u = held.stored(true[held.reference])
        known = np.isfinite(u)
        moved += held.scale is not None
        size = float(np.abs(u[known]).max(initial=1e-30))
        np.testing.assert_allclose(stored[name_of_u][known] / size, u[known] / size, atol=1e-5)
    assert moved or name == "RepVGG: three branches, one the identity"


def values(proto: onnx.ModelProto, feeds: dict[str, nets.Array]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for node in Oracle(proto).walk(feeds, found):
        kept |= {name: found[name] for name in node.output}
    return kept


def changed(model: onnx.ModelProto, what: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    node = copy.graph.node[0]
    if what == "a tensor renamed":
        for other in copy.graph.node:
            other.input[:] = ["n" if n == node.output[0] else n for n in other.input]
        node.output[0] = "n"
    elif what == "an operator more":
        copy.graph.node.add(op_type="Relu", input=[node.output[0]], output=["more"])
    elif what == "a constant of another shape":
        tensor = next(t for t in copy.graph.initializer if len(t.dims) > 1)
        tensor.dims.append(1)
    elif what == "a constant less":
        del copy.graph.initializer[-1]
    return copy


FORMS = ("a tensor renamed", "an operator more", "a constant of another shape", "a constant less")


@pytest.mark.parametrize("what", FORMS)
def test_another_form_is_not_recognised(what: str) -> None:
    reference = row("pre-activation block, positive gammas")
    candidate = bnfold.fold(reference).model
    assert expected(reference, candidate) is not None
    assert expected(reference, changed(candidate, what)) is None


def test_weights_say_nothing_about_the_form() -> None:
    reference = row("pre-activation block, positive gammas")
    candidate = bnfold.fold(reference).model
    for tensor in candidate.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(3 * array + 1, tensor.name))
    assert expected(reference, candidate) is not None


def test_a_fold_that_bnfold_would_refuse_leaves_tier_a_out() -> None:
    """Beyond float16's range; so large that the weight is computed only when it is asked for."""

    def half(gamma: float) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        parts = {"g": gamma, "b": 0.0, "m": 0.0, "v": 1e-3}
        made = {k: np.full(64, value, np.float16) for k, value in parts.items()}
        made["w"] = nets.weight(rng, 64, 64, 3, 3, dtype=np.float16)
        return nets.model(
            "g (float16[1,64,4,4] x) => (float16[1,64,2,2] z) "
            "{ y = Conv (x, w) z = BatchNormalization (y, g, b, m, v) }", made,
        )  # fmt: skip

    candidate = bnfold.fold(half(1.0)).model
    assert [t.tier for t in check(half(1.0), candidate, tiers="AB").tiers] == ["A", "B"]
    wrong = check(half(60000.0), candidate, tiers="AB")
    assert [(t.tier, t.verdict) for t in wrong.tiers] == [("B", Verdict.FAIL)]
    assert NOT_OURS in wrong.warnings


def test_what_is_not_folded_is_not_recognised() -> None:
    reference = row("pre-activation block, positive gammas")
    assert expected(reference, reference) is None
    once = bnfold.fold(reference).model
    assert expected(once, once) is None
