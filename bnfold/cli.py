"""The command line: options in, one call of `bnfold.api`, text and reports out, an exit code.

Nothing heavy is imported before a command runs, so that ``bnfold --help`` does not wait for onnx.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bnfold import __version__
from bnfold import cli_options as options
from bnfold.ci import announce_error
from bnfold.cli_bench import bench
from bnfold.cli_output import (
    Reports,
    Screen,
    abandon_stdout,
    read_report,
    reproduced,
    show_result,
)
from bnfold.errors import BnfoldError, ProviderError, UsageError
from bnfold.progress import progress
from bnfold.report.lines import one_line
from bnfold.report.text import render_explain
from bnfold.report.text_check import render_check

if TYPE_CHECKING:
    from bnfold.report.envelope import Envelope
    from bnfold.report.model import Report

INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


# ---- what goes wrong ----


class _Guarded(click.Group):
    """Turns what a command raises into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _told_to_stop():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own, with its own words
        except KeyboardInterrupt:
            _stop(ctx, "interrupted", INTERRUPTED)
        except BrokenPipeError:
            abandon_stdout()
            ctx.exit(BROKEN_PIPE)
        except BnfoldError as error:
            announce_error(error, stdout=sys.stderr)
            _stop(ctx, f"error: {error}", error.exit_code)
        except Exception as error:
            met = f"internal error: {type(error).__name__}: {error}"
            todo = "(run with --debug for the traceback, and please report it)"
            _stop(ctx, f"{met} {todo}", INTERNAL_ERROR)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM unwinds like an exception, so that nothing half-written is left behind."""

    def leave(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    if ctx.meta.get(options.DEBUG):
        traceback.print_exc()
    click.echo(one_line(f"bnfold: {message}"), err=True)
    ctx.exit(exit_code)


# ---- commands ----


@click.group("bnfold", cls=_Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bnfold", message="%(prog)s %(version)s")
@options.debug
def main() -> None:
    """Fold BatchNorm and every other per-channel affine step of ONNX models.

    Exit codes: 0 done, 1 mismatch, --fail-on-kept or --fail-if-slower, 2 usage,
    3 inconclusive, 4 environment, 5 bad model or file, 70 a bug of bnfold, 130 interrupted.
    """


main.add_command(bench)


@main.command(short_help="Fold a model, check it and write it.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Where to write the result.  [default: <stem of MODEL>.folded.onnx beside it]",
)
@click.option("--no-check", is_flag=True, help="Write the result without checking it.")
@options.checking
@options.level
@click.option("--simplify", is_flag=True, help="Run onnxsim first (pip install bnfold[simplify]).")
@options.trust
@options.unshare
@options.leftover
@options.horizontal
@options.report
@options.fail_on_kept
@click.option("--quiet", is_flag=True, help="Print errors only.")
@options.debug
def optimize(
    model: str, output: str | None, no_check: bool, reports: tuple[str, ...], fail_on_kept: str,
    quiet: bool, inputs: tuple[str, ...], **given: Any,
) -> None:  # fmt: skip
    """Fold MODEL, check it against the original, and write the result.

    Nothing is written unless the check passes or is left out. A fold with which it fails is taken
    back; the rest is kept and checked again.
    """
    target = output or str(Path(model).parent / f"{Path(model).stem}.folded.onnx")
    codes = _codes(fail_on_kept)
    out = Reports.of(reports, model, target)
    from bnfold import api
    from bnfold.report.envelope import Envelope

    with progress(not quiet) as tell:
        result = api.optimize(model, target, check=not no_check, inputs=list(inputs) or None,
                              on_progress=tell, **given)  # fmt: skip
    if not quiet:
        show_result(result, target, out.screen)
    written = target if result.written else None
    out.write(Envelope(result.report, result.check, written, result.dropped, result.reproducer))
    if result.check:
        result.check.raise_for_status()
    _fail_if_kept(result.report, codes)


@main.command(short_help="Say of each affine step whether it folds.")
@click.argument("model")
@options.level
@options.trust
@options.unshare
@options.leftover
@options.horizontal
@click.option("--json", "as_json", is_flag=True, help="The same as --report -.")
@options.report
@options.fail_on_kept
@options.debug
def explain(
    model: str, as_json: bool, reports: tuple[str, ...], fail_on_kept: str, **given: Any
) -> None:
    """Say of every affine step of MODEL whether it folds, into what, or why not."""
    if as_json and any(report != "-" for report in reports):
        raise UsageError("--json and --report FILE exclude each other")
    codes = _codes(fail_on_kept)
    out = Reports.of(("-",) if as_json else reports, model)
    from bnfold import api
    from bnfold.report.envelope import Envelope

    found = api.explain(model, **given)
    if not out.on_stdout:
        out.screen.show(render_explain(found, color=out.screen.color, width=out.screen.width))
    out.write(Envelope(found))
    _fail_if_kept(found, codes)


@main.command(short_help="Check that two models say the same.")
@click.argument("reference")
@click.argument("candidate")
@options.checking
@options.report
@options.debug
def check(
    reference: str, candidate: str, reports: tuple[str, ...], inputs: tuple[str, ...],
    reproducer: str | None, **given: Any,
) -> None:  # fmt: skip
    """Check that CANDIDATE says the same as REFERENCE on each provider."""
    out = Reports.of(reports, reference, candidate)
    from bnfold import api
    from bnfold.report.envelope import Envelope

    with progress(True) as tell:
        result = api.check(reference, candidate, inputs=list(inputs) or None,
                           reproducer=reproducer, on_progress=tell, **given)  # fmt: skip
    failed = result.verdict.value == "fail"  # else no reproducer was written
    _show_check(Envelope(check=result, reproducer=reproducer if failed else None), out)


@main.command(short_help="Judge a stored report again.")
@click.argument("stored", metavar="REPORT.json")
@options.gates
@options.report
@options.debug
def rejudge(stored: str, reports: tuple[str, ...], **given: Any) -> None:
    """Judge what REPORT.json has stored again, under other gates, without running a model.

    Without --rtol and --atol the gates of the check stand: the way to have a stored report in
    another form, --report FILE.html.
    """
    out = Reports.of(reports, stored)
    from bnfold.verify.rejudge import rejudge as judge

    found = read_report(stored)
    if found.check is None:
        met = "there is no check in it"
        raise UsageError(met, file=stored, todo="give the report of a check")
    _show_check(replace(found, check=judge(found.check, **given)), out)


@main.command(short_help="Say what this machine can check on.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@options.debug
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say which runtimes, providers, devices and libraries are there, and what to install.

    Exits with 4 where something stands in the way of a check.
    """
    import json

    from bnfold.report.doctor_text import render_doctor
    from bnfold.verify.doctor import diagnose

    found, screen = diagnose(), Screen.of(err=False)
    text = json.dumps(found.to_dict(), indent=2) if as_json else render_doctor(
        found, color=screen.color, width=screen.width
    )  # fmt: skip
    screen.show(text)
    if not found.healthy:
        ctx.exit(ProviderError.exit_code)


def _show_check(found: Envelope, out: Reports) -> None:
    assert found.check is not None
    out.screen.show(render_check(found.check, color=out.screen.color, width=out.screen.width))
    if found.reproducer is not None:
        out.screen.show(reproduced(found.reproducer))
    out.write(found)
    found.check.raise_for_status()


# ---- --fail-on-kept ----


def _codes(text: str) -> frozenset[str]:
    """The reason codes of ``--fail-on-kept``, each given as a code or as its name."""
    if not text:
        return frozenset()
    from bnfold.planning import Reason

    known = {name: reason.code for reason in Reason for name in (reason.code, reason.slug)}
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name.upper() not in known and name.lower() not in known:
            raise UsageError(
                f"--fail-on-kept: there is no reason '{name}'",
                todo=f"the reasons are {', '.join(f'{r.code} {r.slug}' for r in Reason)}",
            )
    return frozenset(known.get(name.upper()) or known[name.lower()] for name in wanted)


def _fail_if_kept(report: Report, codes: frozenset[str]) -> None:
    kept = [step.code for step in (*report.kept, *report.apart) if step.code in codes]
    if kept:
        names = ", ".join(sorted(set(kept)))
        raise BnfoldError(f"{len(kept)} of the steps that stay do so for {names} (--fail-on-kept)")


if __name__ == "__main__":
    main(prog_name="bnfold")
