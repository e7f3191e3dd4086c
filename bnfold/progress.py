"""A line on stderr that says what is being done, while a person is watching; else nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Tell = Callable[[str, float | None], None]


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads ``stream`` on a terminal that can move its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress(wanted: bool) -> Iterator[Tell | None]:
    """A function to tell the stage and the fraction of it that is done (None where unknown).

    None where progress is not ``wanted`` or stderr is no terminal. The line is erased at the end.
    """
    if not (wanted and is_terminal(sys.stderr)):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    # Stage texts hold names of files, which are not markup.
    stage_text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), stage_text, BarColumn(bar_width=24))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def tell(stage: str, fraction: float | None) -> None:
            total = None if fraction is None else 1.0
            bar.update(line, description=stage, total=total, completed=fraction or 0.0)

        yield tell
