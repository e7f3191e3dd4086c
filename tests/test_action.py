"""The GitHub Action, run as the runner runs it: its steps in bash, its inputs by expressions."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.action_runs import ACTION, ROOT, STEPS, STUB, run_action
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

REPORTS = {"report.json", "junit.xml", "bnfold.sarif", "report.md", "report.html"}


@pytest.fixture
def stub(tmp_path: Path) -> str:
    path = tmp_path / "a python"
    path.write_text(STUB)
    path.chmod(0o755)
    return str(path)


# ---- how it is written ----


def test_every_input_is_described_optional_and_used() -> None:
    used = " ".join(str(step.get("env")) + step.get("if", "") for step in STEPS)
    for name, spec in ACTION["inputs"].items():
        assert set(spec) == {"description", "default"}, name
        assert isinstance(spec["default"], str), name
        assert f"inputs.{name} " in used, name


def test_every_output_is_put_by_the_step_that_it_names() -> None:
    scripts = {step["id"]: step["run"] for step in STEPS}
    for name, spec in ACTION["outputs"].items():
        assert spec["value"].startswith(f"${{{{ steps.check.outputs.{name} ")
        assert f"put {name} " in scripts["check"]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["id"])
def test_no_script_holds_what_a_user_gave(step: dict[str, Any]) -> None:
    assert step["shell"] == "bash"
    assert "${{" not in step["run"]
    assert set(re.findall(r"\bBNFOLD_\w+", step["run"])) == set(step["env"])


# ---- how it calls bnfold ----


HOSTILE = "a 'b' \"c\" $(touch pwned) `touch pwned` *; touch pwned #.onnx"


def test_what_a_user_gives_arrives_as_it_is_and_is_never_run(tmp_path: Path, stub: str) -> None:
    inputs = {
        "reference": HOSTILE, "candidate": f"-{HOSTILE}", "report": f"r {HOSTILE}",
        "inputs": f"one {HOSTILE}\n\ntwo.npz", "provider": "cpu, cuda\n*", "rtol": HOSTILE,
        "atol": "1e-6", "tiers": "A,B", "samples": "3", "seed": "7", "allow-tf32": "true",
    }  # fmt: skip
    ran = run_action(tmp_path, {**inputs, "install": "false", "python": stub})
    assert ran.code == 0, ran.log
    assert ran.call("bnfold.cli") == [
        "-P", "-m", "bnfold.cli", "check", "--samples=3", "--seed=7", "--provider=cpu",
        "--provider=cuda", "--provider=*", f"--inputs=one {HOSTILE}", "--inputs=two.npz",
        "--allow-tf32", "--tiers=A,B", f"--rtol={HOSTILE}", "--atol=1e-6",
        f"--reproducer=r {HOSTILE}/reproducer",
        *(f"--report=r {HOSTILE}/{name}" for name in ("report.json", "junit.xml", "bnfold.sarif")),
        *(f"--report=r {HOSTILE}/{name}" for name in ("report.md", "report.html")),
        "--", HOSTILE, f"-{HOSTILE}",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))
    assert ran.outputs["report"] == f"r {HOSTILE}"
    assert (tmp_path / f"r {HOSTILE}").is_dir()


def test_a_model_alone_is_folded_to_the_named_or_a_temporary_file(
    tmp_path: Path, stub: str
) -> None:
    inputs = {"model": "nets/a b.onnx", "install": "false", "python": stub}
    more = {"output": "made here/c.onnx", "level": "local", "fail-on-kept": "BNF010"}
    ran = run_action(tmp_path, inputs | more)
    call = ran.call("bnfold.cli")
    assert call[3:7] == ["optimize", "--output=made here/c.onnx", "--level=local",
                         "--fail-on-kept=BNF010"]  # fmt: skip
    assert call[-2:] == ["--", "nets/a b.onnx"]
    assert (ran.outputs["output"], (tmp_path / "made here").is_dir()) == ("made here/c.onnx", True)
    ran = run_action(tmp_path, inputs)
    assert re.fullmatch(r".*/runner temp/bnfold\.\w+/a b\.folded\.onnx", ran.outputs["output"])
    assert f"--output={ran.outputs['output']}" in ran.call("bnfold.cli")
    assert run_action(tmp_path, inputs, STUB_CLI="1").outputs["output"] == ""


@pytest.mark.parametrize("inputs", [
    {}, {"reference": "a"}, {"candidate": "a"}, {"model": "a", "candidate": "b"},
    {"model": "a", "fail-on": "sometimes"},
], ids=str)  # fmt: skip
def test_a_call_that_means_nothing_is_an_error_of_usage(
    tmp_path: Path, stub: str, inputs: dict[str, str]
) -> None:
    ran = run_action(tmp_path, {**inputs, "install": "false", "python": stub})
    assert (ran.code, ran.outputs["verdict"], ran.outputs["exit-code"]) == (2, "error", "2")
    assert ran.log.startswith("::error title=bnfold::")
    assert not [call for call in ran.calls if "bnfold.cli" in call]


VERDICTS = {0: "pass", 1: "fail", 2: "error", 3: "inconclusive", 4: "error", 5: "error",
            70: "error"}  # fmt: skip
FORGIVEN = {"inconclusive": (), "mismatch": (3,), "never": (1, 3)}


@pytest.mark.parametrize("fail_on", FORGIVEN)
@pytest.mark.parametrize("code", VERDICTS)
def test_the_exit_code_of_the_check_is_the_steps_unless_it_is_forgiven(
    tmp_path: Path, stub: str, code: int, fail_on: str
) -> None:
    inputs = {"reference": "a", "candidate": "b", "fail-on": fail_on, "python": stub}
    ran = run_action(tmp_path, {**inputs, "install": "false"}, STUB_CLI=str(code))
    assert ran.code == (0 if code in FORGIVEN[fail_on] else code)
    assert (ran.outputs["verdict"], ran.outputs["exit-code"]) == (VERDICTS[code], str(code))


def test_a_python_without_bnfold_is_no_mismatch(tmp_path: Path, stub: str) -> None:
    inputs = {"reference": "a", "candidate": "b", "python": stub, "install": "false"}
    ran = run_action(tmp_path, inputs, STUB_C="1")
    assert (ran.code, ran.outputs["verdict"]) == (4, "error")


# ---- how it installs ----


RUNTIMES = {
    "cpu": [f"{ROOT}[cpu]"], "coreml": [f"{ROOT}[cpu]"], "cpu,CUDA": [f"{ROOT}[gpu]"],
    "TensorrtExecutionProvider": [f"{ROOT}[gpu]"],
    "cpu openvino": [str(ROOT), "onnxruntime-openvino"],
    "dml": [str(ROOT), "onnxruntime-directml"],
}  # fmt: skip


@pytest.mark.parametrize("provider", RUNTIMES)
def test_the_runtime_follows_the_provider(tmp_path: Path, stub: str, provider: str) -> None:
    inputs = {"reference": "a", "candidate": "b", "python": stub, "provider": provider}
    ran = run_action(tmp_path, inputs)
    assert ran.code == 0, ran.log
    assert ran.call("pip")[5:] == RUNTIMES[provider]
    made = ran.call("venv")[2]
    # The check runs in what was installed, not in the user's own environment.
    assert Path(made).parent == tmp_path / "runner temp"
    ran = run_action(tmp_path, {**inputs, "runtime": "some-runtime==1"})
    assert ran.call("pip")[5:] == [str(ROOT), "some-runtime==1"]
    assert ran.call("venv")[2] != made


@pytest.mark.parametrize("asked", ["STUB_C", "STUB_PIP"])
def test_what_cannot_be_installed_stops_the_action(tmp_path: Path, stub: str, asked: str) -> None:
    ran = run_action(tmp_path, {"model": "a", "python": stub}, **{asked: "1"})
    assert (ran.code, ran.outputs["verdict"], ran.outputs["exit-code"]) == (4, "error", "4")
    assert "::error title=bnfold::" in ran.log
    assert not [call for call in ran.calls if "bnfold.cli" in call]


# ---- what comes of it ----


PAIRS = {
    "a right fold": (fold(statistics()), 0, "pass"),
    "a wrong fold": (SABOTAGES["one channel scaled by 1.001"](fold(statistics())), 1, "fail"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_judged_and_every_report_is_there(tmp_path: Path, name: str) -> None:
    weights, code, verdict = PAIRS[name]
    onnx.save(net(UNFOLDED, statistics()), tmp_path / "a b.onnx")
    onnx.save(net(FOLDED, weights), tmp_path / "a b.folded.onnx")
    inputs = {"reference": "a b.onnx", "candidate": "a b.folded.onnx", "install": "false",
              "python": sys.executable}  # fmt: skip
    ran = run_action(tmp_path, inputs)
    assert (ran.code, ran.outputs["verdict"]) == (code, verdict), ran.log
    reports = tmp_path / ran.outputs["report"]
    assert {path.name for path in reports.iterdir()} == REPORTS | (
        {"reproducer"} if code else set()
    )
    assert json.loads((reports / "report.json").read_text())["check"]["verdict"] == verdict
    assert verdict in ran.summary.lower()
    assert ("::error" in ran.log) == bool(code)


def test_a_model_is_folded_checked_and_written(tmp_path: Path) -> None:
    onnx.save(net(UNFOLDED, statistics()), tmp_path / "net.onnx")
    inputs = {"model": "net.onnx", "install": "false", "python": sys.executable}
    ran = run_action(tmp_path, inputs)
    assert (ran.code, ran.outputs["verdict"]) == (0, "pass"), ran.log
    made = onnx.load(ran.outputs["output"])
    assert "BatchNormalization" not in {node.op_type for node in made.graph.node}


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    inputs = {"model": "missing.onnx", "install": "false", "python": sys.executable}
    ran = run_action(tmp_path, inputs)
    assert (ran.code, ran.outputs["verdict"], ran.outputs["output"]) == (5, "error", "")
    assert "::error" in ran.log
