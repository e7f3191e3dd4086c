"""Which input and output of one model is which of the other, and when they can't be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import pytest

from bnfold.errors import InvalidModelError, UsageError
from bnfold.verify.interface import require_same_interface
from bnfold.verify.models import LoadedModel
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.subject import Feeds, Outputs, RunOptions, TensorSpec


def onnx_model(signature: str, name: str = "b.onnx") -> OnnxSubject:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g {signature} {{ }}'
    return OnnxSubject(LoadedModel(name, onnx.parser.parse_model(text)))


@dataclass(frozen=True)
class OfTorch:
    """A model of another framework, of which only the interface is looked at."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str = "<reference>"
    unit: float = 2.0**-24

    def oracle(self) -> Callable[[Feeds], Outputs]:
        raise NotImplementedError

    def runner(self, provider: str, options: RunOptions) -> Any:
        raise NotImplementedError


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


REFERENCE = onnx_model("(float[N, 3] x, int64[N] i) => (float[N, 5] y, float[N] z)", "a.onnx")


@pytest.mark.parametrize(
    "signature",
    [
        "(float[N, 3] x, int64[N] i) => (float[N, 5] y, float[N] z)",
        "(int64[M] i, float[1, 3] x) => (float[M] z, float[M, K] y)",  # another order, other sizes
        "(float x, int64[N] i) => (float[N, 5] y, float[N] z)",
    ],
)
def test_onnx_models_are_paired_by_name(signature: str) -> None:
    candidate = onnx_model(signature)
    if "float x" in signature:
        candidate.model.proto.graph.input[0].type.tensor_type.ClearField("shape")
    found = require_same_interface(REFERENCE, candidate)
    assert dict(found.inputs) == {"x": "x", "i": "i"}
    assert dict(found.outputs) == {"y": "y", "z": "z"}


DIFFERENT = {
    "(float[N, 3] x, int64[N] j, float q) => (float[N, 5] y, float[N] z)": "input 'i' is missing",
    "(float[N, 3] x, int64[N] i, float q) => (float[N, 5] y, float[N] z)":
        "input 'q' is not in the reference",
    "(double[N, 3] x, int64[N] i) => (float[N, 5] y, float[N] z)":
        r"input 'x' is float64\[N, 3\], not float32\[N, 3\]",
    "(float[N, 4] x, int64[N] i) => (float[N, 5] y, float[N] z)":
        r"input 'x' is float32\[N, 4\], not float32\[N, 3\]",
    "(float[N, 3, 1] x, int64[N] i) => (float[N, 5] y, float[N] z)":
        r"input 'x' is float32\[N, 3, 1\]",
    "(float[N, 3] x, int64[N] i) => (float[N, 5] y)": "output 'z' is missing",
    "(float[N, 3] x, int64[N] i) => (float[N, 5] y, seq(float[N]) z)":
        r"output 'z' is sequence, not float32\[N\]",
    "(float[N, 3] x, int64[N] i) => (float[N, 5] y, string[N] z)": r"'z' is string\[N\], not float",
    "(float[N, 3] x, int64[N] i) => (float[N, 5] out, float[N] z)":
        "only the names .* differ: 'out' is 'y' in the reference; rename",
    "(float[N, 3] image, int64[N] i) => (float[N, 5] y, float[N] score)":
        "only the names .* differ: 'image' is 'x' in the reference, 'score' is 'z'",
}  # fmt: skip


@pytest.mark.parametrize("signature", DIFFERENT)
def test_what_differs_is_named(signature: str) -> None:
    with pytest.raises(UsageError, match=rf"b\.onnx: .*{DIFFERENT[signature]}"):
        require_same_interface(REFERENCE, onnx_model(signature))


def test_a_torch_model_and_its_export_are_paired_by_order() -> None:
    torch_model = OfTorch(
        (spec("x", "s0", 3), spec("index", "s0", dtype=np.int64)),
        (spec("output0", "s0", 5), spec("output1", "s0")),
    )
    found = require_same_interface(torch_model, REFERENCE)
    assert dict(found.inputs) == {"x": "x", "index": "i"}
    assert dict(found.outputs) == {"output0": "y", "output1": "z"}
    assert found.to_candidate({"x": 1, "index": 2}) == {"x": 1, "i": 2}
    assert found.from_candidate({"z": 4, "y": 3}) == {"output0": 3, "output1": 4}


def test_names_that_both_have_outweigh_their_order() -> None:
    swapped = OfTorch(
        (spec("i", "s0", dtype=np.int64), spec("x", "s0", 3)),
        (spec("output0", "s0", 5), spec("output1", "s0")),
    )
    assert dict(require_same_interface(swapped, REFERENCE).inputs) == {"i": "i", "x": "x"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ([spec("a", 1, 3)], [spec("output0", 1, 5), spec("output1", 1)],
         r"input count is 2 \(x, i\), not 1 \(a\)"),
        ([spec("a", 1, 3), spec("b", 1, dtype=np.int64)], [spec("output0", 1, 5)],
         r"output count is 2 \(y, z\), not 1 \(output0\)"),
        ([spec("a", 1, 3), spec("b", 1)], [spec("output0", 1, 5), spec("output1", 1)],
         r"input 'i' \('b' of the reference\) is int64\[N\], not float32\[1\]"),
    ],
)  # fmt: skip
def test_what_differs_across_frameworks_is_named(inputs: Any, outputs: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        require_same_interface(OfTorch(tuple(inputs), tuple(outputs)), REFERENCE)


def test_a_model_without_outputs_is_a_bad_model() -> None:
    empty = onnx_model("(float[N, 3] x) => ()", "empty.onnx")
    for pair in ((empty, REFERENCE), (REFERENCE, empty)):
        with pytest.raises(InvalidModelError, match=r"empty\.onnx: the model has no outputs"):
            require_same_interface(*pair)
