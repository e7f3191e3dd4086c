"""The check of quantised folds: what is right passes, defects of every constant are caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import bnfold
from bnfold.verify.judge import Verdict
from bnfold.verify.weights import judge_weights
from tests.nets import Array
from tests.test_qdq import CASES
from tests.test_qdq_models import ROOT, quantised


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A quantised net and its fold, with a bias of int32."""
    folder = tmp_path_factory.mktemp("pair")
    made = quantised(
        ROOT / "models/digits_resnet.onnx", folder / "m.onnx", "a scale for each channel"
    )
    unfolded = onnx.load(made)
    return unfolded, bnfold.fold(unfolded).model


def spoiled(proto: onnx.ModelProto, name: str, change: Callable[[Array], Any]) -> onnx.ModelProto:
    """The model with another constant ``name``."""
    made: onnx.ModelProto = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in made.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor).copy()
            changed = np.asarray(change(array)).astype(array.dtype)
            assert not np.array_equal(changed, array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
            return made
    raise AssertionError(name)


def constants_of(proto: onnx.ModelProto, op_type: str) -> dict[str, tuple[str, ...]]:
    """The constants of the weight and the bias of the first operator that has both quantised."""
    made = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == op_type and len(node.input) > 2 and node.input[2] in made:
            weight, bias = made[node.input[1]], made[node.input[2]]
            return {"weight": tuple(weight.input), "bias": tuple(bias.input)}
    raise AssertionError(op_type)


DEFECTS: dict[str, tuple[str, int, Callable[[Array], Any]]] = {
    "a bias off by a few units": ("bias", 0, lambda q: q + 40),
    "a bias in another scale": ("bias", 1, lambda s: s * 1.001),
    "one channel of another scale": ("weight", 1, lambda s: s * np.r_[1.002, np.ones(s.size - 1)]),
    "integers with another sign": ("weight", 0, lambda q: np.clip(-q.astype(int), -128, 127)),
    "another zero point": ("weight", 2, lambda z: z + 1),
    "scales in another order": ("weight", 1, lambda s: s[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("row", DEFECTS.values(), ids=DEFECTS.keys())
def test_defects_of_quantised_folds_are_caught(
    row: tuple[str, int, Callable[[Array], Any]], pair: tuple[onnx.ModelProto, onnx.ModelProto]
) -> None:
    part, position, change = row
    unfolded, folded = pair
    wrong = spoiled(folded, constants_of(folded, "Conv")[part][position], change)
    for tier in ("A", "B"):
        said = bnfold.check(unfolded, wrong, tiers=tier, samples=2)
        assert said.verdict is Verdict.FAIL, tier


def test_sound_quantised_fold_passes_tiers_a_and_b(
    pair: tuple[onnx.ModelProto, onnx.ModelProto],
) -> None:
    said = bnfold.check(*pair, tiers="AB", samples=2)
    assert said.verdict is Verdict.PASS
    assert "folded tensors are correctly rounded, bit for bit" in said.tiers[0].message


PASSING = ("conv, int4", "conv, uint4", "conv, int16", "conv, uint8, one scale", "depthwise",
           "transposed", "gemm, transposed", "behind Transpose")  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_fold_into_any_integers_passes_the_check(name: str, tmp_path: Path) -> None:
    onnx.save(CASES[name].proto(), tmp_path / "in.onnx")
    result = bnfold.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", samples=2)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert not result.report.kept


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4, np.int32])
def test_integers_that_differ_are_named_without_ulps(dtype: Any) -> None:
    wanted = {"q": np.array([[1, 2], [3, 4]], dtype)}
    found = {"q": np.array([[1, 2], [5, 4]], dtype)}
    said = judge_weights(wanted, found)
    assert said.verdict is Verdict.FAIL
    assert said.message == "'q' holds 5 at [1, 0], not 3 (1 of 4 values differ)"
