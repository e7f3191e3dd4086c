"""A benchmark as Markdown: one table that fits a README, and below it how it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.report import words_bench as words
from bnfold.report.markdown import code, escaped, table

if TYPE_CHECKING:
    from bnfold.report.bench import BenchResult, Timing

_SIGNS = {"faster": " ▼", "slower": " ▲", "no difference beyond noise": " ≈", "unclear": " ?"}


def bench_markdown(result: BenchResult) -> str:
    """``result`` as Markdown."""
    heads = ["model", *words.SIZES]
    for setting in result.settings:
        heads += [f"{words.title(setting)}, ms", "ratio"]
    rows = []
    for index, model in enumerate(result.models):
        cells = [code(model.file), *words.sizes(model)]
        for setting in result.settings:
            timing = setting.timings[index]
            cells += [words.milliseconds(timing.median), _ratio(timing)]
        rows.append(cells)
    signs = "▼ faster, ▲ slower, ≈ no difference beyond noise, ? unclear."
    notes = [escaped(line) for line in words.conditions(result)]
    notes += [escaped(f"{words.title(one)}: {words.noise(one)}") for one in result.settings]
    parts = ["### bnfold: latency", table(heads, rows, "l" + "r" * (len(heads) - 1)), signs]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes)]) + "\n"


def _ratio(timing: Timing) -> str:
    sign = _SIGNS.get(timing.speed.value, "")
    bounds = "" if timing.interval is None else f" ({words.interval(timing)})"
    return f"{words.ratio(timing)}{sign}{bounds}"
