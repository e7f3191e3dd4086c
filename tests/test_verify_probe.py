"""Where outputs prove nothing, a tensor inside is judged: right folds pass, wrong ones do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold
from bnfold.verify.check import check
from bnfold.verify.expected import Expected
from bnfold.verify.judge import Verdict
from tests import nets

# All weights of the last layer are alike, so that the softmax is uniform whatever the input.
TEXT = """g (float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv(x, w) b = BatchNormalization(c, bn_g, bn_b, bn_m, bn_v) r = Relu(b)
    p = GlobalAveragePool(r) f = Flatten(p) z = Gemm(f, same) y = Softmax(z)
}"""


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": nets.weight(rng, 6, 3, 3, 3), "same": np.ones((6, 5), np.float32)}
    return nets.model(TEXT, constants | nets.batch_norm(rng, "bn", 6))


def test_a_right_fold_passes_by_a_tensor_inside(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    onnx.save(net(), source)
    result = bnfold.optimize(source, tmp_path / "out.onnx")
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert "inside, output 'z'" in result.check.tiers[-1].message


def spoiled(factor: float) -> onnx.ModelProto:
    """The folded net with channel 3 of its Conv scaled."""
    folded: onnx.ModelProto = bnfold.fold(net()).model
    weight = next(t for t in folded.graph.initializer if t.name == "w")
    values = numpy_helper.to_array(weight).copy()
    values[3] *= factor
    weight.CopyFrom(numpy_helper.from_array(values, "w"))
    return folded


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0])
def test_a_wrong_fold_fails_by_a_tensor_inside(factor: float) -> None:
    folded = spoiled(factor)
    # Whoever knows that a name stands for one value can judge by a tensor inside.
    known = Expected(dict, {})
    result = check(net(), folded, tiers="CD", expected=known)
    assert {tier.tier: tier.verdict for tier in result.tiers} == {"C": Verdict.FAIL}
    assert "inside, output 'z'" in result.message


def test_an_output_that_never_changes_and_is_another_fails() -> None:
    folded: onnx.ModelProto = bnfold.fold(net()).model
    last = next(node for node in folded.graph.node if node.op_type == "Softmax")
    last.op_type = "Sigmoid"
    result = check(net(), folded, tiers="C", expected=Expected(dict, {}))
    assert result.verdict is Verdict.FAIL
    assert "output 'y': its error is 4 " in result.message


def test_inside_too_mutants_say_what_would_have_been_caught() -> None:
    result = check(net(), bnfold.fold(net()).model, tiers="C", expected=Expected(dict, {}))
    assert result.verdict is Verdict.PASS
    (found,) = result.mutations
    assert found.caught < 1e-5
    assert [run.ran for run in result.runs] == [{"CPUExecutionProvider": 6}]


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0])
def test_a_wrong_fold_is_found_where_it_is(factor: float) -> None:
    assert check(net(), spoiled(factor)).guilty == "b"


def test_a_right_fold_is_recognised() -> None:
    result = check(net(), bnfold.fold(net()).model)
    assert {tier.tier: tier.verdict for tier in result.tiers} == dict.fromkeys("ABC", Verdict.PASS)


def test_names_that_prove_nothing_leave_it_inconclusive() -> None:
    folded = bnfold.fold(net()).model
    for node in folded.graph.node:
        node.input[:] = [f"t_{n}" if n in ("b", "r", "p", "f", "z") else n for n in node.input]
        node.output[:] = [n if n == "y" else f"t_{n}" for n in node.output]
    del folded.graph.value_info[:]
    result = check(net(), folded)
    verdicts = {tier.tier: tier.verdict for tier in result.tiers}
    assert verdicts == {"B": Verdict.PASS, "C": Verdict.INCONCLUSIVE}
