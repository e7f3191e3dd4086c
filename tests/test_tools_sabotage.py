"""The sabotage tool: defects are real, rewrites are harmless, and a blind judge is found out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.export import export_onnx
from tools.sabotage import by_check, main
from tools.sabotage_cases import FELT, Judge, Sabotage, Subject
from tools.sabotage_defects import DEFECTS, HARD_DEFECTS, Defect
from tools.sabotage_graph import Draft, NoSiteError, distance, outputs, sample
from tools.sabotage_matrix import Case, Matrix, Said, Skipped
from tools.sabotage_peers import TOOLS, by_bnfold
from tools.sabotage_rewrites import HARD_REWRITES, REWRITES

BY_NAME = {defect.name: defect for defect in (*DEFECTS, *HARD_DEFECTS)}
NOWHERE = ("merged-across-padding",)  # in a resnet
FEW = ("bias-sign", "channel-times-1.001", "epsilon-forgotten", "relu-dropped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sabotage")


@pytest.fixture(scope="module")
def nets(folder: Path) -> dict[str, Subject]:
    """Between them they have a place for every defect and rewrite."""
    names = ("mobilenet", "resnet", "mlp", "repvgg", "mobileone", "serial")
    return {n: Subject(n, onnx.load(export_onnx(n, folder / f"{n}.onnx"))) for n in names}


def always(verdict: str) -> Judge:
    return lambda _reference, _candidate: Said(verdict)


def matrix(subject: Subject, judge: Judge, only: Sequence[str]) -> Matrix:
    return Matrix.of(Sabotage(subject, judge, only=tuple(only)).run())


# ---- the judge ----


def test_the_check_tells_right_folds_from_wrong_ones(nets: dict[str, Subject]) -> None:
    found = matrix(nets["mobilenet"], by_check(), ("bnfold", "tensors-renamed", *FEW))
    assert not found.bad, found.text()
    assert sum(case.right for case in found.cases) == 2
    assert sum(not case.right for case in found.cases) == 2 * len(FEW)


@pytest.mark.parametrize(
    ("verdict", "of_right", "of_wrong"),
    [
        ("pass", "good", "miss"),
        ("fail", "false alarm", "good"),
        ("inconclusive", "undecided", "undecided"),
    ],
)
def test_a_judge_that_always_says_the_same_is_found_out(
    nets: dict[str, Subject], verdict: str, of_right: str, of_wrong: str
) -> None:
    found = matrix(nets["mlp"], always(verdict), ("bnfold", "bias-sign"))
    said = {case.right: case.outcome for case in found.cases}
    assert said == {True: of_right, False: of_wrong}
    assert len(found.bad) == sum(case.outcome != "good" for case in found.cases) > 0


def test_a_judge_that_crashes_is_an_error(nets: dict[str, Subject]) -> None:
    def crash(_reference: onnx.ModelProto, _candidate: onnx.ModelProto) -> Said:
        raise ValueError("broken")

    (case,) = matrix(nets["mlp"], crash, ("bnfold",)).cases
    assert case.outcome == "error"
    assert re.fullmatch(r"ValueError \(test_tools_sabotage.py:\d+\): broken", case.said.message)


# ---- defects ----


@pytest.mark.parametrize("name", BY_NAME)
def test_every_defect_finds_a_place_where_the_outputs_feel_it(
    nets: dict[str, Subject], name: str
) -> None:
    for subject in nets.values():
        sabotage = Sabotage(subject, always("pass"))
        feed = sample(subject.model, 0)
        (found,) = sabotage.wrong_folds("bnfold", [BY_NAME[name]], feed)
        if isinstance(found, Case):
            assert found.felt >= FELT
            assert found.site
            return
    pytest.fail(f"{name}: no place in any net")


def test_a_defect_that_changes_nothing_is_not_counted(nets: dict[str, Subject]) -> None:
    def none(draft: Draft, _: np.random.Generator) -> str:
        name = draft.linears()[0].weight
        draft.store(name, draft.array(name) * (1 + 2.0**-24))
        return name

    def nowhere(_draft: Draft, _: np.random.Generator) -> str:
        raise NoSiteError("no such site")

    sabotage = Sabotage(nets["mlp"], always("fail"))
    feed = sample(nets["mlp"].model, 0)
    defects = [Defect("none", none), Defect("nowhere", nowhere)]
    whys = [found.why for found in sabotage.wrong_folds("bnfold", defects, feed)
            if isinstance(found, Skipped)]  # fmt: skip
    assert whys == ["the outputs don't feel it", "no such site"]


def test_the_same_seed_draws_the_same_places(nets: dict[str, Subject]) -> None:
    def sites(seed: int) -> list[str]:
        sabotage = Sabotage(nets["resnet"], always("fail"), seed)
        defects = [BY_NAME[name] for name in FEW]
        found = sabotage.wrong_folds("bnfold", defects, sample(nets["resnet"].model, 0))
        return [case.site for case in found if isinstance(case, Case)]

    assert sites(3) == sites(3)
    assert sites(3) != sites(4)


def test_planting_leaves_the_fold_as_it_is(nets: dict[str, Subject]) -> None:
    folded = by_bnfold(nets["resnet"].model)
    before = folded.SerializeToString()
    for defect in DEFECTS:
        if not defect.before_folding and defect.name not in ("groups-rolled", *NOWHERE):
            draft = Draft(folded)
            defect.plant(draft, np.random.default_rng(0))
            assert draft.model.SerializeToString() != before, defect.name
    assert folded.SerializeToString() == before


def test_what_is_not_promised_is_asked_for(nets: dict[str, Subject]) -> None:
    def names(hard: bool, only: tuple[str, ...] = ()) -> set[str]:
        found = Sabotage(nets["mlp"], always("pass"), 0, only, hard=hard).run()
        return {case.name for case in found}

    assert names(True) - names(False) == {
        *(defect.name for defect in HARD_DEFECTS), *HARD_REWRITES,
        *(f"{name}-in-reference" for name in HARD_REWRITES),
    }  # fmt: skip
    assert names(False, ("bias-off-by-1e-5",)) == {"bias-off-by-1e-5"}


# ---- right folds ----


@pytest.mark.parametrize("name", [*REWRITES, *HARD_REWRITES])
def test_a_rewrite_changes_nothing(nets: dict[str, Subject], name: str) -> None:
    subject = nets["mlp" if name == "gemm-turned" else "resnet"]
    folded, feed = by_bnfold(subject.model), sample(subject.model, 0)
    draft = Draft(folded)
    {**REWRITES, **HARD_REWRITES}[name](draft, np.random.default_rng(1))
    onnx.checker.check_model(draft.model, full_check=True)
    assert draft.model.SerializeToString() != folded.SerializeToString()
    assert distance(outputs(folded, feed), outputs(draft.model, feed)) < 1e-12


def test_a_peer_that_folds_wrong_is_no_right_fold(nets: dict[str, Subject]) -> None:
    subject = nets["resnet"]
    feed = sample(subject.model, 0)

    def wrong() -> onnx.ModelProto:
        draft = Draft(by_bnfold(subject.model))
        BY_NAME["bias-sign"].plant(draft, np.random.default_rng(0))
        return draft.model

    case = Sabotage(subject, always("pass")).right_fold("peer", wrong, feed)
    assert isinstance(case, Case)
    assert (case.right, case.outcome) == (False, "miss")
    right = Sabotage(subject, always("pass")).right_fold(
        "peer", lambda: TOOLS["onnxruntime-basic"](subject.model), feed
    )
    assert isinstance(right, Case)
    assert (right.right, right.outcome) == (True, "good")


def test_a_tool_that_is_not_there_is_skipped(nets: dict[str, Subject]) -> None:
    def missing() -> onnx.ModelProto:
        raise ImportError("No module named 'peer'")

    sabotage = Sabotage(nets["mlp"], always("pass"))
    found = sabotage.right_fold("peer", missing, sample(nets["mlp"].model, 0))
    assert found == Skipped("mlp", "peer", "", "No module named 'peer'")


# ---- the command line ----


def test_the_command_says_what_was_missed_and_how_to_get_there(
    nets: dict[str, Subject], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "mlp.onnx"
    arguments = [str(file), "--only", "bnfold", "--only", "bias-sign"]
    assert main([*arguments, "--json", str(folder / "out.json")]) == 0
    stored = json.loads((folder / "out.json").read_text())
    assert [case["right"] for case in stored["cases"]] == [True, False, False]
    assert "mlp" in capsys.readouterr().out

    blind = matrix(nets["mlp"], always("pass"), ("bias-sign",))
    assert "miss: mlp bias-sign in bnfold, seed 0, bias '" in blind.text()


def test_pairs_that_were_not_told_are_kept(nets: dict[str, Subject], tmp_path: Path) -> None:
    sabotage = Sabotage(nets["mlp"], always("pass"), only=("bias-sign",), save=tmp_path)
    count = sum(isinstance(case, Case) for case in sabotage.run())
    kept = sorted(tmp_path.glob("*/candidate.onnx"))
    assert len(kept) == count > 0
    onnx.checker.check_model(onnx.load(kept[0]))
