"""What GitHub Actions shows of a run: annotations, and the summary of the step.

Written only where ``GITHUB_ACTIONS`` is ``true``. The words are `bnfold.report.github`'s. Neither
changes the outcome: a summary that can't be written is a warning in the log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bnfold.errors import InconclusiveError, MismatchError
from bnfold.report.lines import encodable

if TYPE_CHECKING:
    from bnfold.errors import BnfoldError
    from bnfold.report.envelope import Envelope


def announce(found: Envelope, *, environ: Mapping[str, str] = os.environ, stdout: TextIO) -> None:
    """Writes annotations to ``stdout`` and appends to the step's summary, on GitHub Actions.

    Args:
        found: What the command found.
        environ: The process's environment.
        stdout: Where annotations go: stderr where stdout carries the JSON.
    """
    if not on_github(environ):
        return
    from bnfold.report.github import step_summary, workflow_commands

    _print(workflow_commands(found), stdout)
    path = environ.get("GITHUB_STEP_SUMMARY")
    if path:
        _print(_appended(path, step_summary(found)), stdout)


def announce_error(
    error: BnfoldError, *, environ: Mapping[str, str] = os.environ, stdout: TextIO
) -> None:
    """Writes an annotation of what stopped the run, on GitHub Actions.

    A verdict that is raised (`CheckResult.raise_for_status`) has been told by `announce`.

    Args:
        error: What stopped it; its own line has been printed.
        environ: The process's environment.
        stdout: Where annotations go.
    """
    if not on_github(environ) or isinstance(error, MismatchError | InconclusiveError):
        return
    from bnfold.report.github import command

    _print([command("error", error.file, "bnfold", str(error))], stdout)


def on_github(environ: Mapping[str, str]) -> bool:
    """Whether a runner of GitHub Actions, or one that behaves like it, runs this."""
    return environ.get("GITHUB_ACTIONS") == "true"


def _print(lines: Iterable[str], stdout: TextIO) -> None:
    for line in lines:
        print(encodable(line, stdout), file=stdout, flush=True)


def _appended(path: str, text: str) -> list[str]:
    """Nothing, or the warning that the summary is not there."""
    try:
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.write(text.rstrip("\n") + "\n\n")
    except OSError as error:
        why = error.strerror or type(error).__name__
        return [f"::warning title=bnfold::the step summary can't be written: {why}"]
    return []
