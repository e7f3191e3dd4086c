"""Runs the steps of ``action.yml`` as GitHub's runner does, with a real Python or a stub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]

# In place of Python: writes down how it was called, and makes what `-m venv` makes. Each argument
# ends with a zero byte, each call with an empty argument.
STUB = """#!/bin/sh
printf '%s\\0' "$@" '' >> "$STUB_LOG"
case " $* " in
  *" -m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *" -c "*) exit "${STUB_C:-0}" ;;
  *" pip "*) exit "${STUB_PIP:-0}" ;;
  *" bnfold.cli "*) exit "${STUB_CLI:-0}" ;;
esac
"""


@dataclass(frozen=True)
class Ran:
    code: int
    log: str
    outputs: Mapping[str, str]
    summary: str
    calls: tuple[list[str], ...]

    def call(self, word: str) -> list[str]:
        (found,) = (call for call in self.calls if word in call)
        return found


def run_action(folder: Path, inputs: Mapping[str, str], **environ: str) -> Ran:
    """Run every step until one fails, and tell what the action leaves behind."""
    assert not set(inputs) - set(ACTION["inputs"])
    known = {f"inputs.{name}": spec["default"] for name, spec in ACTION["inputs"].items()}
    known |= {f"inputs.{name}": value for name, value in inputs.items()}
    temp, calls = folder / "runner temp", folder / "calls"
    shutil.rmtree(temp, ignore_errors=True)
    calls.unlink(missing_ok=True)
    temp.mkdir()
    summary = temp / "summary.md"
    code, log = 0, ""
    for number, step in enumerate(STEPS):
        if code or not evaluated(step.get("if", "${{ 'true' }}"), known):
            continue
        script, output = temp / f"step{number}.sh", temp / f"output{number}"
        script.write_text(step["run"])
        env = os.environ | {name: evaluated(value, known) for name, value in step["env"].items()}
        env |= {
            "GITHUB_ACTIONS": "true", "GITHUB_ACTION_PATH": str(ROOT), "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(temp),
            "STUB_LOG": str(calls), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=folder, env=env | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        code, log = done.returncode, log + done.stdout
        found = written(output)
        known |= {f"steps.{step['id']}.outputs.{name}": value for name, value in found.items()}
    outputs = {name: evaluated(spec["value"], known) for name, spec in ACTION["outputs"].items()}
    told = summary.read_text() if summary.exists() else ""
    return Ran(code, log, outputs, told, recorded(calls))


def evaluated(text: str, known: Mapping[str, str]) -> str:
    """The one expression that ``text`` is: a || b, a != b, names and quoted words."""
    match = re.fullmatch(r"\$\{\{ (.*) \}\}", text)
    assert match, text
    if " != " in match[1]:
        one, other = (operand(part, known) for part in match[1].split(" != "))
        return "true" if one != other else ""
    return next(filter(None, (operand(part, known) for part in match[1].split(" || "))), "")


def operand(text: str, known: Mapping[str, str]) -> str:
    if text.startswith("'"):
        return text.strip("'")
    return known.get(text, "") if text.startswith("steps.") else known[text]


def written(path: Path) -> dict[str, str]:
    """What a step wrote to GITHUB_OUTPUT, in either of its two forms."""
    text = path.read_text() if path.exists() else ""
    many = {m[1]: m[3] for m in re.finditer(r"^([\w-]+)<<(.+)\n((?s:.*?))\n\2$", text, re.M)}
    return many or dict(line.split("=", 1) for line in text.splitlines())


def recorded(path: Path) -> tuple[list[str], ...]:
    text = path.read_text() if path.exists() else ""
    return tuple(call.split("\0") for call in text.split("\0\0")[:-1])
