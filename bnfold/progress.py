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
        lines = {"": bar.add_task("starting", total=None)}

        def tell(stage: str, fraction: float | None) -> None:
            # A line for each stage: one that was complete can't start to move again.
            if stage not in lines:
                bar.remove_task(lines.popitem()[1])
                lines[stage] = bar.add_task(stage, total=None)
            if fraction is not None:
                bar.update(lines[stage], total=1.0, completed=fraction)

        yield tell
