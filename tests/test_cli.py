"""The command line: help texts whole, exit codes, what goes where, and real runs."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold import api, cli
from bnfold.cli import main
from bnfold.errors import (
    BnfoldError,
    InconclusiveError,
    InvalidModelError,
    MismatchError,
    ProviderError,
    ReadError,
    UsageError,
    WriteError,
)
from bnfold.progress import progress
from bnfold.report.envelope import Envelope
from bnfold.report.model import Report, Size, Step
from bnfold.verify import doctor as doctoring
from bnfold.verify import rejudge as rejudging
from bnfold.verify.diagnosis import Diagnosis, Problem, Tried
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult, TierResult
from tests import nets

GROUP_HELP = """\
Usage: bnfold [OPTIONS] COMMAND [ARGS]...

  Fold BatchNorm and every other per-channel affine step of ONNX models.

  Exit codes: 0 done, 1 mismatch, --fail-on-kept or --fail-if-slower, 2 usage, 3
  inconclusive, 4 environment, 5 bad model or file, 70 a bug of bnfold, 130
  interrupted.

Options:
  --version   Show the version and exit.
  --debug     Show the traceback of an error.
  -h, --help  Show this message and exit.

Commands:
  bench     Time models side by side.
  check     Check that two models say the same.
  doctor    Say what this machine can check on.
  explain   Say of each affine step whether it folds.
  optimize  Fold a model, check it and write it.
  rejudge   Judge a stored report again.
"""
OPTIMIZE_HELP = """\
Usage: bnfold optimize [OPTIONS] MODEL

  Fold MODEL, check it against the original, and write the result.

  Nothing is written unless the check passes or is left out. A fold with which
  it fails is taken back; the rest is kept and checked again.

Options:
  -o, --output OUT         Where to write the result.  [default: <stem of
                           MODEL>.folded.onnx beside it]
  --no-check               Write the result without checking it.
  --provider NAME          Execution provider to check on: cpu, cuda, tensorrt,
                           migraphx, openvino, dml, coreml or its full name; may
                           be given several times.  [default: cpu]
  --tiers A,B,C,D          Which tiers: A stored weights, B every site in
                           float64, C both models on each provider, D decisions
                           there.  [default: A,B,C,D]
  --samples N              How many input samples to draw.  [default: 8; x>=1]
  --seed N                 Seed of the samples.  [default: 0; x>=0]
  --inputs PATH            Check on these inputs instead: .npz (arrays by input
                           name), .npy, a test_data_set_0 folder or a folder of
                           such; may be given several times.
  --allow-tf32             Let NVIDIA devices round products of float32 to TF32;
                           the report says so.
  --rtol X                 Beside the noise floor: no element may differ by more
                           than atol + rtol * its size.  [x>=0]
  --atol X                 See --rtol.  [x>=0]
  --reproducer DIR         Where to write both models, inputs and a script,
                           should the check fail.  [default: for optimize <stem
                           of OUT>.reproducer beside OUT]
  --level [max|local]      How far folds may reach: local stays with direct
                           neighbours.  [default: max]
  --simplify               Run onnxsim first (pip install bnfold[simplify]).
  --trust-initializers     Take initializers that are also graph inputs as
                           constants.
  --unshare BYTES          Let operators that share a weight have their own, up
                           to so many bytes more.  [x>=0]
  --leftover FORM          How to write a BatchNormalization that stays: keep
                           (as it is), affine (Mul and Add) or depthwise (a 1x1
                           Conv).  [default: keep]
  --horizontal             Let operators over one tensor whose outputs are
                           concatenated become one also where parts of its
                           output have to be copied.
  --report FILE|-          Write what was found, in the form that the ending
                           asks for: .json, .xml (JUnit), .sarif, .md, .html or
                           .txt; with - as JSON to stdout, and any text to
                           stderr. May be given several times.
  --fail-on-kept CODE,...  Exit with 1 when a step stays for one of these
                           reasons (BNF010 or zero-padding).
  --quiet                  Print errors only.
  --debug                  Show the traceback of an error.
  -h, --help               Show this message and exit.
"""
EXPLAIN_HELP = """\
Usage: bnfold explain [OPTIONS] MODEL

  Say of every affine step of MODEL whether it folds, into what, or why not.

Options:
  --level [max|local]      How far folds may reach: local stays with direct
                           neighbours.  [default: max]
  --trust-initializers     Take initializers that are also graph inputs as
                           constants.
  --unshare BYTES          Let operators that share a weight have their own, up
                           to so many bytes more.  [x>=0]
  --leftover FORM          How to write a BatchNormalization that stays: keep
                           (as it is), affine (Mul and Add) or depthwise (a 1x1
                           Conv).  [default: keep]
  --horizontal             Let operators over one tensor whose outputs are
                           concatenated become one also where parts of its
                           output have to be copied.
  --json                   The same as --report -.
  --report FILE|-          Write what was found, in the form that the ending
                           asks for: .json, .xml (JUnit), .sarif, .md, .html or
                           .txt; with - as JSON to stdout, and any text to
                           stderr. May be given several times.
  --fail-on-kept CODE,...  Exit with 1 when a step stays for one of these
                           reasons (BNF010 or zero-padding).
  --debug                  Show the traceback of an error.
  -h, --help               Show this message and exit.
"""
CHECK_HELP = """\
Usage: bnfold check [OPTIONS] REFERENCE CANDIDATE

  Check that CANDIDATE says the same as REFERENCE on each provider.

Options:
  --provider NAME   Execution provider to check on: cpu, cuda, tensorrt,
                    migraphx, openvino, dml, coreml or its full name; may be
                    given several times.  [default: cpu]
  --tiers A,B,C,D   Which tiers: A stored weights, B every site in float64, C
                    both models on each provider, D decisions there.  [default:
                    A,B,C,D]
  --samples N       How many input samples to draw.  [default: 8; x>=1]
  --seed N          Seed of the samples.  [default: 0; x>=0]
  --inputs PATH     Check on these inputs instead: .npz (arrays by input name),
                    .npy, a test_data_set_0 folder or a folder of such; may be
                    given several times.
  --allow-tf32      Let NVIDIA devices round products of float32 to TF32; the
                    report says so.
  --rtol X          Beside the noise floor: no element may differ by more than
                    atol + rtol * its size.  [x>=0]
  --atol X          See --rtol.  [x>=0]
  --reproducer DIR  Where to write both models, inputs and a script, should the
                    check fail.  [default: for optimize <stem of OUT>.reproducer
                    beside OUT]
  --report FILE|-   Write what was found, in the form that the ending asks for:
                    .json, .xml (JUnit), .sarif, .md, .html or .txt; with - as
                    JSON to stdout, and any text to stderr. May be given several
                    times.
  --debug           Show the traceback of an error.
  -h, --help        Show this message and exit.
"""
REJUDGE_HELP = """\
Usage: bnfold rejudge [OPTIONS] REPORT.json

  Judge what REPORT.json has stored again, under other gates, without running a
  model.

  Without --rtol and --atol the gates of the check stand: the way to have a
  stored report in another form, --report FILE.html.

Options:
  --rtol X         Beside the noise floor: no element may differ by more than
                   atol + rtol * its size.  [x>=0]
  --atol X         See --rtol.  [x>=0]
  --report FILE|-  Write what was found, in the form that the ending asks for:
                   .json, .xml (JUnit), .sarif, .md, .html or .txt; with - as
                   JSON to stdout, and any text to stderr. May be given several
                   times.
  --debug          Show the traceback of an error.
  -h, --help       Show this message and exit.
"""
DOCTOR_HELP = """\
Usage: bnfold doctor [OPTIONS]

  Say which runtimes, providers, devices and libraries are there, and what to
  install.

  Exits with 4 where something stands in the way of a check.

Options:
  --json      As JSON.
  --debug     Show the traceback of an error.
  -h, --help  Show this message and exit.
"""
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "rich", "ml_dtypes")

REPORT = Report(
    "net.onnx",
    "local",
    (
        Step("bn1", "BatchNormalization", "folded", "backward", ("conv1",), sentence="into conv1"),
        Step("bn2", "BatchNormalization", "kept", code="BNF010", reason="zero-padding",
             witness=("conv2",), sentence="its shift can't pass the zeros of conv2"),
    ),
    Size({"BatchNormalization": 2, "Conv": 2}, 100, 400),
    Size({"BatchNormalization": 1, "Conv": 2}, 90, 360),
)  # fmt: skip


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def a_check(verdict: Verdict) -> CheckResult:
    tier = TierResult("C", "CPUExecutionProvider", verdict, f"it is a {verdict.value}")
    return CheckResult("net.onnx", "out.onnx", (tier,), samples=8, seed=0)


WELL = Diagnosis("0.1", "3.11", "Linux", "a CPU", 2, None, {"onnxruntime": "1.31"},
                 "onnxruntime 1.31", (Tried("CPUExecutionProvider", "works", "a CPU"),), (), (),
                 None, "onnx 1.23", "", {})  # fmt: skip
ILL = replace(WELL, problems=(Problem("the oracle does not work", "pip install -U onnx"),))

Fake = Callable[..., dict[str, Any]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replaces the api by one that returns what it is told to, or raises it."""

    def fake(
        verdict: Verdict = Verdict.PASS, error: BaseException | None = None,
        dropped: tuple[str, ...] = (), reproducer: str | None = None,
    ) -> Any:  # fmt: skip
        seen: dict[str, Any] = {}

        def answer(name: str, result: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen[name] = (args, kwargs)
                if error is not None:
                    raise error
                return result

            return call

        check = a_check(verdict)
        found = api.OptimizeResult(REPORT, check, "out.onnx", dropped, reproducer)
        monkeypatch.setattr(rejudging, "rejudge", answer("rejudge", check))
        monkeypatch.setattr(doctoring, "diagnose", answer("doctor", WELL))
        monkeypatch.setattr(cli, "read_report", lambda path: Envelope(check=check))
        monkeypatch.setattr(api, "optimize", answer("optimize", found))
        monkeypatch.setattr(api, "explain", answer("explain", REPORT))
        monkeypatch.setattr(api, "check", answer("check", check))
        return seen

    return fake


COMMANDS = {
    "optimize": ("optimize", "m.onnx"),
    "explain": ("explain", "m.onnx"),
    "check": ("check", "a.onnx", "b.onnx"),
    "rejudge": ("rejudge", "r.json"),
    "doctor": ("doctor",),
}
every_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
REPORTING = {name: command for name, command in COMMANDS.items() if name != "doctor"}
every_reporting = pytest.mark.parametrize("command", REPORTING.values(), ids=REPORTING)


# ---- help ----


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    ("command", "text"),
    [
        ((), GROUP_HELP),
        (("optimize",), OPTIMIZE_HELP),
        (("explain",), EXPLAIN_HELP),
        (("check",), CHECK_HELP),
        (("rejudge",), REJUDGE_HELP),
        (("doctor",), DOCTOR_HELP),
    ],
)
def test_the_help_is(command: tuple[str, ...], text: str, flag: str) -> None:
    result = run(*command, flag)
    assert (result.exit_code, result.stdout) == (0, text)


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"bnfold {bnfold.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["optimize", "-h"],
        ["check", "-h"],
        ["explain", "--nope"],
        ["rejudge", "-h"],
        ["doctor", "-h"],
    ],
)
def test_nothing_heavy_is_loaded_before_a_command_runs(args: list[str]) -> None:
    code = f"""
import sys
from bnfold.cli import main
try:
    main({args})
except SystemExit:
    print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


# ---- exit codes ----


@every_command
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BnfoldError, 1),
        (MismatchError, 1),
        (UsageError, 2),
        (InconclusiveError, 3),
        (ProviderError, 4),
        (ReadError, 5),
        (InvalidModelError, 5),
        (WriteError, 5),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    fake: Fake, command: tuple[str, ...], error: type[BnfoldError], code: int
) -> None:
    fake(error=error("it is broken", file="m.onnx", node="n\x1b[2J", todo="mend it"))
    result = run(*command)
    line = "bnfold: error: m.onnx: node 'n\\x1b[2J': it is broken; mend it\n"
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)


@every_command
def test_a_bug_is_one_line_that_asks_for_a_report(fake: Fake, command: tuple[str, ...]) -> None:
    fake(error=KeyError("bn1"))
    result = run(*command)
    assert (result.exit_code, result.stdout) == (70, "")
    assert result.stderr == (
        "bnfold: internal error: KeyError: 'bn1' "
        "(run with --debug for the traceback, and please report it)\n"
    )


@every_command
def test_an_interrupt_is_one_line(fake: Fake, command: tuple[str, ...]) -> None:
    fake(error=KeyboardInterrupt())
    result = run(*command)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "bnfold: interrupted\n")


@every_command
def test_a_broken_pipe_is_quiet(fake: Fake, command: tuple[str, ...]) -> None:
    fake(error=BrokenPipeError())
    result = run(*command)
    assert (result.exit_code, result.stdout, result.stderr) == (141, "", "")


@every_command
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyError("bn1"), ReadError("it is broken")])
def test_debug_shows_the_traceback_before_and_after_the_command(
    fake: Fake, command: tuple[str, ...], before: bool, error: Exception
) -> None:
    fake(error=error)
    result = run("--debug", *command) if before else run(*command, "--debug")
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.splitlines()[-1].startswith("bnfold: ")
    assert result.exit_code == (5 if isinstance(error, ReadError) else 70)


@pytest.mark.parametrize("command", ["optimize", "check", "rejudge"])
@pytest.mark.parametrize(
    ("verdict", "code"), [(Verdict.PASS, 0), (Verdict.FAIL, 1), (Verdict.INCONCLUSIVE, 3)]
)
def test_the_verdict_is_the_exit_code(
    fake: Fake, command: str, verdict: Verdict, code: int
) -> None:
    fake(verdict)
    result = run(*COMMANDS[command])
    assert result.exit_code == code
    assert f"check: {verdict.value} (8 samples, seed 0)" in result.stdout
    line = f"bnfold: error: out.onnx: it is a {verdict.value}\n"
    assert result.stderr == (line if code else "")


@pytest.mark.parametrize(
    "args",
    [
        ("optimize",),
        ("optimize", "m.onnx", "--level", "deep"),
        ("optimize", "m.onnx", "--samples", "0"),
        ("optimize", "m.onnx", "--fail-on-kept", "BNF999"),
        ("explain", "m.onnx", "--fail-on-kept", "no-such"),
        ("explain", "m.onnx", "--json", "--report", "r.json"),
        ("explain", "m.onnx", "--report", "./m.onnx"),
        ("optimize", "m.onnx", "--report", "m.folded.onnx"),
        ("check", "a.onnx", "b.onnx", "--report", "b.onnx"),
        ("check", "a.onnx"),
        ("check", "a.onnx", "b.onnx", "--report", "r.pdf"),
        ("check", "a.onnx", "b.onnx", "--report", "r.html", "--report", "report"),
        ("check", "a.onnx", "b.onnx", "--rtol", "-1"),
        ("check", "a.onnx", "b.onnx", "--atol", "small"),
        ("check", "a.onnx", "b.onnx", "--seed", "-1"),
        ("check", "a.onnx", "b.onnx", "--level", "max"),
        ("optimize", "m.onnx", "--atol", "-1e-9"),
        ("explain", "m.onnx", "--tiers", "A"),
        ("rejudge",),
        ("rejudge", "r.json", "--report", "./r.json"),
        ("rejudge", "r.json", "--report", "r.pdf"),
        ("rejudge", "r.json", "--provider", "cpu"),
        ("doctor", "cuda"),
        ("bench",),
    ],
)
def test_a_wrong_call_is_exit_2_and_calls_nothing(fake: Fake, args: tuple[str, ...]) -> None:
    seen = fake()
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr
    assert result.stdout == ""
    assert not seen


# ---- what is handed on ----


CHECKING = (
    "--provider", "cuda", "--provider", "cpu", "--tiers", "A,C", "--samples", "3", "--seed", "4",
    "--inputs", "x.npz", "--inputs", "sets", "--allow-tf32", "--rtol", "1e-3", "--atol", "0",
    "--reproducer", "seen",
)  # fmt: skip
CHECKED = {
    "providers": ("cuda", "cpu"), "tiers": "A,C", "samples": 3, "seed": 4,
    "inputs": ["x.npz", "sets"], "allow_tf32": True, "rtol": 1e-3, "atol": 0.0,
    "reproducer": "seen", "on_progress": None,
}  # fmt: skip


def test_the_options_of_optimize_reach_the_api(fake: Fake) -> None:
    seen = fake()
    run("optimize", "dir/m.onnx", "-o", "o.onnx", "--no-check", "--simplify", *CHECKING,
        "--trust-initializers", "--level", "local", "--unshare", "7", "--leftover",
        "affine", "--horizontal")  # fmt: skip
    assert seen["optimize"] == (
        ("dir/m.onnx", "o.onnx"),
        {**CHECKED, "check": False, "level": "local", "simplify": True,
         "trust_initializers": True, "unshare": 7, "leftover": "affine", "horizontal": True},
    )  # fmt: skip


def test_the_options_of_check_and_rejudge_reach_the_api(fake: Fake) -> None:
    seen = fake()
    run("check", "a", "b", *CHECKING)
    run("rejudge", "r.json", "--rtol", "0.5")
    assert seen["check"] == (("a", "b"), CHECKED)
    assert seen["rejudge"] == ((a_check(Verdict.PASS),), {"rtol": 0.5, "atol": None})


def test_the_defaults_are_the_apis(fake: Fake) -> None:
    seen = fake()
    run("optimize", "dir/m.x.onnx")
    run("check", "a", "b")
    run("rejudge", "r.json")
    (source, target), optimized = seen["optimize"]
    assert (source, target) == ("dir/m.x.onnx", str(Path("dir/m.x.folded.onnx")))
    assert tiers_plain(optimized) == defaults(real_api["optimize"])
    assert tiers_plain(seen["check"][1]) == defaults(real_api["check"])
    assert seen["rejudge"][1] == {"rtol": None, "atol": None}


real_api: dict[str, Callable[..., Any]] = {"optimize": api.optimize, "check": api.check}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What the command line can set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters
            if p.default is not p.empty and p.name != "example_inputs"}  # fmt: skip


def tiers_plain(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "tiers": given["tiers"].replace(",", "")}


# ---- what comes out ----


def test_optimize_prints_the_table_the_steps_the_check_and_the_file(fake: Fake) -> None:
    fake()
    lines = run("optimize", "m.onnx", "-o", "out.onnx").stdout.splitlines()
    assert lines[0] == "net.onnx (level local)"
    assert "2 affine steps: 1 folded (1 backward), 1 kept" in lines
    assert "  bn2 (BatchNormalization): its shift can't pass the zeros of conv2" in lines
    assert "check: pass (8 samples, seed 0)" in lines
    assert lines[-1] == "written to out.onnx"


def test_a_failed_check_says_that_nothing_was_written(fake: Fake) -> None:
    fake(Verdict.FAIL)
    result = run("optimize", "m.onnx", "-o", "out.onnx", "--report", "-")
    assert result.stderr.splitlines()[-2:] == [
        "nothing was written to out.onnx: the check did not pass",
        "bnfold: error: out.onnx: it is a fail",
    ]
    assert json.loads(result.stdout)["target"] is None


KEYS = ["schema_version", "tool", "report", "check", "target", "dropped", "reproducer", "bench"]


@pytest.mark.parametrize("verdict", Verdict)
@every_reporting
def test_json_on_stdout_is_alone_there(
    fake: Fake, command: tuple[str, ...], verdict: Verdict
) -> None:
    fake(verdict)
    data = json.loads(run(*command, "--report", "-").stdout)
    assert list(data) == KEYS
    assert (data["report"] is None) == (command[0] in ("check", "rejudge"))
    assert (data["check"] is None) == (command[0] == "explain")


def test_quiet_prints_nothing_but_errors(fake: Fake) -> None:
    fake()
    passed = run("optimize", "m.onnx", "--quiet")
    assert (passed.stdout, passed.stderr) == ("", "")
    fake(Verdict.FAIL)
    failed = run("optimize", "m.onnx", "--quiet")
    assert (failed.stdout, failed.stderr) == ("", "bnfold: error: out.onnx: it is a fail\n")


def test_json_is_short_for_report_dash(fake: Fake) -> None:
    fake()
    short, long = run("explain", "m.onnx", "--json"), run("explain", "m.onnx", "--report", "-")
    assert short.stdout == long.stdout
    assert short.stderr == long.stderr == ""


@pytest.mark.parametrize("command", ["optimize", "explain"])
@pytest.mark.parametrize(
    ("codes", "code"),
    [("BNF010", 1), ("zero-padding", 1), ("bnf001, Zero-Padding", 1), ("BNF001,range", 0)],
)
def test_fail_on_kept_takes_codes_and_names(
    fake: Fake, command: str, codes: str, code: int
) -> None:
    fake()
    result = run(command, "m.onnx", "--fail-on-kept", codes)
    assert result.exit_code == code
    assert ("BNF010 (--fail-on-kept)" in result.stderr) == (code == 1)


def test_a_report_file_is_written_whole(fake: Fake, tmp_path: Path) -> None:
    fake()
    target = tmp_path / "report.json"
    target.write_text("old")
    result = run("optimize", "m.onnx", "-o", "out.onnx", "--report", target)
    assert result.exit_code == 0
    assert json.loads(target.read_text())["target"] == "out.onnx"
    assert list(tmp_path.iterdir()) == [target]


def test_a_report_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx")
    names = [f"r{ending}" for ending in (".html", ".md", ".txt")]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = str(Path(bnfold.__file__).parents[1])
    command = [sys.executable, "-m", "bnfold.cli", "explain", "net.onnx"]
    command += [f"--report={name}" for name in names]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {name: (tmp_path / name).read_text(encoding="utf-8") for name in names}
    assert "·" in written["r.html"]


def test_a_report_file_that_fails_leaves_the_old_one(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    fake()
    target = tmp_path / "report.json"
    target.write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    result = run("explain", "m.onnx", "--report", target)
    assert result.exit_code == 5
    assert result.stderr.startswith(f"bnfold: error: {target}: it can't be written: No space left")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_report_through_a_link_keeps_the_link(fake: Fake, tmp_path: Path) -> None:
    fake()
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    assert run("explain", "m.onnx", "--report", link).exit_code == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["report"]["source"] == "net.onnx"


def test_a_report_to_a_pipe_goes_through_it(fake: Fake, tmp_path: Path) -> None:
    fake()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run("explain", "m.onnx", "--report", pipe).exit_code == 0
    assert json.loads(os.read(reader, 1 << 16))["report"]["source"] == "net.onnx"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_device_gets_json_whatever_it_is_called(fake: Fake) -> None:
    fake()
    assert run("explain", "m.onnx", "--report", os.devnull).exit_code == 0


ENDINGS = {
    ".json": '{\n  "schema_version"', ".xml": "<?xml", ".sarif": '{\n  "$schema"',
    ".sarif.json": '{\n  "$schema"', ".md": "#", ".html": "<!DOCTYPE html>", ".HTML": "<!DOCTYPE",
}  # fmt: skip


@every_reporting
def test_several_reports_have_the_forms_that_their_endings_ask_for(
    fake: Fake, tmp_path: Path, command: tuple[str, ...]
) -> None:
    fake()
    paths = [tmp_path / f"report{ending}" for ending in (*ENDINGS, ".txt")]
    places: list[str | Path] = ["-", *paths, paths[0], "-"]
    asked = [part for place in places for part in ("--report", place)]
    result = run(*command, *asked)
    assert result.exit_code == 0, result.stderr
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path, begin in zip(paths, ENDINGS.values(), strict=False):
        assert path.read_text().startswith(begin), path
    assert json.loads(paths[0].read_text()) == json.loads(result.stdout)
    text = paths[-1].read_text()
    assert ("net.onnx" if command[0] in ("optimize", "explain") else "check: pass") in text


def test_an_ending_without_a_form_names_those_that_have_one(fake: Fake) -> None:
    fake()
    result = run("check", "a.onnx", "b.onnx", "--report", "r.pdf")
    assert result.stderr == (
        "bnfold: error: r.pdf: its ending asks for no format of a report; the endings are "
        ".sarif.json (sarif), .json (json), .xml (junit), .sarif (sarif), .md (markdown), "
        ".html (html), .txt (text)\n"
    )


def test_a_report_is_there_whatever_the_verdict(fake: Fake, tmp_path: Path) -> None:
    for verdict, code in ((Verdict.FAIL, 1), (Verdict.INCONCLUSIVE, 3)):
        fake(verdict)
        for command in ("optimize", "check", "rejudge"):
            path = tmp_path / f"{command}{code}.json"
            assert run(*COMMANDS[command], "--report", path).exit_code == code
            assert json.loads(path.read_text())["check"]["verdict"] == verdict.value


# ---- what was taken back, and where it can be seen ----


def test_optimize_tells_of_folds_that_were_taken_back(fake: Fake) -> None:
    fake(dropped=("bn1", "bn2"), reproducer="out.reproducer")
    result = run("optimize", "m.onnx", "-o", "out.onnx", "--report", "-")
    lines = result.stderr.splitlines()
    told = lines.index("the check failed with 2 folds, which were taken back: bn1, bn2")
    assert lines[told + 1] == f"to see it fail: python {Path('out.reproducer/reproduce.py')}"
    assert lines[told + 2] == "check: pass (8 samples, seed 0)"
    data = json.loads(result.stdout)
    assert (data["dropped"], data["reproducer"]) == (["bn1", "bn2"], "out.reproducer")


@pytest.mark.parametrize("verdict", Verdict)
def test_check_tells_of_a_reproducer_where_it_wrote_one(fake: Fake, verdict: Verdict) -> None:
    fake(verdict)
    result = run("check", "a.onnx", "b.onnx", "--reproducer", "seen", "--report", "-")
    wrote = verdict is Verdict.FAIL
    assert ("to see it fail: python seen" in result.stderr) == wrote
    assert json.loads(result.stdout)["reproducer"] == ("seen" if wrote else None)


# ---- the doctor ----


@pytest.mark.parametrize(("found", "code"), [(WELL, 0), (ILL, 4)])
def test_the_doctor_says_what_stands_in_the_way(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, found: Diagnosis, code: int
) -> None:
    fake()
    monkeypatch.setattr(doctoring, "diagnose", lambda: found)
    text, data = run("doctor"), run("doctor", "--json")
    assert (text.exit_code, data.exit_code) == (code, code)
    assert (text.stderr, data.stderr) == ("", "")
    assert text.stdout.startswith("bnfold 0.1 on Python 3.11\n")
    assert json.loads(data.stdout)["healthy"] == (code == 0)
    assert ("-> pip install -U onnx" in text.stdout) == (code == 4)


# ---- GitHub Actions ----


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The step summary of a runner of GitHub Actions."""
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    return summary


@every_reporting
@pytest.mark.parametrize("verdict", Verdict)
def test_on_github_a_run_is_annotated_and_summed_up(
    fake: Fake, github: Path, command: tuple[str, ...], verdict: Verdict
) -> None:
    fake(verdict, dropped=("bn7",))
    out, piped = run(*command), run(*command, "--report", "-")
    checked = command[0] != "explain"
    notes = [line for line in out.stdout.splitlines() if line.startswith("::")]
    assert notes == [line for line in piped.stderr.splitlines() if line.startswith("::")]
    assert json.loads(piped.stdout)["schema_version"]
    errors = [line for line in notes if line.startswith("::error ")]
    assert len(errors) == (1 if checked and verdict is not Verdict.PASS else 0)
    assert any("::warning " in line and "bn7" in line for line in notes) == (
        command[0] == "optimize"
    )
    assert not [line for line in out.stderr.splitlines() if line.startswith("::")]
    summed = github.read_text()
    assert summed == summed[: len(summed) // 2] * 2  # both runs, one after the other
    assert (verdict.value in summed.lower()) or not checked


@every_command
def test_on_github_what_stops_a_command_is_an_annotation(
    fake: Fake, github: Path, command: tuple[str, ...]
) -> None:
    fake(error=ProviderError("it is not there", file="m.onnx"))
    result = run(*command)
    assert result.exit_code == 4
    first, last = result.stderr.splitlines()
    assert first == "::error file=m.onnx,title=bnfold::m.onnx: it is not there"
    assert last == "bnfold: error: m.onnx: it is not there"
    assert not github.exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(True) as tell:
        assert tell is None
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(False) as tell:
        assert tell is None
    with progress(True) as tell:
        assert tell is not None
        tell("reading [red]a.onnx", None)
        tell("writing", 0.5)
        tell("writing", 1.0)
        tell("checking", 0.0)
    assert "checking" in terminal.getvalue()


def test_progress_is_off_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with progress(True) as tell:
        assert tell is None


@pytest.mark.parametrize(
    ("stream", "environment", "colored"),
    [
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb", "NO_COLOR": ""}, False),
        (io.StringIO, {"TERM": "xterm", "NO_COLOR": ""}, False),
    ],
)
def test_color_is_for_a_terminal_that_wants_it(
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    stream: type[io.StringIO],
    environment: dict[str, str],
    colored: bool,
) -> None:
    fake()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = stream()
    monkeypatch.setattr(sys, "stdout", out)
    main(["explain", "m.onnx"], standalone_mode=False)
    assert "bn2 (BatchNormalization)" in out.getvalue()
    assert ("\x1b[" in out.getvalue()) == colored


# ---- real runs ----


def write_net(path: Path, seed: int = 0) -> Path:
    """Conv -> bn -> relu -> bn -> padded conv: the first bn folds, the second has to stay."""
    rng = np.random.default_rng(seed)
    constants = {
        "w1": rng.normal(0, 1, (4, 3, 3, 3)),
        "w2": rng.normal(0, 1, (2, 4, 3, 3)),
        **{f"{bn}_{part}": rng.uniform(0.5, 2, 4) for bn in ("a", "b") for part in "gbmv"},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["t1"], "conv1"),
        helper.make_node("BatchNormalization", ["t1", "a_g", "a_b", "a_m", "a_v"], ["t2"], "bn1"),
        helper.make_node("Relu", ["t2"], ["t3"], "relu"),
        helper.make_node("BatchNormalization", ["t3", "b_g", "b_b", "b_m", "b_v"], ["t4"], "bn2"),
        helper.make_node("Conv", ["t4", "w2"], ["y"], "conv2", pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 6, 6])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    return path


def test_optimize_folds_checks_and_writes(tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    before = net.read_bytes()
    result = run("optimize", net, "--report", "-")
    assert result.exit_code == 0, result.stderr
    folded = tmp_path / "net.folded.onnx"
    data = json.loads(result.stdout)
    assert data["target"] == str(folded)
    assert data["check"]["verdict"] == "pass"
    assert (data["report"]["folded"], data["report"]["kept"]) == (1, 1)
    assert [node.name for node in onnx.load(folded).graph.node].count("bn1") == 0
    assert f"written to {folded}" in result.stderr
    assert net.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [folded, net]
    assert run("check", net, folded).exit_code == 0


def test_explain_names_each_step_and_changes_nothing(tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    result = run("explain", net)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "fold  bn1 (BatchNormalization): into conv1 before it" in lines
    (kept,) = [line for line in lines if line.startswith("keep  bn2 (BatchNormalization): BNF010")]
    assert "conv2" in kept
    assert list(tmp_path.iterdir()) == [net]
    assert run("explain", net, "--fail-on-kept", "zero-padding").exit_code == 1
    assert run("explain", net, "--fail-on-kept", "shared-weight").exit_code == 0


def test_fail_on_kept_sees_operators_that_stay_apart(tmp_path: Path) -> None:
    text = """g (float[1,4,6,6] x) => (float[1,4,6,6] y)
              { a = Conv<group=4, pads=[1,1,1,1]>(x, u) b = Conv(x, w) y = Add(a, b) }"""
    weights = {"u": np.ones((4, 1, 3, 3), np.float32), "w": np.ones((4, 4, 1, 1), np.float32)}
    net = tmp_path / "net.onnx"
    onnx.save(nets.model(text, weights), net)
    assert run("explain", net, "--fail-on-kept", "grows").exit_code == 1
    assert run("explain", net, "--fail-on-kept", "border").exit_code == 0


def test_another_model_is_a_mismatch_and_the_same_is_inconclusive(tmp_path: Path) -> None:
    net, other = write_net(tmp_path / "net.onnx"), write_net(tmp_path / "other.onnx", seed=1)
    mismatch, same = run("check", net, other), run("check", net, net)
    assert (mismatch.exit_code, same.exit_code) == (1, 3)
    assert mismatch.stderr.count("\n") == same.stderr.count("\n") == 1


def test_an_inconclusive_check_leaves_what_was_at_the_target(tmp_path: Path) -> None:
    net, target = write_net(tmp_path / "net.onnx"), tmp_path / "out.onnx"
    target.write_bytes(b"old")
    result = run("optimize", net, "-o", target, "--samples", "1")
    assert result.exit_code == 3
    assert f"nothing was written to {target}" in result.stdout
    assert target.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [net, target]


def test_faults_of_a_real_call_have_their_exit_codes(tmp_path: Path) -> None:
    net, text = write_net(tmp_path / "net.onnx"), tmp_path / "text.onnx"
    text.write_text("not a model")
    cases: list[tuple[tuple[str | Path, ...], int]] = [
        (("optimize", net, "-o", net), 2),
        (("optimize", net, "--provider", "no-such"), 2),
        (("optimize", net, "--provider", "openvino"), 4),
        (("optimize", tmp_path / "absent.onnx"), 5),
        (("explain", tmp_path), 5),
        (("explain", text), 5),
        (("check", net, tmp_path / "absent.onnx"), 5),
        (("check", net, net, "--tiers", "A,X"), 2),
        (("check", net, net, "--tiers", ""), 2),
        (("check", net, net, "--provider", "openvino", "--tiers", "C"), 4),
        (("check", net, net, "--inputs", tmp_path / "absent.npz"), 5),
        (("rejudge", tmp_path / "absent.json"), 5),
        (("rejudge", text), 2),
        (("optimize", net, "-o", tmp_path / "absent" / "out.onnx"), 5),
        (("explain", net, "--report", tmp_path / "absent" / "r.json"), 5),
    ]
    for args, code in cases:
        result = run(*args)
        assert result.exit_code == code, (args, result.stderr)
        assert result.stderr.startswith("bnfold: error: ")
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [net, text]


def test_a_check_is_stored_and_judged_again(tmp_path: Path) -> None:
    net, stored = write_net(tmp_path / "net.onnx"), tmp_path / "check.json"
    assert run("optimize", net, "--samples", "3").exit_code == 0
    folded = tmp_path / "net.folded.onnx"
    first = run("check", net, folded, "--samples", "3", "--rtol", "1e-9", "--report", stored)
    again, loose = run("rejudge", stored), run("rejudge", stored, "--rtol", "1e-3", "--atol", "1")
    assert (first.exit_code, again.exit_code, loose.exit_code) == (1, 1, 0)
    assert (first.stdout, first.stderr) == (again.stdout, again.stderr)
    assert "gates: rtol 0.001, atol 1" in loose.stdout


def test_without_a_runtime_the_tiers_that_need_none_still_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, folded = write_net(tmp_path / "net.onnx"), tmp_path / "net.folded.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = run("optimize", net)
    assert missing.exit_code == 4
    assert missing.stderr == (
        "bnfold: error: checking needs ONNX Runtime, which is not installed; "
        "pip install 'bnfold[cpu]'\n"
    )
    assert not folded.exists()
    assert run("optimize", net, "--tiers", "A,B").exit_code == 0
    assert folded.exists()
    assert run("check", net, folded, "--tiers", "A,B").exit_code == 0
    assert run("check", net, folded).exit_code == 4


def explain_into(stdout: int, net: Path) -> subprocess.CompletedProcess[str]:
    """Buffered, as for users: what is left in the buffer at the end is what makes Python moan."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "bnfold.cli", "explain", str(net)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered,
    )  # fmt: skip


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = explain_into(write, write_net(tmp_path / "net.onnx"))
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = explain_into(full, write_net(tmp_path / "net.onnx"))
    os.close(full)
    assert done.returncode == 5
    assert done.stderr.startswith("bnfold: error: <stdout>: it can't be written: No space left")
    assert done.stderr.count("\n") == 1


def test_a_pipe_gets_plain_text_that_is_not_cut(tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    command = [sys.executable, "-m", "bnfold.cli", "optimize", str(net), "--no-check"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "40"}
    )
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    (kept,) = [line for line in done.stdout.splitlines() if line.startswith("  bn2 ")]
    assert len(kept) > 60
    assert kept.endswith("every output of conv2 alike (it pads with zeros)")
    assert done.stdout.endswith(f"written to {tmp_path / 'net.folded.onnx'}, not checked\n")


def test_a_provider_is_looked_for_even_where_nothing_runs(tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    folded = tmp_path / "net.folded.onnx"
    assert run("optimize", net).exit_code == 0
    # Nothing is left to fold in it, so that nothing would be run.
    assert (
        run("optimize", folded, "-o", tmp_path / "again.onnx", "--provider", "openvino").exit_code
        == 4
    )
    assert run("optimize", net, "--no-check", "--provider", "openvino").exit_code == 2
    assert run("check", net, folded, "--tiers", "A,B", "--provider", "openvino").exit_code == 2


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    net = write_net(tmp_path / "net.onnx")
    code = (
        "import os, signal, sys; from bnfold import cli, rollback\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGTERM)\n"
        "rollback.Checked._judge = die\n"
        f"sys.argv = ['bnfold', 'optimize', {str(net)!r}]; cli.main(prog_name='bnfold')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
