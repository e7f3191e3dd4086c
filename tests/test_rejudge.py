"""What was measured can be judged again, by other gates, without the models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

import bnfold
from bnfold.cli import main
from bnfold.errors import UsageError
from bnfold.report.envelope import Envelope, envelope_from_json
from bnfold.report.formats import render
from bnfold.verify.judge import Decisions, Gates, Measured, Settled, Verdict
from bnfold.verify.rejudge import rejudge
from bnfold.verify.result import CheckResult, OutputResult, TierResult
from tests.report_samples import SAMPLES
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

RIGHT, WRONG = "right", "a bias off by a thousandth"
CPU = "CPUExecutionProvider"


def candidate(kind: str) -> onnx.ModelProto:
    weights = fold(statistics())
    return net(FOLDED, weights if kind == RIGHT else SABOTAGES[kind](weights))


@pytest.fixture(scope="module")
def found() -> Callable[[str], CheckResult]:
    """A check, run once for each candidate and gates."""
    known: dict[str, CheckResult] = {}

    def run(kind: str, **gates: Any) -> CheckResult:
        key = f"{kind} {gates}"
        if key not in known:
            known[key] = bnfold.check(net(UNFOLDED, statistics()), candidate(kind), samples=4,
                                      **gates)  # fmt: skip
        return known[key]

    return run


Found = Callable[..., CheckResult]

GATES: list[dict[str, float]] = [
    {}, {"rtol": 1e-9}, {"rtol": 1e-3, "atol": 1e-4}, {"atol": 0}, {"atol": 10}, {"rtol": 0.5},
]  # fmt: skip


# ---- the same as a check under those gates ----


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("kind", [RIGHT, *SABOTAGES])
def test_it_says_what_a_check_with_these_gates_says(
    found: Found, kind: str, gates: dict[str, float]
) -> None:
    again = rejudge(found(kind), **gates)
    assert again == replace(found(kind, **gates), environment=again.environment)


def test_gates_can_be_loosened_and_tightened(found: Found) -> None:
    passing = found(RIGHT)
    strict = rejudge(passing, rtol=0, atol=0)
    assert (passing.verdict, strict.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert "by more than atol 0 + rtol 0" in strict.message
    assert rejudge(strict, atol=1).verdict is Verdict.PASS
    assert rejudge(strict, rtol=1).gates == Gates(1, None)


def test_no_gate_excuses_what_the_noise_floor_forbids(found: Found) -> None:
    assert rejudge(found(WRONG), rtol=10, atol=1e6).verdict is Verdict.FAIL


def test_without_gates_those_of_the_check_stand(found: Found) -> None:
    strict = found(RIGHT, rtol=1e-9)
    assert strict.verdict is Verdict.FAIL
    assert rejudge(strict) == strict


def test_tiers_that_ran_nothing_stand_as_they_are(found: Found) -> None:
    again = rejudge(found(WRONG), atol=1e9)
    assert [t for t in again.tiers if t.tier in "AB"] == [
        t for t in found(WRONG).tiers if t.tier in "AB"
    ]
    assert again.guilty == found(WRONG).guilty == "c2"


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_limit_that_is_none_is_refused(found: Found, name: str, limit: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {limit}; give a number"):
        rejudge(found(RIGHT), **{name: limit})


# ---- what was not measured is not judged ----


def test_an_inconclusive_check_stays_so(found: Found) -> None:
    same = net(UNFOLDED, statistics())
    said = bnfold.check(same, same, samples=2)
    assert said.verdict is Verdict.INCONCLUSIVE
    assert rejudge(said, rtol=1) == replace(said, gates=Gates(1, None))


def test_decisions_without_stored_errors_keep_their_verdict() -> None:
    """Tier D alone keeps nothing of floats, so that its failure could be forgotten."""
    numbers = Measured("n", "int64", 0.0, settled=Settled(Verdict.PASS, "all are equal"))
    flipped = OutputResult("y", Verdict.FAIL, "rows differ")
    outputs = (OutputResult("n", Verdict.PASS, "all are equal", None, numbers), flipped)
    tier = TierResult("D", CPU, Verdict.FAIL, "rows differ", outputs)
    stored = CheckResult("a", "b", (tier,), 4, 0)
    assert rejudge(stored, rtol=1).verdict is Verdict.FAIL


def test_decisions_are_judged_again_beside_the_errors() -> None:
    floats = Measured("y", "float32", 2.0**-24, 0.0, (1e-7,) * 4, (1e-7,) * 4,
                      hull=((1.0, 1e-7),), decisions=Decisions(4, 4, 2))  # fmt: skip
    passing = OutputResult("y", Verdict.PASS, "", None, floats)
    bare = replace(passing, measured=None)
    tiers = (
        TierResult("C", CPU, Verdict.PASS, "", (passing,)),
        TierResult("D", CPU, Verdict.PASS, "", (bare,)),
    )
    again = rejudge(CheckResult("a", "b", tiers, 4, 0))
    assert [(t.tier, t.verdict) for t in again.tiers] == [("C", Verdict.PASS), ("D", Verdict.FAIL)]


def test_each_provider_is_judged_by_its_own_errors(found: Found) -> None:
    one, other = found(RIGHT), found(WRONG)
    tiers = (*(t for t in one.tiers if t.provider),
             *(replace(t, provider="Other") for t in other.tiers if t.provider))  # fmt: skip
    again = rejudge(replace(one, tiers=tiers), atol=10)
    assert [(t.provider, t.tier, t.verdict) for t in again.tiers] == [
        (t.provider, t.tier, t.verdict) for t in tiers
    ]
    assert {t.provider for t in again.tiers if t.verdict is Verdict.FAIL} == {"Other"}


# ---- through a file ----


@pytest.mark.parametrize("kind", [RIGHT, WRONG])
@pytest.mark.parametrize("gates", GATES, ids=str)
def test_a_stored_report_is_judged_as_the_check_itself(
    found: Found, kind: str, gates: dict[str, float]
) -> None:
    stored = envelope_from_json(render("json", Envelope(check=found(kind)))).check
    assert stored is not None
    assert rejudge(stored, **gates) == rejudge(found(kind), **gates)


@pytest.mark.parametrize("name", ["passing", "failing", "checked", "large"])
def test_a_report_of_any_size_keeps_its_tiers(name: str) -> None:
    check = SAMPLES[name].check
    assert check is not None
    tiers = tuple(replace(t, caught=None) if t.tier == "A" else t for t in check.tiers)
    again = rejudge(replace(check, tiers=tiers), rtol=1e-3)
    assert {t.tier for t in again.tiers} == {t.tier for t in tiers}


# ---- the command ----


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def stored(tmp_path: Path, found: Found) -> Callable[..., Path]:
    """A report file of a check."""

    def write(kind: str, **gates: float) -> Path:
        path = tmp_path / "stored.json"
        path.write_text(render("json", Envelope(check=found(kind, **gates))))
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "checked", "options", "code"),
    [
        (RIGHT, {}, (), 0),
        (RIGHT, {}, ("--rtol", "1e-9"), 1),
        (RIGHT, {"rtol": 1e-9}, (), 1),
        (RIGHT, {"rtol": 1e-9}, ("--atol", "1"), 0),
        (WRONG, {}, (), 1),
        (WRONG, {}, ("--rtol", "1", "--atol", "1"), 1),
        (RIGHT, {}, ("--rtol", "-1"), 2),
        (RIGHT, {}, ("--rtol", "nan"), 2),
        (RIGHT, {}, ("--atol", "inf"), 2),
        (RIGHT, {}, ("--rtol", "wide"), 2),
    ],
)
def test_the_exit_code_is_that_of_the_verdict(
    stored: Any, kind: str, checked: dict[str, float], options: tuple[str, ...], code: int
) -> None:
    result = run("rejudge", stored(kind, **checked), *options)
    assert result.exit_code == code, result.output
    assert result.stdout.startswith({0: "check: pass", 1: "check: fail", 2: ""}[code])
    assert bool(result.stderr) == bool(code)


def test_an_inconclusive_report_is_exit_3(tmp_path: Path) -> None:
    tier = TierResult("C", CPU, Verdict.INCONCLUSIVE, "nothing can be told")
    path = tmp_path / "stored.json"
    path.write_text(render("json", Envelope(check=CheckResult("a", "b", (tier,), 1, 0))))
    result = run("rejudge", path)
    assert result.exit_code == 3
    assert result.stderr == "bnfold: error: b: nothing can be told\n"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, 5, "it can't be read: "),
        (b"\xff\xfe", 5, "it can't be read: "),
        (b"not a report", 2, "it is not JSON: "),
        (b"[]", 2, "it has no schema_version; give a report that bnfold wrote"),
        (b'{"schema_version": 99}', 2, "the report has schema version 99"),
        (b'{"schema_version": 1, "check": {"tiers": 3}}', 2, "it is not a report of bnfold: "),
        (b'{"schema_version": 1}', 2, "there is no check in it; give the report of a check"),
    ],
)
def test_a_file_that_is_no_stored_check_is_told_apart(
    tmp_path: Path, content: bytes | None, code: int, said: str
) -> None:
    path = tmp_path / "stored.json"
    if content is not None:
        path.write_bytes(content)
    result = run("rejudge", path)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(f"bnfold: error: {path}: {said}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_stored_beside_the_check_goes_on_into_new_reports(
    tmp_path: Path, found: Found
) -> None:
    first = Envelope(
        SAMPLES["passing"].report, found(RIGHT), "out.onnx", ("bn1",), "out.reproducer"
    )
    (tmp_path / "stored.json").write_text(render("json", first))
    reports = ("-", tmp_path / "again.html", tmp_path / "again.xml")
    asked = [part for report in reports for part in ("--report", report)]
    result = run("rejudge", tmp_path / "stored.json", "--rtol", "1e-9", *asked)
    assert result.exit_code == 1
    data, before = json.loads(result.stdout), json.loads(render("json", first))
    assert {key for key in data if data[key] != before[key]} == {"check"}
    assert data["check"]["verdict"] == "fail"
    assert data["check"]["gates"] == {"rtol": 1e-9, "atol": None}
    assert "<html" in (tmp_path / "again.html").read_text()
    assert "<testsuites" in (tmp_path / "again.xml").read_text()
    assert "python out.reproducer/reproduce.py" in result.stderr


def test_a_stored_report_is_not_overwritten(stored: Any) -> None:
    path = stored(RIGHT)
    before = path.read_bytes()
    result = run("rejudge", path, "--report", path)
    assert (result.exit_code, path.read_bytes()) == (2, before)
    assert "the report would overwrite what it is about" in result.stderr
