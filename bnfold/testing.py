"""`assert_same_model`: the check as an assertion, for test suites of any kind.

from bnfold.testing import assert_same_model
assert_same_model("net.onnx", "net.folded.onnx", providers=("cuda",))

The pytest plugin's fixture ``bnfold_check`` says the same, with the session's options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfold.verify.result import CheckResult

REPORTS = (".json", ".md", ".html")  # the last one is for people


def assert_same_model(reference: Any, candidate: Any, **options: Any) -> CheckResult:
    """Checks that ``candidate`` says what ``reference`` says.

    Args:
        reference: The unfolded model, as `bnfold.check` takes it.
        candidate: The folded one, by whatever tool.
        options: Further arguments of `bnfold.check`.

    Returns:
        The passed check, with its figures.

    Raises:
        AssertionError: It does not, or it could not be told: what could not be computed never
            passes. The message has the verdict, the first wrong site and every tier's figures.
        BnfoldError: A model can't be read, or a provider is missing.
    """
    __tracebackhide__ = True
    import bnfold

    check: CheckResult = bnfold.check(reference, candidate, **options)
    require_pass(check)
    return check


def require_pass(check: CheckResult, report: Path | None = None) -> None:
    """Raises an AssertionError that people can read, unless ``check`` is a pass.

    Args:
        check: What was found.
        report: A file that tells more; named in the message.
    """
    __tracebackhide__ = True
    if check.exit_code:
        raise AssertionError(failure(check, report))


def failure(check: CheckResult, report: Path | None = None) -> str:
    """Why ``check`` is no pass, in the words of the command line."""
    from bnfold.report.lines import one_line
    from bnfold.report.text_check import render_check

    lines = [one_line(_headline(check)), render_check(check)]
    return "\n".join([*lines, *([f"  report: {report}"] if report else [])])


def write_reports(check: CheckResult, folder: Path, stem: str) -> Path:
    """Writes ``check`` to ``folder``, with each of the endings `REPORTS`.

    Args:
        check: What was found.
        folder: Made where it is missing.
        stem: Name of the files, without their ending.

    Returns:
        The one for people.
    """
    from bnfold.report.envelope import Envelope
    from bnfold.report.formats import format_of, render

    folder.mkdir(parents=True, exist_ok=True)
    for ending in REPORTS:
        path = folder / f"{stem}{ending}"
        path.write_text(render(format_of(path.name), Envelope(check=check)), encoding="utf-8")
    return path


def _headline(check: CheckResult) -> str:
    from bnfold.verify.judge import Verdict

    if check.verdict is Verdict.FAIL:
        return f"{check.candidate} does not say what {check.reference} says"
    return (
        f"it can't be told whether {check.candidate} says what {check.reference} says, "
        "and what could not be computed never passes"
    )
