"""The pre-commit hook: which pairs it checks, and what its exit code is."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

import bnfold
from bnfold.errors import MismatchError, ProviderError
from bnfold.pre_commit import WORST_FIRST, Pair, main, pairs
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult, TierResult
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

ROOT = Path(__file__).parent.parent
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
WRONG = SABOTAGES["a bias off by a thousandth"]


HIDING = """
import runpy, sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name in ("onnxruntime", "torch"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Hidden)
"""


def save_pair(folder: Path, stem: str, weights: dict[str, Any]) -> None:
    onnx.save(net(UNFOLDED, statistics()), folder / f"{stem}.onnx")
    onnx.save(net(FOLDED, weights), folder / f"{stem}.folded.onnx")


def run_hook(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """The entry as pre-commit runs it, in a Python that has no runtime to run a model."""
    *python, module = shlex.split(HOOK["entry"])
    assert python == ["python", "-P", "-m"]
    code = (
        HIDING
        + f"""
sys.argv[1:] = {list(files)!r}
runpy.run_module({module!r}, run_name="__main__")
"""
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip


# ---- which pairs ----


CHANGED = {
    ("net.folded.onnx",): ["net"],
    ("net.onnx",): ["net"],
    ("net.onnx", "net.folded.onnx", "net.folded.onnx.data"): ["net"],
    ("net.onnx.data",): ["net"],
    ("net.onnx_data",): ["net"],
    ("net.folded.onnx_data",): ["net"],
    ("alone.onnx",): [],
    ("orphan.folded.onnx",): ["orphan"],
    ("alone.onnx", "net.folded.onnx", "orphan.folded.onnx"): ["net", "orphan"],
    (): [],
}  # fmt: skip


@pytest.mark.parametrize("files", CHANGED, ids=str)
def test_a_pair_is_checked_once_whichever_of_its_files_changed(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    for name in ("net.onnx", "net.folded.onnx", "alone.onnx", "orphan.folded.onnx"):
        (tmp_path / name).touch()
    expected = [Pair(tmp_path / f"{s}.onnx", tmp_path / f"{s}.folded.onnx") for s in CHANGED[files]]
    assert list(pairs(str(tmp_path / file) for file in files)) == expected


def test_the_hook_asks_for_the_files_of_a_pair_in_one_process() -> None:
    for name, wanted in (("a.onnx", True), ("a/b.folded.onnx", True), ("a.onnx.data", True),
                         ("a.onnx_data", True), ("a.onnxdata", False),
                         ("a.onnx.txt", False), ("a.py", False)):  # fmt: skip
        assert bool(re.search(HOOK["files"], name)) is wanted, name
    assert HOOK["require_serial"] is True
    assert (HOOK["id"], HOOK["language"]) == ("bnfold-check", "python")


# ---- what it says ----


def verdict(verdict: Verdict) -> CheckResult:
    return CheckResult("a", "b", (TierResult("B", "", verdict, "said"),), 4, 0, guilty="conv3")


OUTCOMES: dict[str, Any] = {
    "good": verdict(Verdict.PASS),
    "bad": verdict(Verdict.FAIL),
    "open": verdict(Verdict.INCONCLUSIVE),
    "bare": ProviderError("nothing is installed"),
    "off": MismatchError("other outputs"),
}
CODES = {
    ("good",): 0, ("good", "good2"): 0, ("open",): 3, ("bad",): 1, ("off",): 1, ("bare",): 4,
    ("good", "open"): 3, ("open", "bad", "good"): 1, ("bare", "bad"): 1, ("open", "bare"): 4,
    ("orphan",): 5, ("orphan", "good"): 5, ("bad", "orphan"): 1,
}  # fmt: skip


@pytest.mark.parametrize("stems", CODES, ids=str)
def test_the_worst_pair_decides_and_every_pair_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stems: tuple[str, ...],
) -> None:
    asked = []

    def check(reference: Path, candidate: Path, **options: Any) -> CheckResult:
        asked.append(options)
        outcome = OUTCOMES[reference.stem.rstrip("2")]
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, CheckResult)
        return outcome

    monkeypatch.setattr(bnfold, "check", check, raising=False)
    for stem in stems:
        if stem != "orphan":
            (tmp_path / f"{stem}.onnx").touch()
    files = [str(tmp_path / f"{stem}.folded.onnx") for stem in stems]
    assert main([*files, "--seed=5"]) == CODES[stems]
    said = capsys.readouterr().out
    assert said.count(".folded.onnx: ") + said.count("error: ") >= len(stems)
    assert ("conv3" in said) == bool({"bad", "open"} & set(stems))
    assert all(options == {"tiers": "AB", "samples": 4, "seed": 5} for options in asked)


def test_a_right_pair_passes_whatever_it_is_called_and_the_log_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(bnfold, "check", lambda *_, **__: OUTCOMES["good"], raising=False)
    (tmp_path / "卷积.onnx").touch()
    assert main([str(tmp_path / "卷积.folded.onnx")]) == 0
    assert main([str(tmp_path / "缺.folded.onnx")]) == 5
    narrow.seek(0)
    assert r"\u5377\u79ef.folded.onnx: pass: said" in narrow.read()


def test_every_exit_code_has_its_place() -> None:
    assert sorted(WORST_FIRST) == [0, 1, 2, 3, 4, 5]
    assert main([]) == 0


# ---- for real ----


def test_committed_pairs_are_checked_without_a_runtime(tmp_path: Path) -> None:
    save_pair(tmp_path, "right", fold(statistics()))
    save_pair(tmp_path, "wrong", WRONG(fold(statistics())))
    (tmp_path / "onnx").mkdir()  # the user's own, which is not the package
    (tmp_path / "onnx" / "__init__.py").write_text("raise SystemExit('shadowed')")
    done = run_hook(tmp_path, "right.onnx", "right.folded.onnx")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("right.folded.onnx: pass: ")
    done = run_hook(tmp_path, "right.folded.onnx", "wrong.onnx")
    assert (done.returncode, done.stderr) == (1, ""), done.stdout
    assert "wrong.folded.onnx: fail: Conv 'c2' is wrong" in done.stdout
    done = run_hook(tmp_path, "gone.folded.onnx")
    assert done.returncode == 5
    assert "there is no gone.onnx beside it to check it against; commit it too" in done.stdout
