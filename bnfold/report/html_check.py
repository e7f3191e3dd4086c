"""The sections of the page that show a check: tiers, errors, sites, weights, conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.html_charts import diamond, error_chart, sites_chart, weight_chart
from bnfold.report.html_parts import (
    code,
    esc,
    legend,
    mark,
    pairs,
    section,
    swatch,
    table,
)

if TYPE_CHECKING:
    from bnfold.verify.result import (
        CheckResult,
        OutputResult,
        SiteResult,
        TierResult,
        WeightRange,
    )

# More pictures than these nobody looks at; the ones that matter most come first.
OUTPUTS, SITES, WEIGHTS = 24, 12, 48
_ORDER = {"fail": 0, "pass": 1, "inconclusive": 2}
_DOT = '<circle class="after" cx="11" cy="6" r="4"/>'
_RING = '<circle class="before" cx="11" cy="6" r="4.5"/>'
_DASHES = '<path class="limit" d="M0 6H22"/>'


def check_sections(check: CheckResult) -> list[str]:
    """Everything that a check found, the verdict apart."""
    found = [_tiers(check), _warnings(check)]
    found += [_errors(tier) for tier in check.tiers if tier.tier == "C" and tier.outputs]
    found += [_sites(tier, check.guilty) for tier in check.tiers if tier.sites]
    found.append(_weights(check.weights))
    return [part for part in found if part]


def _tiers(check: CheckResult) -> str:
    rows = [
        (
            f"<b>{esc(tier.tier)}</b> {esc(words.TIERS.get(tier.tier, ''))}",
            esc(tier.provider), mark(tier.verdict.value),
            esc(tier.message), words.number(tier.caught) if tier.caught is not None else "",
        )
        for tier in check.tiers
    ]  # fmt: skip
    about = "Four tiers, from cheap to dear; the worst one speaks."
    return section("Tiers", about, _tier_table(rows))


def _tier_table(rows: Sequence[Sequence[str]]) -> str:
    return table(("tier", "on", "verdict", "found", "would catch"), rows, (4,), "tiers stack")


def _warnings(check: CheckResult) -> str:
    if not check.warnings:
        return ""
    items = "".join(f"<li>{esc(warning)}</li>" for warning in check.warnings)
    return section("Worth knowing", "", f'<ul class="plain">{items}</ul>')


# ---- tier C ----


def _errors(tier: TierResult) -> str:
    shown = sorted(tier.outputs, key=_first)[:OUTPUTS]
    hidden = len(tier.outputs) - len(shown)
    about = (
        "Relative error against the float64 oracle, sample by sample. The fold is right as long as "
        "its dots keep to the rings: the dashed line is twice what the runtime itself gets wrong."
    )
    if hidden:
        about += f" {hidden:,} more outputs are in the JSON report."
    keys = [(swatch(_DOT), "after folding"), (swatch(_RING), "before folding"),
            (swatch(_DASHES), "2 × the noise floor"),
            (swatch(diamond(11, 6, 5, "over")), "above it")]  # fmt: skip
    cards = "".join(map(_output, shown))
    title = f"Error of each output on {tier.provider}" if tier.provider else "Error of each output"
    return section(title, about, legend(keys), f'<div class="cards">{cards}</div>')


def _first(output: OutputResult) -> tuple[int, bool]:
    """What failed comes first, what has no picture last."""
    return _ORDER[output.verdict.value], not _is_drawn(output)


def _is_drawn(output: OutputResult) -> bool:
    measured = output.measured
    return measured is not None and bool(measured.e_fold) and bool(measured.e_unfold)


def _output(output: OutputResult) -> str:
    head = f"<h3>{code(output.output)} {mark(output.verdict.value)}</h3>"
    measured = output.measured
    chart = error_chart(measured) if measured is not None and _is_drawn(output) else ""
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


# ---- tier B ----


def _sites(tier: TierResult, guilty: str) -> str:
    wrong = [site for site in tier.sites if site.verdict.value != "pass"]
    about = (
        f"{len(tier.sites):,} operators on real activations, in float64 with the stored weights: "
        f"{len(wrong):,} of them off by more than rounding explains or not computable. "
        "The dashed line is what rounding the weights explains."
    )
    keys = [(swatch(_DOT), "error of a site"), (swatch(_DASHES), "what rounding explains"),
            (swatch(diamond(11, 6, 5, "over")), "fails"),
            (swatch(diamond(11, 6, 5, "unsure")), "inconclusive")]  # fmt: skip
    first = next((site.site for site in wrong if site.verdict.value == "fail"), "")
    chart = sites_chart(tier.sites, guilty or first)
    picture = f'<div class="scroll" tabindex="0">{chart}</div>'
    return section("Error along the graph", about, legend(keys), picture, _wrong(wrong))


def _wrong(sites: Sequence[SiteResult]) -> str:
    if not sites:
        return ""
    rows = [
        (
            f'{code(site.site)} <span class="soft">{esc(site.op_type)}</span>',
            mark(site.verdict.value), words.number(site.error), words.number(site.bound),
            f"{words.times(site.ratio)} ×", "" if site.channel is None else str(site.channel),
        )
        for site in sites[:SITES]
    ]  # fmt: skip
    heads = ("site", "verdict", "error", "bound", "ratio", "channel")
    hidden = len(sites) - SITES
    more = f'<p class="soft small">and {hidden:,} more</p>' if hidden > 0 else ""
    return table(heads, rows, (2, 3, 4, 5), "stack") + more


# ---- weights ----


def _weights(weights: Sequence[WeightRange]) -> str:
    if not weights:
        return ""
    shown = sorted(weights, key=_change, reverse=True)[:WEIGHTS]
    about = "The largest absolute value of each output channel. "
    about += "The weights whose range changed most come first."
    if len(weights) > WEIGHTS:
        about += f" {len(weights) - WEIGHTS:,} more are in the JSON report."
    keys = [(swatch('<path class="line-before" d="M0 6H22"/>'), "before folding"),
            (swatch('<path class="line-after" d="M0 6H22"/>'), "after folding")]  # fmt: skip
    cards = "".join(map(_weight, shown))
    return section("Weights by channel", about, legend(keys),
                   f'<div class="cards small-ones">{cards}</div>')  # fmt: skip


def _weight(weight: WeightRange) -> str:
    if not (weight.before or weight.after):
        return ""
    before, after = _spread(weight.before), _spread(weight.after)
    said = f"largest over smallest channel: {before} before, {after} after"
    chart = weight_chart(weight)
    return f'<div class="card"><h3>{code(weight.tensor)}</h3>{chart}<p>{esc(said)}</p></div>'


def _spread(values: Sequence[float]) -> str:
    ratio = _range(values)
    return "none" if ratio is None else f"{ratio:.3g}"


def _range(values: Sequence[float]) -> float | None:
    sizes = [value for value in values if math.isfinite(value) and value > 0]
    return max(sizes) / min(sizes) if sizes else None


def _change(weight: WeightRange) -> float:
    before, after = _range(weight.before), _range(weight.after)
    if before is None or after is None:
        return math.inf
    return abs(math.log(after / before))


# ---- conditions ----


def conditions(check: CheckResult) -> str:
    """On what the verdict rests: inputs, providers, limits, versions."""
    return section("How it was checked", "", pairs(_conditions(check)))


def _conditions(check: CheckResult) -> Iterator[tuple[str, str]]:
    yield "reference", code(check.reference)
    yield "candidate", code(check.candidate)
    yield "samples", esc(words.drawn(check))
    for use in check.inputs:
        yield "input", esc(words.fed(use))
    for run in check.runs:
        device = f", {run.device}" if run.device else ""
        yield "provider", esc(f"{words.certificate(run)} ({run.runtime}{device})")
        if run.options:
            options = ", ".join(f"{name}={value}" for name, value in run.options.items())
            yield "its options", code(options)
        if run.elsewhere:
            yield "nodes elsewhere", esc(words.some(run.elsewhere))
    if words.limits(check.gates):
        yield "gates", esc(words.limits(check.gates))
    if check.unpaired:
        yield "not paired", esc(words.unpaired(check))
    for name, value in check.environment.items():
        yield esc(name), esc(value)
