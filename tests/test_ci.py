"""What a run leaves on GitHub Actions: annotations, a summary, and never another outcome."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from bnfold.ci import announce, announce_error, on_github
from bnfold.errors import BnfoldError, InconclusiveError, MismatchError, ReadError
from bnfold.report.envelope import Envelope
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult, TierResult
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

WRONG = CheckResult(
    "a.onnx", "b.onnx", (TierResult("B", "", Verdict.FAIL, "it's off\nby 3 %"),), 8, 0,
    guilty="conv→3",
)  # fmt: skip
FOUND = Envelope(check=WRONG)
ERROR = ReadError("there is no such file", file="a.onnx", todo="check the path")


def github(tmp_path: Path) -> dict[str, str]:
    return {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}


@pytest.mark.parametrize("environ", [{}, {"GITHUB_ACTIONS": ""}, {"GITHUB_ACTIONS": "false"}])
def test_elsewhere_nothing_is_written(tmp_path: Path, environ: dict[str, str]) -> None:
    stdout, summary = io.StringIO(), tmp_path / "summary.md"
    environ = {**environ, "GITHUB_STEP_SUMMARY": str(summary)}
    announce(FOUND, environ=environ, stdout=stdout)
    announce_error(ERROR, environ=environ, stdout=stdout)
    assert not on_github(environ)
    assert (stdout.getvalue(), summary.exists()) == ("", False)


def test_a_mismatch_is_an_error_on_the_candidate_in_one_line(tmp_path: Path) -> None:
    stdout = io.StringIO()
    announce(FOUND, environ=github(tmp_path), stdout=stdout)
    (line,) = stdout.getvalue().splitlines()
    assert line.startswith("::error file=b.onnx,title=bnfold")
    assert "it's off%0Aby 3 %25" in line
    assert "conv→3" in line


def test_summaries_of_a_step_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("before\n")
    announce(FOUND, environ=github(tmp_path), stdout=io.StringIO())
    once = (tmp_path / "summary.md").read_text().removeprefix("before\n")
    announce(FOUND, environ=github(tmp_path), stdout=io.StringIO())
    assert "b.onnx" in once
    assert once.endswith("\n\n")  # or the next one's heading would be a part of its last line
    assert (tmp_path / "summary.md").read_text() == f"before\n{once}{once}"


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    stdout = io.StringIO()
    environ = {**github(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path)}
    announce(FOUND, environ=environ, stdout=stdout)
    first, last = stdout.getvalue().splitlines()
    assert first.startswith("::error")
    assert last.startswith("::warning title=bnfold::the step summary can't be written: ")
    del environ["GITHUB_STEP_SUMMARY"]
    announce(FOUND, environ=environ, stdout=io.StringIO())


def test_a_log_in_a_narrow_encoding_takes_any_name(tmp_path: Path) -> None:
    raw = io.BytesIO()
    narrow = io.TextIOWrapper(raw, encoding="ascii")
    announce(FOUND, environ=github(tmp_path), stdout=narrow)
    assert rb"conv\u21923" in raw.getvalue()
    assert "conv→3" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_what_stops_a_run_is_an_error_on_its_file(tmp_path: Path) -> None:
    stdout = io.StringIO()
    announce_error(ERROR, environ=github(tmp_path), stdout=stdout)
    said = "a.onnx: there is no such file; check the path"
    assert stdout.getvalue() == f"::error file=a.onnx,title=bnfold::{said}\n"


@pytest.mark.parametrize("kind", [MismatchError, InconclusiveError])
def test_a_verdict_is_not_told_twice(tmp_path: Path, kind: type[BnfoldError]) -> None:
    stdout = io.StringIO()
    announce_error(kind("said", file="b.onnx"), environ=github(tmp_path), stdout=stdout)
    assert stdout.getvalue() == ""


ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "bnfold.cli"]


def test_where_stdout_carries_json_the_annotations_go_to_stderr(tmp_path: Path) -> None:
    wrong = SABOTAGES["a bias off by a thousandth"](fold(statistics()))
    onnx.save(net(UNFOLDED, statistics()), tmp_path / "a.onnx")
    onnx.save(net(FOLDED, wrong), tmp_path / "b.onnx")
    env = os.environ | github(tmp_path) | {"PYTHONPATH": str(ROOT)}
    call = [*COMMAND, "check", "a.onnx", "b.onnx", "--tiers=C", "--samples=3"]

    def run(*more: str) -> tuple[str, str]:
        done = subprocess.run([*call, *more], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        return done.stdout, done.stderr

    stdout, stderr = run("--report", "-")
    assert json.loads(stdout)["check"]["verdict"] == "fail"
    assert "\n::error file=b.onnx" in f"\n{stderr}"
    stdout, stderr = run()
    assert "\n::error file=b.onnx" in f"\n{stdout}"
    assert stderr.count("::error") == 0
    assert "b.onnx" in (tmp_path / "summary.md").read_text()
