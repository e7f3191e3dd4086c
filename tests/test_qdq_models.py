"""Models as ONNX Runtime's quantiser writes them: folded, checked, and never worse than before.

The quantiser is told to leave the outputs of linear operators alone, as others do, so that a
BatchNormalization still stands behind each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import bnfold
from bnfold.verify.judge import Verdict
from tests import nets, qdq_nets
from tests.nets import Array
from tests.qdq_nets import BN

ROOT = Path(__file__).parent.parent
LINEAR = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
KINDS = {"a scale for each channel": (True, QuantType.QInt8), "one scale": (False, QuantType.QInt8),
         "uint8": (False, QuantType.QUInt8)}  # fmt: skip


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """A few random inputs."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.left: Iterator[dict[str, Array]] = iter([nets.feeds(proto, s) for s in range(4)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def quantised(source: Path, target: Path, kind: str) -> Path:
    per_channel, weight = KINDS[kind]
    quantize_static(
        str(source), str(target), Calibration(onnx.load(source)), quant_format=QuantFormat.QDQ,
        per_channel=per_channel, weight_type=weight, activation_type=QuantType.QUInt8,
        op_types_to_quantize=LINEAR,
        extra_options={"OpTypesToExcludeOutputQuantization": LINEAR},
    )  # fmt: skip
    return target


@pytest.fixture(scope="module", params=KINDS)
def digits(request: Any, tmp_path_factory: Any) -> Path:
    """A net that is really trained, quantised."""
    folder = tmp_path_factory.mktemp("digits")
    return quantised(ROOT / "models/digits_resnet.onnx", folder / "model.onnx", request.param)


def test_batch_norms_of_a_quantised_model_fold_and_pass_the_check(
    digits: Path, tmp_path: Path
) -> None:
    result = bnfold.optimize(digits, tmp_path / "folded.onnx", samples=4)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert not result.dropped
    folded = [step for step in result.report.folded if step.op_type == BN]
    # With one zero point for all channels uint8 can't be negated.
    assert len(folded) == 11
    model = onnx.load(tmp_path / "folded.onnx")
    assert nets.operators(model)[BN] == 1  # whose MatMul is quantised in the graph
    kinds = {t.data_type for t in model.graph.initializer if t.name.endswith("_quantized")}
    assert kinds <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32}


def test_signal_to_noise_is_that_of_the_unfolded_model(digits: Path) -> None:
    """Against the net of floats; what goes over an edge of rounding goes either way."""
    float_net = onnx.load(ROOT / "models/digits_resnet.onnx")
    unfolded, folded = onnx.load(digits), bnfold.fold(onnx.load(digits)).model
    feeds = [nets.feeds(float_net, 100 + seed, size=8) for seed in range(4)]
    true, before, after = (
        qdq_nets.every_tensor(proto, feeds) for proto in (float_net, unfolded, folded)
    )
    changes = []
    for name in after.keys() & before.keys() & true.keys():
        one, two, three = (np.concatenate([v.ravel() for v in found[name]])
                           for found in (true, before, after))  # fmt: skip
        if one.any() and not np.array_equal(one, two):
            changes.append(qdq_nets.sqnr(one, three) - qdq_nets.sqnr(one, two))
    assert len(changes) > 20
    assert np.median(changes) > -0.02
    assert min(changes) > -0.2


ONE_OPERATOR: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "conv": ("c = Conv<pads = [1,1,1,1]>(x, w)", (8, 4, 3, 3), {}),
    "depthwise": ("c = Conv<group = 4>(x, w)", (8, 1, 3, 3), {"made": "float[2,8,4,4] y"}),
    "transposed": (
        "c = ConvTranspose<strides = [2,2]>(x, w)", (4, 8, 2, 2), {"made": "float[2,8,12,12] y"},
    ),
    "gemm": (
        "c = Gemm<transB = 1>(x, w)", (8, 4), {"given": "float[64,4] x", "made": "float[64,8] y"},
    ),
    "matmul": ("c = MatMul(x, w)", (4, 8), {"given": "float[64,4] x", "made": "float[64,8] y"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ONE_OPERATOR.values(), ids=ONE_OPERATOR.keys())
def test_fold_of_one_operator_is_never_worse(
    row: tuple[str, tuple[int, ...], dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    body, shape, ends = row
    rng = np.random.default_rng(0)
    known = {**nets.batch_norm(rng, "a", 8), "w": nets.weight(rng, *shape)}
    known["a_g"][:3] = [0.9, 0.02, 0.0]
    proto = qdq_nets.model(f"{body} y = {BN}(c, a_g, a_b, a_m, a_v)", known, **ends)
    source = tmp_path / "float.onnx"
    onnx.save(proto, source)
    unfolded = onnx.load(quantised(source, tmp_path / "quantised.onnx", kind))
    result = bnfold.fold(unfolded)
    assert not result.report.kept
    feeds = [nets.feeds(proto, 50 + seed) for seed in range(4)]
    one, two, three = (
        np.concatenate([qdq_nets.run(m, f)["y"].ravel() for f in feeds])
        for m in (proto, unfolded, result.model)
    )
    assert qdq_nets.sqnr(one, three) > qdq_nets.sqnr(one, two) - 0.05
    assert qdq_nets.sqnr(two, three) > qdq_nets.sqnr(one, two) + 20


# ---- file to file ----


def test_large_integers_are_negated_while_they_are_written(tmp_path: Path) -> None:
    weight = qdq_nets.Quantised((128, 64, 3, 3), 0)
    rng = np.random.default_rng(0)
    known = {**weight.constants(), **nets.batch_norm(rng, "a", 128)}
    proto = qdq_nets.model(
        f"{weight.node} c = Conv(x, d) y = {BN}(c, a_g, a_b, a_m, a_v)", known,
        given="float[2,64,6,6] x", made="float[2,128,4,4] y",
    )  # fmt: skip
    inside = bnfold.fold(proto).model
    for external in (False, True):
        source, target = tmp_path / f"in{external}.onnx", tmp_path / f"out{external}.onnx"
        onnx.save(onnx.ModelProto.FromString(proto.SerializeToString()), source,
                  save_as_external_data=external, size_threshold=0)  # fmt: skip
        result = bnfold.optimize(source, target, samples=2)
        assert result.check is not None
        assert result.check.verdict is Verdict.PASS
        written = onnx.load(target)
        for name in ("q", "qs", "qz"):
            np.testing.assert_array_equal(nets.constant(written, name), nets.constant(inside, name))
        assert (nets.constant(written, "q")[0] == -known["q"][0]).all()  # its gamma is negative
