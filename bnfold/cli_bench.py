"""``bnfold bench``: options in, one call of `bnfold.api.bench`, a table and reports out."""

from __future__ import annotations

from typing import Any

import click

from bnfold import cli_options as options
from bnfold.cli_output import Reports
from bnfold.errors import UsageError
from bnfold.progress import progress


@click.command(short_help="Time models side by side.")
@click.argument("models", nargs=-1, required=True)
@options.timing
@click.option(
    "--report", "reports", metavar="FILE|-", multiple=True,
    help="Write what was measured, in the form that the ending asks for: .json, .md or .txt; with "
    "- as JSON to stdout, and any text to stderr. May be given several times.",
)  # fmt: skip
@click.option(
    "--fail-if-slower", metavar="PERCENT", type=click.FloatRange(min=0), default=None,
    help="Exit with 1 when a model is slower than the first by more than so much, beyond noise.",
)  # fmt: skip
@options.debug
def bench(
    models: tuple[str, ...], reports: tuple[str, ...], inputs: tuple[str, ...], threads: str,
    fail_if_slower: float | None, **given: Any,
) -> None:  # fmt: skip
    """Time MODELS side by side on ONNX Runtime, with all of its optimisations on.

    The first one is the baseline. All get the same inputs and take turns in one process; what is
    compared is their times within a round, so that a change of the machine's load meets all alike.
    """
    from bnfold.report.bench import require_enough
    from bnfold.report.formats import OF_TIMES

    if fail_if_slower is not None:
        require_enough(given["runs"])
    out = Reports.of(reports, *models, forms=OF_TIMES)
    numbers = _numbers(threads)
    from bnfold import api
    from bnfold.report.envelope import Envelope
    from bnfold.report.text_bench import render_bench

    with progress(True) as tell:
        result = api.bench(*models, threads=numbers, inputs=list(inputs) or None, on_progress=tell,
                           **given)  # fmt: skip
    out.screen.show(render_bench(result, color=out.screen.color, width=out.screen.width))
    out.write(Envelope(bench=result))
    if fail_if_slower is not None:
        result.raise_if_slower(fail_if_slower)


def _numbers(text: str) -> tuple[int, ...]:
    """``1,2`` as numbers; none where nothing is asked for."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"--threads: '{text}' is no list of numbers", todo="write it as 1,2")
    return tuple(map(int, words))
