"""The command line: options in, one call of `bnfold.api`, its result as text or JSON, an exit code.

Nothing heavy is imported before a command runs, so that ``bnfold --help`` does not wait for onnx.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bnfold import __version__
from bnfold.cli_output import (
    Screen,
    abandon_stdout,
    refuse_overwriting,
    show_result,
    write_report,
)
from bnfold.errors import BnfoldError, UsageError
from bnfold.progress import progress
from bnfold.report.text import one_line, render_check, render_explain

if TYPE_CHECKING:
    from bnfold.report.model import Report

INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
_DEBUG = "bnfold.debug"


# ---- what goes wrong ----


class _Guarded(click.Group):
    """Turns what a command raises into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own, with its own words
        except KeyboardInterrupt:
            _stop(ctx, "interrupted", INTERRUPTED)
        except BrokenPipeError:
            abandon_stdout()
            ctx.exit(BROKEN_PIPE)
        except BnfoldError as error:
            _stop(ctx, f"error: {error}", error.exit_code)
        except Exception as error:
            met = f"internal error: {type(error).__name__}: {error}"
            todo = "(run with --debug for the traceback, and please report it)"
            _stop(ctx, f"{met} {todo}", INTERNAL_ERROR)


def _stop(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        traceback.print_exc()
    click.echo(one_line(f"bnfold: {message}"), err=True)
    ctx.exit(exit_code)


# ---- options ----


def _remember_debug(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.meta[_DEBUG] = True


_debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug,
    help="Show the traceback of an error.",
)  # fmt: skip
_level = click.option(
    "--level", type=click.Choice(["max", "local"]), default="max", show_default=True,
    help="How far folds may reach: local stays with direct neighbours.",
)  # fmt: skip
_trust = click.option(
    "--trust-initializers", is_flag=True,
    help="Take initializers that are also graph inputs as constants.",
)  # fmt: skip
_unshare = click.option(
    "--unshare", metavar="BYTES", type=click.IntRange(min=0), default=0,
    help="Let operators that share a weight have their own, up to so many bytes more.",
)  # fmt: skip
_report = click.option(
    "--report", metavar="FILE|-",
    help="Write what was found as JSON; with - to stdout, and any text to stderr.",
)  # fmt: skip
_fail_on_kept = click.option(
    "--fail-on-kept", metavar="CODE,...", default="",
    help="Exit with 1 when a step stays for one of these reasons (BNF010 or zero-padding).",
)  # fmt: skip


def _checking(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a check, named as the arguments of `bnfold.api.check`."""
    count, from_zero = click.IntRange(min=1), click.IntRange(min=0)
    options = (
        click.option(
            "--provider", "providers", metavar="NAME", multiple=True, default=("cpu",),
            show_default=True, help="Execution provider to check on; may be given several times.",
        ),
        click.option(
            "--samples", metavar="N", type=count, default=8, show_default=True,
            help="How many input samples to draw.",
        ),
        click.option(
            "--seed", metavar="N", type=from_zero, default=0, show_default=True,
            help="Seed of the samples.",
        ),
        click.option(
            "--inputs", metavar="FILE.npz",
            help="Check on these inputs instead: arrays by input name.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group("bnfold", cls=_Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bnfold", message="%(prog)s %(version)s")
@_debug
def main() -> None:
    """Fold BatchNorm and every other per-channel affine step of ONNX models.

    Exit codes: 0 done, 1 mismatch or --fail-on-kept, 2 usage, 3 inconclusive,
    4 environment, 5 bad model or file, 70 a bug of bnfold, 130 interrupted.
    """


# ---- commands ----


@main.command(short_help="Fold a model, check it and write it.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Where to write the result.  [default: <stem of MODEL>.folded.onnx beside it]",
)
@click.option("--no-check", is_flag=True, help="Write the result without checking it.")
@_checking
@_level
@click.option("--simplify", is_flag=True, help="Run onnxsim first (pip install bnfold[simplify]).")
@_trust
@_unshare
@_report
@_fail_on_kept
@click.option("--quiet", is_flag=True, help="Print errors only.")
@_debug
def optimize(
    model: str, output: str | None, no_check: bool, report: str | None, fail_on_kept: str,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Fold MODEL, check it against the original, and write the result.

    Nothing is written unless the check passes or is left out.
    """
    target = output or str(Path(model).parent / f"{Path(model).stem}.folded.onnx")
    codes = _codes(fail_on_kept)
    refuse_overwriting(report, model, target)
    from bnfold import api

    with progress(not quiet) as tell:
        result = api.optimize(model, target, check=not no_check, on_progress=tell, **options)
    if not quiet:
        show_result(result, target, Screen.beside(report))
    found = {"report": result.report, "check": result.check}
    write_report(report, target=target if result.written else None, **found)
    if result.check:
        result.check.raise_for_status()
    _fail_if_kept(result.report, codes)


@main.command(short_help="Say of each affine step whether it folds.")
@click.argument("model")
@_level
@_trust
@_unshare
@click.option("--json", "as_json", is_flag=True, help="The same as --report -.")
@_report
@_fail_on_kept
@_debug
def explain(
    model: str, as_json: bool, report: str | None, fail_on_kept: str, **options: Any
) -> None:  # fmt: skip
    """Say of every affine step of MODEL whether it folds, into what, or why not."""
    if as_json and report not in (None, "-"):
        raise UsageError("--json and --report FILE exclude each other")
    report = "-" if as_json else report
    codes = _codes(fail_on_kept)
    refuse_overwriting(report, model)
    from bnfold import api

    found = api.explain(model, **options)
    if report != "-":
        screen = Screen.beside(report)
        screen.show(render_explain(found, color=screen.color, width=screen.width))
    write_report(report, report=found)
    _fail_if_kept(found, codes)


@main.command(short_help="Check that two models say the same.")
@click.argument("reference")
@click.argument("candidate")
@_checking
@_report
@_debug
def check(reference: str, candidate: str, report: str | None, **options: Any) -> None:
    """Check that CANDIDATE says the same as REFERENCE on each provider."""
    refuse_overwriting(report, reference, candidate)
    from bnfold import api

    with progress(True) as tell:
        result = api.check(reference, candidate, on_progress=tell, **options)
    screen = Screen.beside(report)
    screen.show(render_check(result, color=screen.color, width=screen.width))
    write_report(report, check=result)
    result.raise_for_status()


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
    kept = [step.code for step in report.kept if step.code in codes]
    if kept:
        names = ", ".join(sorted(set(kept)))
        raise BnfoldError(f"{len(kept)} of the steps that stay do so for {names} (--fail-on-kept)")


if __name__ == "__main__":
    main(prog_name="bnfold")
