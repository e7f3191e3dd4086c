"""The whole check: right folds pass, each sabotage fails, an empty proof is inconclusive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest

from bnfold.errors import InconclusiveError, MismatchError, ProviderError, ReadError, UsageError
from bnfold.verify.check import CheckResult, Verdict, check
from bnfold.verify.expected import Expected
from bnfold.verify.models import rounding_unit, same_graph
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

REFERENCE = net(UNFOLDED, statistics())
CANDIDATE = net(FOLDED, fold(statistics()))


def parsed(graph: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    again = onnx.ModelProto()
    again.CopyFrom(model)
    return again


@pytest.mark.parametrize("seed", range(5))
def test_a_right_fold_passes(seed: int) -> None:
    weights = statistics(seed=seed)
    result = check(net(UNFOLDED, weights), net(FOLDED, fold(weights)), seed=seed)
    assert result.verdict is Verdict.PASS, result.message
    assert (result.exit_code, result.samples, result.seed) == (0, 8, seed)
    result.raise_for_status()


def verdicts(result: CheckResult) -> dict[str, Verdict]:
    return {tier.tier: tier.verdict for tier in result.tiers}


# Where each sabotage is; one channel of c2 is all but dead, so that y hardly shows it.
PLACES = {
    "a bias off by a thousandth": "c2", "one channel scaled by 1.001": "c2",
    "two channels swapped": "c1", "one sign flipped": "c1", "the shift forgotten": "c1",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_fails_where_it_is_and_at_the_end(name: str, seed: int) -> None:
    candidate = net(FOLDED, SABOTAGES[name](fold(statistics())))
    result = check(REFERENCE, candidate, seed=seed)
    found = verdicts(result)
    assert (found["B"], found["C"]) == (Verdict.FAIL, Verdict.FAIL)
    assert result.exit_code == 1
    assert result.guilty == PLACES[name]
    place = rf"<candidate>: Conv '{PLACES[name]}' is wrong: .* times what rounding explains"
    with pytest.raises(MismatchError, match=place):
        result.raise_for_status()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_fails_without_a_run(name: str, seed: int) -> None:
    """Even behind a Relu that hides all but one thirty-millionth of it."""
    candidate = net(FOLDED, SABOTAGES[name](fold(statistics())))
    result = check(REFERENCE, candidate, tiers="AB", seed=seed, samples=4)
    assert verdicts(result) == {"B": Verdict.FAIL}
    assert result.guilty == PLACES[name]


@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_fails_by_the_outputs_alone(name: str) -> None:
    candidate = net(FOLDED, SABOTAGES[name](fold(statistics())))
    result = check(REFERENCE, candidate, tiers="C")
    assert verdicts(result) == {"C": Verdict.FAIL}
    with pytest.raises(MismatchError, match=r"<candidate>: output 'y': its error is .* after"):
        result.raise_for_status()


def test_a_forgotten_epsilon_and_a_stale_weight_fail() -> None:
    right = fold(statistics())
    stale = {**right, "w1": statistics()["w1"]}
    for wrong in (fold(statistics(), epsilon=0.0), stale):
        result = check(REFERENCE, net(FOLDED, wrong))
        assert result.guilty == "c1"
        assert {t: v for t, v in verdicts(result).items() if t != "D"} == {
            "B": Verdict.FAIL, "C": Verdict.FAIL,
        }  # fmt: skip


@pytest.mark.parametrize("name", [None, *SABOTAGES])
def test_a_float16_net_is_judged_by_its_own_rounding(name: str | None) -> None:
    weights = statistics(np.float16)
    folded = fold(weights)
    if name is not None:
        # A thousandth is two roundings of float16, and explained by them: thirty times as much.
        # The channel that is scaled is all but dead, and its shift is what rounding spoils most.
        times = 100 if name == "one channel scaled by 1.001" else 30
        wrong = SABOTAGES[name]({k: v.astype(np.float64) for k, v in folded.items()})
        folded = {
            k: (v + times * (wrong[k] - v.astype(np.float64))).astype(np.float16)
            for k, v in folded.items()
        }
    reference = net(UNFOLDED, weights, dtype="float16")
    for seed in range(3):
        result = check(reference, net(FOLDED, folded, dtype="float16"), seed=seed)
        said = Verdict.PASS if name is None else Verdict.FAIL
        assert (verdicts(result)["B"], verdicts(result)["C"]) == (said, said), result.message
        assert result.guilty == PLACES.get(name or "", "")


def test_an_open_batch_is_sized() -> None:
    result = check(net(UNFOLDED, statistics(), n="N"), net(FOLDED, fold(statistics()), n="N"))
    assert result.verdict is Verdict.PASS


def as_path(model: onnx.ModelProto, folder: Path, name: str) -> Path:
    onnx.save(model, folder / name)
    return folder / name


def test_paths_and_ir_models_are_taken_and_left_as_they_are(tmp_path: Path) -> None:
    before, after = as_path(REFERENCE, tmp_path, "a.onnx"), as_path(CANDIDATE, tmp_path, "b.onnx")
    result = check(str(before), after)
    assert result.verdict is Verdict.PASS
    assert (result.reference, result.candidate) == (str(before), str(after))
    one, other = onnx_ir.load(before), onnx_ir.from_proto(CANDIDATE)
    assert check(one, other).to_dict()["tiers"] == result.to_dict()["tiers"]
    assert before.read_bytes() == REFERENCE.SerializeToString()


def test_an_ir_model_with_its_weights_on_disk_is_read(tmp_path: Path) -> None:
    onnx.save(
        copy(REFERENCE), tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0,
        location="a.bin",
    )  # fmt: skip
    model = onnx_ir.load(tmp_path / "a.onnx")
    result = check(model, CANDIDATE)
    assert result.verdict is Verdict.PASS
    assert isinstance(model.graph.initializers["w1"].const_value, onnx_ir.ExternalTensor)
    assert check(tmp_path / "a.onnx", CANDIDATE).verdict is Verdict.PASS
    with pytest.raises(UsageError, match="pass the model as a path"):
        check(onnx.load(tmp_path / "a.onnx", load_external_data=False), CANDIDATE)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ReadError, match="no such file"):
        check(tmp_path / "missing.onnx", CANDIDATE)
    with pytest.raises(ReadError, match="can't be read"):
        check(tmp_path / "text.onnx", CANDIDATE)
    with pytest.raises(UsageError, match="a int is not a model"):
        check(3, CANDIDATE)


def test_the_same_graph_twice_proves_nothing() -> None:
    again = copy(REFERENCE)
    again.graph.name = "renamed"
    again.producer_name = "someone"
    result = check(REFERENCE, again)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.exit_code == 3
    assert "same graph" in result.message
    with pytest.raises(InconclusiveError, match="same graph"):
        result.raise_for_status()
    assert not same_graph(REFERENCE, CANDIDATE)


def test_fewer_than_two_distinct_samples_prove_nothing() -> None:
    assert check(REFERENCE, CANDIDATE, samples=1).verdict is Verdict.INCONCLUSIVE
    x = np.ones((3, 3, 8, 8), np.float32)
    result = check(REFERENCE, CANDIDATE, inputs={"x": x})
    assert (result.verdict, result.samples) == (Verdict.INCONCLUSIVE, 3)
    assert "distinct" in result.message


def test_the_users_inputs_are_run(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(0, 1, (5, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    result = check(REFERENCE, CANDIDATE, inputs=tmp_path / "in.npz")
    assert (result.verdict, result.samples, result.seed) == (Verdict.PASS, 5, None)


def test_an_output_that_never_changes_proves_nothing() -> None:
    graph = "g (float[1, 4] x) => (float[1, 4] y) <float[4] z = {{0, 0, 0, 0}}> {{ {} }}"
    before = parsed(graph.format("d = Mul(x, z) y = Exp(d)"))
    after = parsed(graph.format("n = Neg(x) d = Mul(n, z) y = Exp(d)"))
    result = check(before, after)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "same for every sample" in result.message


def test_labels_are_compared_exactly() -> None:
    graph = "g (float[1, 9] x) => (int64[1] y) {{ {} y = ArgMax <axis = 1, keepdims = 0> (a) }}"
    before, right = parsed(graph.format("a = Identity(x)")), parsed(graph.format("a = Tanh(x)"))
    result = check(before, right)
    assert verdicts(result) == {"D": Verdict.PASS}
    assert any("tier B is left out" in warning for warning in result.warnings)
    result = check(before, parsed(graph.format("a = Neg(x)")))
    assert verdicts(result) == {"B": Verdict.FAIL, "D": Verdict.FAIL}
    assert "differs from the unfolded model's on samples [0, " in result.tiers[1].message


def test_what_the_oracle_cannot_compute_is_inconclusive() -> None:
    graph = (
        "g (float[1, 4] x) => (float[1, 4] y) {{ {} [dice] r = RandomNormalLike(a) y = Add(a, r) }}"
    )
    result = check(
        parsed(graph.format("a = Neg(x)")), parsed(graph.format("b = Neg(x) a = Abs(b)"))
    )
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "node 'dice'" in result.message


INTERFACES = {
    "float[1, 4] z) => (float[1, 4] y) { y = Neg(z)": "names .* differ: 'z' is 'x' in the ref",
    "float[1, 4] z, float[1] v) => (float[1, 4] y) { y = Neg(z)": "input 'x' is missing",
    "float[1, 4] x, float[1] z) => (float[1, 4] y) { y = Neg(x)":
        "input 'z' is not in the reference",
    "float16[1, 4] x) => (float[1, 4] y) { y = Cast<to = 1>(x)":
        r"input 'x' is float16\[1, 4\], not float32\[1, 4\]",
    "float[1, 5] x) => (float[1, 4] y) { y = Neg(x)":
        r"input 'x' is float32\[1, 5\], not float32\[1, 4\]",
    "float[1, 4] x) => (float[1, 4, 1] y) { y = Neg(x)": r"output 'y' is float32\[1, 4, 1\]",
    "float[1, 4] x) => (float[1, 4] w) { w = Neg(x)": "names .* differ: 'w' is 'y' in the ref",
    "float[1, 4] x) => (float[1, 4] w, float[1] v) { w = Neg(x) v = Neg(x)":
        "output 'y' is missing",
    "float[1, 4] x) => (float[1, 4] y, float[1, 4] w) { y = Neg(x) w = Neg(x)":
        "output 'w' is not in the reference",
}  # fmt: skip


@pytest.mark.parametrize("other", INTERFACES)
def test_models_of_other_interfaces_are_refused_by_name(other: str) -> None:
    reference = parsed("g (float[1, 4] x) => (float[1, 4] y) { y = Neg(x) }")
    with pytest.raises(UsageError, match=INTERFACES[other]):
        check(reference, parsed(f"g ({other} }}"))


def test_an_open_size_agrees_with_any() -> None:
    open_batch = net(FOLDED, fold(statistics()), n="N")
    assert check(REFERENCE, open_batch).verdict is Verdict.PASS


def test_tier_a_speaks_where_weights_are_expected() -> None:
    right = fold(statistics())
    result = check(REFERENCE, CANDIDATE, expected=weights(right))
    assert verdicts(result) == dict.fromkeys("ABCD", Verdict.PASS)
    # One ulp: nothing that the other tiers could see.
    near = {**right, "w2": np.nextafter(right["w2"], np.float32(9))}
    result = check(REFERENCE, net(FOLDED, near), expected=weights(right))
    assert verdicts(result) == {"A": Verdict.FAIL, **dict.fromkeys("BCD", Verdict.PASS)}
    assert result.verdict is Verdict.FAIL
    assert "'w2'" in result.message
    nothing = check(REFERENCE, CANDIDATE, tiers="A", expected=weights({}))
    assert verdicts(nothing) == {"A": Verdict.INCONCLUSIVE}
    assert "A" not in verdicts(check(REFERENCE, CANDIDATE, expected=weights({})))


def weights(expected: dict[str, Any]) -> Expected:
    return Expected(lambda: expected, None)


def test_hazards_are_warnings() -> None:
    result = check(REFERENCE, CANDIDATE, expected=weights(fold(statistics())))
    assert any("differ in range" in warning for warning in result.warnings)


def test_expected_weights_are_found_in_constants_and_subgraphs() -> None:
    graph = """g (float[2] x, bool b) => (float[2] y) <float[1] c = {{1}}> {{
        k = Constant <value = float[1] {{2}}> ()
        y = If (b) <
          then_branch = t () => (float[2] a) <float[1] w = {{3}}> {{ p = Mul(x, w) a = {}(p, k) }},
          else_branch = e () => (float[2] d) {{ d = Mul(x, c) }}> }}"""
    one, other = parsed(graph.format("Add")), parsed(graph.format("Sub"))
    expected = {n: np.array([v], np.float32) for n, v in (("c", 1), ("k", 2), ("w", 3))}
    assert verdicts(check(one, other, expected=weights(expected)))["A"] is Verdict.PASS
    expected["w"] += 1
    assert verdicts(check(one, other, expected=weights(expected)))["A"] is Verdict.FAIL


def test_weights_stored_narrower_than_the_references_fail() -> None:
    narrow = {k: v.astype(np.float16).astype(np.float32) for k, v in fold(statistics()).items()}
    candidate = net(FOLDED, narrow)
    candidate.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones(1, np.float16), "unused")
    )
    assert check(REFERENCE, candidate).verdict is Verdict.FAIL


def test_the_result_is_json_with_its_figures() -> None:
    plain = json.loads(json.dumps(check(REFERENCE, CANDIDATE).to_dict(), allow_nan=False))
    assert (plain["verdict"], plain["exit_code"], plain["seed"]) == ("pass", 0, 0)
    sites, ends, decisions = plain["tiers"]
    assert (sites["tier"], sites["provider"]) == ("B", "")
    assert [site["site"] for site in sites["sites"]] == ["c1", "r1", "c2", "r2", "f", "y"]
    assert 0 < sites["caught"] < 1e-5
    assert (ends["tier"], ends["provider"]) == ("C", "CPUExecutionProvider")
    assert (decisions["tier"], decisions["provider"]) == ("D", "CPUExecutionProvider")
    (output,) = ends["outputs"]
    assert output["output"] == "y"
    assert 0 < output["figures"]["e_fold"] < 1e-5
    assert 0 < output["figures"]["e_unfold"] < 1e-5
    assert output["figures"]["worst_ratio"] < 4


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[str, float | None]] = []
    check(REFERENCE, CANDIDATE, on_progress=lambda stage, fraction: told.append((stage, fraction)))
    assert ("running on CPUExecutionProvider", 1.0) in told
    assert told[-1] == ("computing the float64 oracle", 1.0)


def test_without_onnxruntime_the_check_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError):
        check(REFERENCE, CANDIDATE)


def test_a_provider_that_was_asked_for_and_is_missing_is_an_error() -> None:
    for provider in ("tensorrt", "cuda"):
        with pytest.raises(ProviderError, match="was asked for"):
            check(REFERENCE, CANDIDATE, providers=("cpu", provider))
    with pytest.raises(UsageError, match="no execution provider"):
        check(REFERENCE, CANDIDATE, providers=())


@pytest.mark.parametrize(
    ("dtype", "unit"), [("float", -24), ("float16", -11), ("bfloat16", -8), ("double", -53)]
)
def test_the_unit_is_that_of_the_coarsest_type(dtype: str, unit: int) -> None:
    model = parsed(f"g ({dtype}[2] x) => ({dtype}[2] y) {{ y = Neg(x) }}")
    assert rounding_unit(model) == 2.0**unit
    mixed = parsed(f"g (double[2] x) => (double[2] y) <{dtype} c = {{1}}> {{ y = Neg(x) }}")
    assert rounding_unit(mixed) == 2.0**unit


def test_verification_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, bnfold.verify.check; "
        "print([m for m in ('torch', 'onnxruntime') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_provider_is_one_name_or_several() -> None:
    assert check(REFERENCE, CANDIDATE, providers="cpu", tiers="C").verdict is Verdict.PASS
    with pytest.raises(UsageError, match="there is no execution provider 'no-such'"):
        check(REFERENCE, CANDIDATE, providers="no-such")


def test_a_provider_that_nothing_would_run_on_is_told() -> None:
    with pytest.raises(UsageError, match="tiers A and B run nothing on CUDAExecutionProvider"):
        check(REFERENCE, CANDIDATE, providers=("cuda",), tiers="AB")


def test_a_result_prints_its_tiers() -> None:
    text = str(check(REFERENCE, CANDIDATE))
    assert text.startswith("check: pass: <candidate> against <reference>\n  tier ")
    assert "tier C on CPUExecutionProvider: pass: output 'y'" in text
    assert "would have caught: " in text
