"""The small nets, end to end: what folds, and every folded weight against the textbook formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold
from bnfold.verify.judge import Verdict
from models import export_onnx
from tests import nets

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"

# Steps that stay: those before a Relu with a gamma that is 0.
KEPT = {
    "resnet": 0, "mobilenet": 0, "unet": 0, "speech": 0, "video": 0, "mlp": 0, "levit": 0,
    "preactivation": 4, "preactivation_positive": 0, "caffe": 0, "frozen_buffers": 0,
    "frozen_statistics": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nets")
    paths = {name: folder / f"{name}.onnx" for name in KEPT}
    for name, path in paths.items():
        export_onnx(name, path)
    return {**paths, "digits": DIGITS}


@pytest.mark.parametrize("name", [*KEPT, "digits"])
def test_a_net_folds_and_passes_its_check(
    name: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    result = bnfold.optimize(exported[name], tmp_path / "out.onnx")
    assert len(result.report.kept) == KEPT.get(name, 0)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    folded = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(folded, full_check=True)
    nets.assert_nothing_dangles(folded)


def textbook(proto: onnx.ModelProto) -> dict[str, tuple[nets.Array, nets.Array]]:
    """Weight and bias of each Conv or ConvTranspose that one BatchNormalization follows."""
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    made = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def constant(name: str) -> nets.Array:
        while name not in stored:
            assert made[name].op_type == "Identity"
            name = made[name].input[0]
        return stored[name].astype(np.float64)

    found = {}
    for conv in proto.graph.node:
        after = readers.get(conv.output[0], [])
        before = made.get(conv.input[0]) if conv.input else None
        plain = before is None or before.op_type not in ("Sub", "Div", "Mul", "Add")
        if conv.op_type not in ("Conv", "ConvTranspose") or len(after) != 1 or not plain:
            continue
        if after[0].op_type == "BatchNormalization":
            gamma, beta, mean, variance = (constant(name) for name in after[0].input[1:5])
            epsilon = next((a.f for a in after[0].attribute if a.name == "epsilon"), 1e-5)
            scale = gamma / np.sqrt(variance + epsilon)
            weight = constant(conv.input[1])
            bias = constant(conv.input[2]) if len(conv.input) > 2 else np.zeros_like(mean)
            found[conv.name] = (_scaled(conv, weight, scale), (bias - mean) * scale + beta)
    return found


def _scaled(conv: onnx.NodeProto, weight: nets.Array, scale: nets.Array) -> nets.Array:
    if conv.op_type == "Conv":
        return np.stack([rows * s for rows, s in zip(weight, scale, strict=True)])
    groups = next((a.i for a in conv.attribute if a.name == "group"), 1)
    result = weight.copy()
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    for channel, s in enumerate(scale):
        group, column = divmod(channel, outputs)
        result[group * inputs : (group + 1) * inputs, column] *= s
    return result


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "unet", "speech", "video", "digits"])
def test_every_folded_weight_is_the_textbook_fold_rounded_once(
    name: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    expected = textbook(onnx.load(exported[name]))
    assert len(expected) >= 4
    bnfold.optimize(exported[name], tmp_path / "out.onnx", check=False)
    folded = onnx.load(tmp_path / "out.onnx")
    nodes = {node.name: node for node in folded.graph.node}
    for conv, (weight, bias) in expected.items():
        found = nets.constant(folded, nodes[conv].input[1])
        assert found.tobytes() == weight.astype(found.dtype).tobytes(), conv
        # The bias is a sum, whose order is free: it may differ by what float64 differs.
        np.testing.assert_allclose(
            nets.constant(folded, nodes[conv].input[2]), bias.astype(np.float32), rtol=2e-7,
            atol=1e-12,
        )  # fmt: skip
