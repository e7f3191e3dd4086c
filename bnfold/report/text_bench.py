"""A benchmark as text for people: the models, then a table for each number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.report import words_bench as words
from bnfold.report.lines import UNCUT, aligned, counted, one_line, paint, wrap

if TYPE_CHECKING:
    from bnfold.report.bench import BenchResult, Setting, Timing

_BOLD = "1"
_COLORS = {"faster": "32", "slower": "31"}
_HEADS = ("", "median, ms", "quartiles", "ratio", "99 % interval")


def render_bench(result: BenchResult, *, color: bool = False, width: int = UNCUT) -> str:
    """How large the models are and how long they take, and what can be told from it.

    Args:
        result: What was measured.
        color: Whether to use ANSI colors.
        width: Columns of the terminal.
    """
    head = paint(f"bench: {counted(len(result.models), 'model')} side by side", _BOLD, color)
    lines = [head, *(wrap(f"  {line}", width) for line in words.conditions(result))]
    rows = [(one_line(model.file), *words.sizes(model)) for model in result.models]
    parts = ["\n".join(lines), aligned([("", *words.SIZES), *rows])]
    return "\n\n".join(parts + [_setting(one, result, color, width) for one in result.settings])


def _setting(setting: Setting, result: BenchResult, color: bool, width: int) -> str:
    names = [one_line(model.file) for model in result.models]
    rows = [_row(name, timing) for name, timing in zip(names, setting.timings, strict=True)]
    title, *lines = aligned([(words.title(setting), *_HEADS[1:]), *rows]).splitlines()
    said = [_said(timing, color) for timing in setting.timings]
    table = [f"{line}  {speed}" for line, speed in zip(lines, said, strict=True)]
    note = wrap(f"  {words.noise(setting)}", width)
    return "\n".join([paint(title, _BOLD, color), *table, note])


def _row(name: str, timing: Timing) -> tuple[str, ...]:
    spread = " .. ".join(map(words.milliseconds, timing.quartiles))
    median = words.milliseconds(timing.median)
    return name, median, spread, words.ratio(timing), words.interval(timing)


def _said(timing: Timing, color: bool) -> str:
    speed = timing.speed.value
    return paint(speed, _COLORS[speed], color) if speed in _COLORS else speed
