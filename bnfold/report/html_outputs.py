"""The sections of the page that show tier C: each output's errors, provider beside provider."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.html_charts import DASHES, DOT, RING, diamond, error_chart
from bnfold.report.html_parts import code, esc, legend, mark, section, swatch, table

if TYPE_CHECKING:
    from bnfold.verify.judge import Measured
    from bnfold.verify.result import CheckResult, Mutation, OutputResult

# More pictures than these nobody looks at; the ones that matter most come first.
OUTPUTS = 24
_ORDER = {"fail": 0, "pass": 1, "inconclusive": 2}


def errors_section(check: CheckResult) -> str:
    """A card for each output on each provider; empty where tier C compared none."""
    found = _by_output(check)
    providers = list(dict.fromkeys(place for beside in found.values() for place in beside))
    if not providers:
        return ""
    most = max(1, OUTPUTS // len(providers))
    rows = sorted(found.values(), key=_first)
    about = (
        "Relative error against the float64 oracle, sample by sample. The fold is right as long as "
        "its dots keep to the rings: the dashed line is twice what the runtime itself gets wrong, "
        "the limit of their mean; a single sample may be at four times."
    )
    if len(rows) > most:
        about += f" {len(rows) - most:,} more outputs are in the JSON report."
    keys = [(swatch(DOT), "after folding"), (swatch(RING), "before folding"),
            (swatch(DASHES), "2 × the noise floor"),
            (swatch(diamond(11, 6, 5, "over")), "above it")]  # fmt: skip
    cards = ["".join(_card(*one, beside) for one in beside.items()) for beside in rows[:most]]
    where = ", provider beside provider"
    if len(providers) == 1:
        cards, where = ["".join(cards)], f" on {providers[0]}" if providers[0] else ""
    grids = (f'<div class="cards">{row}</div>' for row in cards)
    return section(f"Error of each output{where}", about, legend(keys), *grids)


def _by_output(check: CheckResult) -> dict[str, dict[str, OutputResult]]:
    """Every output of tier C, by its name and then by provider."""
    found: dict[str, dict[str, OutputResult]] = {}
    for tier in check.tiers:
        for output in tier.outputs if tier.tier == "C" else ():
            found.setdefault(output.output, {})[tier.provider] = output
    return found


def _first(beside: Mapping[str, OutputResult]) -> tuple[int, bool]:
    """What failed on some provider comes first, what has no picture last."""
    worst = min(_ORDER[output.verdict.value] for output in beside.values())
    return worst, not any(map(_drawn, beside.values()))


def _drawn(output: OutputResult) -> Measured | None:
    """What a picture of ``output`` shows; None where there is nothing to show."""
    measured = output.measured
    return measured if measured is not None and measured.e_fold and measured.e_unfold else None


def _card(provider: str, output: OutputResult, beside: Mapping[str, OutputResult]) -> str:
    name = code(output.output)
    if len(beside) > 1:
        short = provider.removesuffix("ExecutionProvider")
        name = f'<span>{name} <span class="soft">on {esc(short)}</span></span>'
    measured = _drawn(output)
    # One axis for all, or the eye compares what can't be compared.
    others = [found for one in beside.values() if (found := _drawn(one)) is not None]
    chart = error_chart(measured, others) if measured is not None else ""
    head = f"<h3>{name} {mark(output.verdict.value)}</h3>"
    return f'<div class="card">{head}{chart}<p>{_figures(output)}</p></div>'


def _figures(output: OutputResult) -> str:
    figures = output.figures
    if figures is None or output.verdict.value != "pass":
        return esc(output.message)
    said = (
        f"error {words.number(figures.e_fold)} after, {words.number(figures.e_unfold)} before; "
        f"{figures.mean_ratio:.2f} × the floor"
    )
    if math.isfinite(figures.caught):
        said += f"; would catch {words.number(figures.caught)}"
    return esc(said)


# ---- mutants ----


def mutations_section(mutations: Sequence[Mutation]) -> str:
    """What tier C flags of mutants; empty where there were none."""
    if not mutations:
        return ""
    about = (
        "Without a tier B that says what it would have caught, a weight of the candidate was "
        "spoilt on purpose: this is the smallest relative error of it that tier C still flags."
    )
    rows = [(code(m.weight), esc(m.provider), words.number(m.caught)) for m in mutations]
    return section("Mutants", about, table(("weight", "on", "would catch"), rows, (2,), "compact"))
