"""Level max end to end: what vanishes far from any weight, what stays, and that the model agrees.

Every row is folded, compared in float64 with the model that was given, and folded once more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
from models import export_onnx
from tests import nets
from tests.solver_nets import ROWS, bn, constants, net

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
IMAGE = "float[2,4,6,6] x"


@pytest.mark.parametrize("name", ROWS)
def test_what_can_vanish_does_and_nothing_else(name: str) -> None:
    row = ROWS[name]
    proto = net(row.body, row.inputs, row.outputs, opset=row.opset)
    model, report = nets.folded(proto)
    assert {step.name: step.code for step in report.kept} == row.kept
    assert nets.operators(model) == row.left
    assert all(step.into or step.how == "identity" for step in report.folded)
    again, second = nets.folded(model)
    assert nets.same(model, again)
    assert not second.folded


# ---- a weight that several operators read ----

TWICE = (
    "c = Conv(x, w1, b1) d = Conv(x, w1, b2) [s] n = Mul(c, k) [t] m = Mul(d, {other}) y = {end}"
)
SHARED = {
    "they agree": (TWICE.format(other="k", end="Max(n, m)"), set()),
    "they do not": (TWICE.format(other="up", end="Max(n, m)"), {"t"}),
    "one of them is scaled": ("c = Conv(x, w1) d = Conv(x, w1) [s] n = Mul(c, k) y = Max(n, d)",
                              {"s"}),
}  # fmt: skip


@pytest.mark.parametrize("agreed", SHARED)
def test_a_weight_of_two_convs_is_scaled_where_both_agree(agreed: str) -> None:
    body, stay = SHARED[agreed]
    proto = net(body, IMAGE, "float[A,B,C,D] y")
    model, report = nets.folded(proto)
    kept = {step.name: step.code for step in report.kept}
    assert set(kept) == set(stay)
    assert set(kept.values()) <= {"BNF005", "BNF020"}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert len(weights) == 1
    if not stay:
        right = nets.constant(proto, "w1").astype(np.float64) * constants()["k"][:, None]
        np.testing.assert_array_equal(nets.constant(model, *weights), right.astype(np.float32))


@pytest.mark.parametrize("agreed", SHARED)
def test_a_weight_is_stored_again_only_where_asked_and_paid_for(agreed: str) -> None:
    body, stay = SHARED[agreed]
    proto = net(body, IMAGE, "float[A,B,C,D] y")
    before = nets.constant(proto, "w1").nbytes
    model, report = nets.folded(proto, unshare=True)
    assert not report.kept
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert len(weights) == (2 if stay else 1)
    enough, _ = nets.folded(proto, unshare=before)
    assert nets.same(enough, model)
    for limit in (False, 10, before - 1):
        model, report = nets.folded(proto, unshare=limit)
        assert {step.name for step in report.kept} == set(stay)


# ---- many scales in a row ----


def compounding(dtype: type, blocks: int = 100) -> onnx.ModelProto:
    """Blocks ``y = relu(conv(x) + bn(x))`` whose scales all lie on one side of 1."""
    rng = np.random.default_rng(3)
    given = {name: nets.weight(rng, 4, 4, 1, 1, dtype=dtype) for name in ("first", "last")}
    text, x = "i0 = Conv(x, first) x0 = Relu(i0) ", "x0"
    for i in range(1, blocks + 1):
        given[f"v{i}"] = nets.weight(rng, 4, 4, 1, 1, dtype=dtype) / dtype(8)
        given[f"z{i}"] = nets.weight(rng, 4, dtype=dtype)
        given |= nets.batch_norm(rng, f"n{i}", 4, dtype)
        given[f"n{i}_g"] = rng.uniform(0.3, 0.9, 4).astype(dtype)
        given[f"n{i}_v"] = rng.uniform(0.5, 1.5, 4).astype(dtype)
        text += f"c{i} = Conv({x}, v{i}, z{i}) [s{i}] d{i} = {bn(f'n{i}', x)} "
        text += f"t{i} = Add(c{i}, d{i}) r{i} = Relu(t{i}) "
        x = f"r{i}"
    word = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    return nets.model(
        f"g ({word}[2,4,2,2] x) => ({word}[2,4,2,2] y) {{ {text} y = Conv({x}, last) }}", given
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_scales_that_compound_over_a_hundred_blocks_leave_their_type_nowhere(dtype: type) -> None:
    proto = compounding(dtype)
    model, report = nets.folded(proto, 1e-5 if dtype is np.float32 else 1e-2)
    # As many blocks in a row as their factors fit into the type; then one BatchNorm takes them.
    assert len(report.folded) >= (95 if dtype is np.float32 else 60)
    names = {name for node in model.graph.node for name in node.output}
    held = [*values(model, names).values()]
    held += [nets.constant(model, tensor.name) for tensor in model.graph.initializer]
    most = float(np.finfo(dtype).max)
    for array in held:
        assert (np.abs(array.astype(np.float64)) < most).all()


# ---- names ----


def test_tensors_in_other_units_are_named_so_and_the_others_keep_their_names() -> None:
    row = ROWS["pre-activation block, positive gammas"]
    proto = net(row.body, row.inputs, row.outputs)
    model, _ = nets.folded(proto)
    outputs = {name for node in model.graph.node for name in node.output}
    plain = {name for node in proto.graph.node for name in node.output}
    assert {"x0_stored", "t_stored"} <= outputs
    true = values(proto, plain)
    stored = values(model, outputs)
    for name in outputs:
        if name in plain:
            np.testing.assert_allclose(stored[name], true[name], rtol=1e-4, atol=1e-5)
        else:
            old = true[name.removesuffix("_stored")]
            assert not np.allclose(stored[name], old, rtol=1e-3, atol=1e-4)


def values(proto: onnx.ModelProto, names: set[str]) -> dict[str, nets.Array]:
    """Those of the tensors ``names``, in float64."""
    opened = onnx.ModelProto.FromString(proto.SerializeToString())
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    return nets.run(opened, nets.feeds(proto))


NAMES = {
    "input and output": ("[s] y = Mul(x, one)", ["y"]),
    "input and output, two steps": ("[s] z = Mul(x, half) [t] y = Div(z, half)", ["y"]),
    "two outputs": ("z = Relu(x) [s] y = Mul(z, one)", ["y", "z"]),
    "input and one of two outputs": ("[s] y = Mul(x, one) z = Relu(x)", ["y", "z"]),
}


@pytest.mark.parametrize(("body", "outputs"), NAMES.values(), ids=NAMES.keys())
def test_inputs_and_outputs_are_never_one_tensor(body: str, outputs: list[str]) -> None:
    stated = ", ".join(f"float[2,4,6,6] {name}" for name in outputs)
    model, report = nets.folded(net(body, IMAGE, stated))
    assert report.kept
    assert all(step.code in ("BNF008", "BNF018", "BNF020") for step in report.kept)
    assert {name for node in model.graph.node for name in node.output} >= set(outputs)


# ---- ordinary networks ----


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "unet", "caffe", "digits"])
def test_an_ordinary_network_comes_out_as_the_textbook_folds_it(name: str, tmp_path: Path) -> None:
    source = DIGITS
    if name != "digits":
        source = tmp_path / "net.onnx"
        export_onnx(name, source)
    written = []
    for level in ("max", "local"):
        target = tmp_path / level / "out.onnx"
        target.parent.mkdir()
        result = bnfold.optimize(source, target, level=level, check=False)
        assert result.report.folded
        assert not result.report.kept
        written.append(target.read_bytes())
    assert written[0] == written[1]
