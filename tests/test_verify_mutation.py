"""Where no tier B says what is caught, mutants do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import bnfold
from bnfold.verify.caught import what_was_caught
from bnfold.verify.check import check
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult
from models.export import export_traced
from models.registry import build
from tests.verify_nets import FOLDED, UNFOLDED, fold, net, statistics


def mixed(folder: Path) -> tuple[nn.Module, torch.Tensor, onnx.ModelProto]:
    """A module, its example, and the ONNX file of its fold."""
    module, example = build("mobilenet")
    folded = bnfold.fold(module, (example,)).model
    path = folder / "folded.onnx"
    export_traced(folded, example, path)
    return module, example, onnx.load(path)


def test_a_mixed_pair_says_what_a_mutant_shows_and_it_is_true(tmp_path: Path) -> None:
    module, example, candidate = mixed(tmp_path)
    result = check(module, candidate, example_inputs=(example,))
    assert result.verdict is Verdict.PASS, result.message
    (found,) = result.mutations
    assert found.caught < 1e-3
    assert f"an error of {found.caught:.2g} of the weight '{found.weight}'" in result.caught
    for factor, verdict in ((1 + found.caught, Verdict.FAIL), (1 + found.caught / 2, Verdict.PASS)):
        mutant = scaled(candidate, found.weight, factor)
        said = check(module, mutant, example_inputs=(example,))
        assert said.verdict is verdict, (factor, said.message)


def scaled(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    mutant = onnx.ModelProto()
    mutant.CopyFrom(model)
    tensor = next(t for t in mutant.graph.initializer if t.name == name)
    weight = numpy_helper.to_array(tensor).astype(np.float64) * factor
    tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), name))
    return mutant


def test_a_torch_candidate_is_mutated_too_and_left_as_it_is(tmp_path: Path) -> None:
    module, example, reference = mixed(tmp_path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = check(reference, module, example_inputs=(example,))
    assert result.verdict is Verdict.PASS, result.message
    assert [m.weight in before for m in result.mutations] == [True]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_with_tier_b_there_are_no_mutants() -> None:
    weights = statistics()
    pair = net(UNFOLDED, weights), net(FOLDED, fold(weights))
    assert check(*pair).mutations == ()
    assert len(check(*pair, tiers="CD").mutations) == 1


def test_a_candidate_that_fails_has_none(tmp_path: Path) -> None:
    module, example, candidate = mixed(tmp_path)
    weight = next(t.name for t in candidate.graph.initializer if len(t.dims) > 1)
    wrong = scaled(candidate, weight, 1.5)
    result = check(module, wrong, example_inputs=(example,))
    assert (result.verdict, result.mutations) == (Verdict.FAIL, ())


def test_mutants_are_stored_and_said_again(tmp_path: Path) -> None:
    module, example, candidate = mixed(tmp_path)
    result = check(module, candidate, example_inputs=(example,))
    again = CheckResult.from_dict(result.to_dict())
    assert again.mutations == result.mutations
    assert what_was_caught(again) == result.caught
