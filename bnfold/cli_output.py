"""What the command line puts out: text on the screen, reports in files and on stdout."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnfold.ci import announce
from bnfold.errors import ReadError, UsageError, WriteError
from bnfold.progress import is_terminal
from bnfold.report.lines import UNCUT, counted, encodable, one_line
from bnfold.report.text import render_outcome, render_report
from bnfold.report.text_check import render_check
from bnfold.report.words import some

if TYPE_CHECKING:
    from bnfold.api import OptimizeResult
    from bnfold.report.envelope import Envelope


def abandon_stdout() -> None:
    """What is left in the buffer goes nowhere, or Python complains of it when it exits."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True, slots=True)
class Screen:
    """Where text for people goes, and what it can show."""

    err: bool
    color: bool
    width: int

    @classmethod
    def of(cls, *, err: bool) -> Screen:
        """Stdout, or stderr, as people see it."""
        if not is_terminal(sys.stderr if err else sys.stdout):
            return cls(err, color=False, width=UNCUT)
        color = not os.environ.get("NO_COLOR")
        return cls(err, color, shutil.get_terminal_size().columns)

    def show(self, text: str) -> None:
        """Print ``text`` and a line end."""
        stream = sys.stderr if self.err else sys.stdout
        try:
            click.echo(encodable(text, stream), err=self.err, color=self.color)
        except BrokenPipeError:
            raise
        except OSError as error:
            abandon_stdout()
            raise _unwritable("<stdout>", error) from error


def show_result(result: OptimizeResult, target: str, screen: Screen) -> None:
    """The model before and after, the check, and where the file is."""
    report, check = result.report, result.check
    screen.show(render_report(report, color=screen.color, width=screen.width) + "\n")
    if result.dropped:
        screen.show(_taken_back(result.dropped))
    if result.reproducer is not None:
        screen.show(reproduced(result.reproducer))
    if check:
        screen.show(render_check(check, color=screen.color, width=screen.width))
    checked, folded = check is not None, report.changed
    screen.show(render_outcome(target, written=result.written, checked=checked, folded=folded))


def reproduced(folder: str) -> str:
    """Where what failed can be seen again."""
    script = Path(folder) / "reproduce.py"
    return one_line(f"to see it fail: python {script}")


def _taken_back(dropped: Sequence[str]) -> str:
    """Said before the check that is shown: that is of what is left."""
    were = "was" if len(dropped) == 1 else "were"
    folds = counted(len(dropped), "fold")
    return one_line(f"the check failed with {folds}, which {were} taken back: {some(dropped)}")


@dataclass(frozen=True, slots=True)
class Reports:
    """Where what is found goes: files by the form that their ending asks for, and stdout.

    Attributes:
        paths: The files; ``-`` is stdout.
    """

    paths: tuple[str, ...]

    @classmethod
    def of(cls, paths: Sequence[str], *models: str, forms: Collection[str] = ()) -> Reports:
        """The reports that were asked for.

        Args:
            paths: Where they are to be.
            models: What must not be overwritten.
            forms: The forms that the command has; all where empty.

        Raises:
            UsageError: One would overwrite a model, or its ending asks for no form.
        """
        from bnfold.report.formats import FORMATS, format_of

        for path in paths:
            _refuse_overwriting(path, *models)
            if not _is_device(path):
                format_of(path, forms or FORMATS)
        return cls(tuple(dict.fromkeys(paths)))

    @property
    def on_stdout(self) -> bool:
        """Whether stdout carries the JSON."""
        return "-" in self.paths

    @property
    def screen(self) -> Screen:
        """Where text for people goes: stdout, unless that carries the JSON."""
        return Screen.of(err=self.on_stdout)

    def write(self, found: Envelope) -> None:
        """Write what was found, each file as a whole or not at all; tell GitHub, if it is there."""
        from bnfold.report.formats import format_of, render

        announce(found, stdout=sys.stderr if self.on_stdout else sys.stdout)
        for path in self.paths:
            text = render("json" if _is_device(path) else format_of(path), found)
            if path == "-":
                Screen(err=False, color=False, width=UNCUT).show(text)
                continue
            try:
                _write_whole(Path(path), text + "\n")
            except OSError as error:
                raise _unwritable(path, error) from error


def _is_device(path: str) -> bool:
    """A pipe or a device has no ending; it gets JSON."""
    return path != "-" and Path(path).exists() and not Path(path).is_file()


def read_report(path: str) -> Envelope:
    """What ``--report FILE.json`` wrote.

    Raises:
        ReadError: It can't be read.
        UsageError: It is no such report.
    """
    from bnfold.report.envelope import envelope_from_json

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ReadError(f"it can't be read: {why}", file=path) from error
    return envelope_from_json(text, path)


def _write_whole(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # a pipe or a device: replaced, it would be gone
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")  # as the page and the XML say of themselves
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _unwritable(path: str, error: OSError) -> WriteError:
    met = f"it can't be written: {error.strerror or error}"
    return WriteError(met, file=path, todo="choose another place for the report")


def _refuse_overwriting(report: str, *models: str) -> None:
    """A report at the place of a model, or of the report that is judged again, destroys it."""
    if report == "-":
        return
    for model in models:
        if os.path.realpath(report) == os.path.realpath(model):
            raise UsageError("the report would overwrite what it is about", file=report,
                             todo="choose another file for --report")  # fmt: skip
