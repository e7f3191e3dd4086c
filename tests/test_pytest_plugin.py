"""The pytest plugin and `assert_same_model`, in sessions of pytest of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest

from bnfold.errors import ReadError
from bnfold.testing import assert_same_model, failure
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult, TierResult
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
WRONG = SABOTAGES["one channel scaled by 1.001"]
# Named, not found by its entry point: so it is this checkout's, installed or not, and no other.
PLUGIN = ("-p", "bnfold.pytest_plugin", "-p", "no:cacheprovider")

SUITE = """
import onnx, pytest
from bnfold.errors import ReadError
from bnfold.testing import assert_same_model

def test_right(bnfold_check):
    check = bnfold_check("net.onnx", "right.onnx", samples=5)
    assert (check.verdict.value, check.samples) == ("pass", 5)

@pytest.mark.parametrize("name", ["wrong.onnx"])
def test_wrong(bnfold_check, name):
    bnfold_check("net.onnx", "right.onnx")
    bnfold_check("net.onnx", name)  # the guilty line
    raise SystemExit("not reached")

def test_undecided(bnfold_check):
    bnfold_check("net.onnx", "net.onnx")

def test_plain_right():
    assert_same_model(onnx.load("net.onnx"), onnx.load("right.onnx"))

def test_plain_wrong():
    assert_same_model("net.onnx", "wrong.onnx")

def test_missing(bnfold_check):
    with pytest.raises(ReadError):
        bnfold_check("net.onnx", "missing.onnx")
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("PYTEST_ADDOPTS", "GITHUB_ACTIONS", "CI"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def save_models(folder: Path) -> None:
    right = fold(statistics())
    onnx.save(net(UNFOLDED, statistics()), folder / "net.onnx")
    onnx.save(net(FOLDED, right), folder / "right.onnx")
    onnx.save(net(FOLDED, WRONG(right)), folder / "wrong.onnx")


def test_right_pairs_pass_and_all_others_fail_in_words(session: pytest.Pytester) -> None:
    save_models(session.path)
    session.makepyfile(SUITE)
    ran = session.runpytest_subprocess(*PLUGIN, "--bnfold-report-dir", "made/reports")
    ran.assert_outcomes(passed=3, failed=3)
    text = ran.stdout.str()
    said = re.findall(r"^E +AssertionError: (.*)$", text, re.M)
    assert said.count("wrong.onnx does not say what net.onnx says") == 2
    assert "check: fail (8 samples, seed 0)" in text
    assert said[1].startswith("it can't be told whether net.onnx says what net.onnx says")
    assert said[1].endswith("what could not be computed never passes")
    assert 'bnfold_check("net.onnx", name)  # the guilty line' in text
    assert "pytest_plugin.py" not in text  # the trace ends at the user's line
    assert "not reached" not in text
    reports = sorted(path.name for path in (session.path / "made" / "reports").iterdir())
    # Of the fixture's four checks that came to a verdict; a parameter's brackets are replaced.
    assert len(reports) == 12
    (named,) = re.findall(r"report: (.*test_wrong-wrong.onnx\S*-2\.html)", text)
    assert "<html" in Path(named).read_text()
    written = json.loads(Path(named).with_suffix(".json").read_text())
    assert written["check"]["verdict"] == "fail"


PROVIDERS = {
    "none is the CPU": ("", (), "('cpu',)"),
    "the ini file's": ("bnfold_provider = cpu cuda", (), "('cpu', 'cuda')"),
    "the command line's first": (
        "bnfold_provider = cuda",
        ("--bnfold-provider", "dml", "--bnfold-provider=cpu"),
        "('dml', 'cpu')",
    ),
}


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_provider_is_the_sessions_unless_a_test_names_one(
    session: pytest.Pytester, name: str
) -> None:
    ini, arguments, expected = PROVIDERS[name]
    session.makeini(f"[pytest]\n{ini}\n")
    session.makepyfile(f"""
        import bnfold
        from bnfold.verify.judge import Verdict
        from bnfold.verify.result import CheckResult, TierResult

        PASSED = CheckResult("a", "b", (TierResult("C", "", Verdict.PASS, "same"),), 8, 0)

        def test_providers(bnfold_check, monkeypatch):
            calls = []
            def check(reference, candidate, **options):
                calls.append((reference, candidate, options))
                return PASSED
            monkeypatch.setitem(vars(bnfold), "check", check)
            assert bnfold_check("a", "b") is PASSED
            bnfold_check("a", "b", providers=("coreml",), rtol=1e-3)
            assert calls == [
                ("a", "b", {{"providers": {expected}}}),
                ("a", "b", {{"providers": ("coreml",), "rtol": 1e-3}}),
            ]
    """)
    session.runpytest_subprocess(*PLUGIN, *arguments).assert_outcomes(passed=1)


def test_a_session_that_does_not_use_it_loads_nothing_heavy(session: pytest.Pytester) -> None:
    session.makepyfile("""
        import sys

        def test_what_is_loaded():
            assert "bnfold.pytest_plugin" in sys.modules
            heavy = {"onnx", "onnx_ir", "onnxruntime", "torch", "numpy", "click", "rich"}
            assert not heavy & set(sys.modules)
            assert not [name for name in sys.modules if name.startswith("bnfold.verify")]
    """)
    session.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


def test_importing_the_assertion_loads_nothing_heavy() -> None:
    code = "import sys, bnfold.testing; print('onnx' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_pytest_finds_the_plugin_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"bnfold": "bnfold.pytest_plugin"}


def test_the_options_are_in_pytests_help(session: pytest.Pytester) -> None:
    ran = session.runpytest_subprocess(*PLUGIN, "--help")
    ran.stdout.fnmatch_lines(["*--bnfold-provider=NAME*", "*--bnfold-report-dir=DIR*"])
    ran.stdout.fnmatch_lines(["*bnfold_provider (args)*"])


def test_the_message_names_the_first_wrong_site_what_was_caught_and_the_reports() -> None:
    tiers = (TierResult("B", "", Verdict.FAIL, "'conv3' is off"),)
    check = CheckResult("a\n.onnx", "b.onnx", tiers, 8, 7, guilty="conv3", caught="1e-5 of a bias")
    lines = failure(check, Path("out/x.html")).splitlines()
    assert lines[0] == r"b.onnx does not say what a\n.onnx says"
    for part in ("seed 7", "first wrong site: conv3", "1e-5 of a bias", "report: out/x.html"):
        assert any(part in line for line in lines), part


def test_what_is_no_model_is_an_error_not_a_mismatch(tmp_path: Path) -> None:
    save_models(tmp_path)
    with pytest.raises(ReadError, match="no such file"):
        assert_same_model(tmp_path / "net.onnx", tmp_path / "missing.onnx")
    assert assert_same_model(tmp_path / "net.onnx", tmp_path / "right.onnx").samples == 8
