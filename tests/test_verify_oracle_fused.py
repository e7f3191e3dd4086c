"""Fused operators in float64, against ONNX Runtime's own kernels in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from bnfold.errors import InconclusiveError
from bnfold.verify.oracle import Oracle
from bnfold.verify.oracle_fused import FUSED

Array = NDArray[Any]
SHAPES = {
    "x": (2, 4, 6, 5), "w": (6, 2, 3, 3), "b": (6,), "z": (2, 6, 4, 3), "a": (3, 4),
    "a2": (4, 3), "m": (4, 5), "m2": (5, 4), "c": (5,), "p": (2, 3, 4), "q": (2, 4, 5),
    "p2": (2, 4, 3), "q2": (2, 5, 4), "pb": (3, 2, 4), "qb": (4, 2, 5), "t": (2, 3, 8),
    "s": (2, 3, 8), "g": (8,), "h": (8,), "k": (8,),
}  # fmt: skip


def values(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def conv(inputs: str = "x w b", **attributes: Any) -> tuple[str, str, int, dict[str, Any]]:
    return "FusedConv", inputs, 1, {"group": 2, "kernel_shape": [3, 3], **attributes}


CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "FusedConv, Relu": conv(activation="Relu"),
    "FusedConv without a bias": conv("x w", activation="Relu"),
    "FusedConv, padded and strided": conv(activation="Relu", pads=[1, 0, 1, 2], strides=[2, 1]),
    "FusedConv, a tensor added": conv("x w b z", activation="Relu"),
    "FusedConv, LeakyRelu": conv(activation="LeakyRelu", activation_params=[0.2]),
    "FusedConv, Clip": conv(activation="Clip", activation_params=[-0.5, 1.5]),
    "FusedConv, HardSigmoid": conv(activation="HardSigmoid", activation_params=[0.25, 0.4]),
    "FusedConv, Sigmoid": conv(activation="Sigmoid"),
    "FusedConv, Tanh": conv(activation="Tanh"),
    "FusedGemm, Relu": ("FusedGemm", "a m c", 1, {"activation": "Relu"}),
    "FusedGemm of all attributes": (
        "FusedGemm", "a2 m2 c", 1,
        {"activation": "LeakyRelu", "activation_alpha": 0.3, "alpha": 0.5, "beta": -2.0,
         "transA": 1, "transB": 1},
    ),
    "FusedGemm without C": ("FusedGemm", "a m", 1, {"activation": "Sigmoid"}),
    "FusedMatMul, scaled": ("FusedMatMul", "p q", 1, {"alpha": 0.125}),
    "FusedMatMul, turned": ("FusedMatMul", "p2 q2", 1, {"transA": 1, "transB": 1}),
    "FusedMatMul, batch of A moved": ("FusedMatMul", "pb q", 1, {"transBatchA": 1}),
    "FusedMatMul, batch of B moved": ("FusedMatMul", "p qb", 1, {"transBatchB": 1}),
    "Gelu": ("Gelu", "t", 1, {}),
    "BiasGelu": ("BiasGelu", "t g", 1, {}),
    "QuickGelu": ("QuickGelu", "t", 1, {"alpha": 1.5}),
    "QuickGelu by default": ("QuickGelu", "t", 1, {}),
    "SkipLayerNormalization": ("SkipLayerNormalization", "t s g h k", 1, {"epsilon": 1e-2}),
    "SkipLayerNormalization, no beta": ("SkipLayerNormalization", "t s g", 1, {"epsilon": 1e-2}),
}  # fmt: skip


def model(op_type: str, inputs: str, outputs: int, attributes: dict[str, Any]) -> onnx.ModelProto:
    names, made = inputs.split(), [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op_type, names, made, "fused", domain="com.microsoft", **attributes)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, kind, SHAPES[n]) for n in names],
        [helper.make_tensor_value_info(n, kind, None) for n in made],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def runtime(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_fused_operator_is_what_the_runtime_computes(name: str) -> None:
    op_type, inputs, outputs, attributes = CASES[name]
    proto = model(op_type, inputs, outputs, attributes)
    for seed in range(3):
        feeds = {n: v for n, v in values(seed).items() if n in inputs.split()}
        ours = Oracle(proto).run(feeds)
        for mine, theirs in zip(ours.values(), runtime(proto, feeds), strict=True):
            assert mine.dtype == np.float64
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_every_fused_operator_is_tried() -> None:
    assert {op_type for op_type, *_ in CASES.values()} == {op.__name__ for op in FUSED}


def test_an_attribute_that_is_left_out_is_noticed() -> None:
    """The comparison says no."""
    op_type, inputs, outputs, attributes = CASES["FusedGemm of all attributes"]
    feeds = {n: v for n, v in values().items() if n in inputs.split()}
    right = runtime(model(op_type, inputs, outputs, attributes), feeds)[0]
    for left_out in ("alpha", "beta", "activation", "activation_alpha"):
        fewer = {n: v for n, v in attributes.items() if n != left_out}
        (ours,) = Oracle(model(op_type, inputs, outputs, fewer)).run(feeds).values()
        assert not np.allclose(ours, right, rtol=1e-2, atol=1e-3), left_out


def test_an_activation_that_nobody_knows_is_inconclusive() -> None:
    proto = model("FusedConv", "x w b", 1, {"group": 2, "activation": "Softsign"})
    feeds = {n: v for n, v in values().items() if n in ("x", "w", "b")}
    with pytest.raises(InconclusiveError, match="activation Softsign"):
        Oracle(proto).run(feeds)
