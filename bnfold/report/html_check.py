"""The sections of the page that show a check: tiers, sites, weights, conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bnfold.report import words
from bnfold.report.html_charts import DASHES, DOT, diamond, sites_chart, weight_chart
from bnfold.report.html_outputs import errors_section, mutations_section
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
from bnfold.report.lines import LISTED

if TYPE_CHECKING:
    from bnfold.verify.result import CheckResult, SiteResult, TierResult, WeightRange

# More rows and pictures than these nobody looks at; the ones that matter most come first.
SITES, WEIGHTS = 12, 48


def check_sections(check: CheckResult) -> list[str]:
    """Everything that a check found, the verdict apart."""
    found = [_tiers(check), _warnings(check)]
    found += [errors_section(check), mutations_section(check.mutations)]
    found += [_sites(tier, check.guilty) for tier in check.tiers if tier.sites]
    return [part for part in found if part]


def _tiers(check: CheckResult) -> str:
    rows: list[tuple[str, ...]] = []
    for letter in dict.fromkeys((*words.TIERS, *(tier.tier for tier in check.tiers))):
        name = f"<b>{esc(letter)}</b> {esc(words.TIERS.get(letter, ''))}"
        found = [(name, *_tier(tier)) for tier in check.tiers if tier.tier == letter]
        rows += found or [(name, "", mark("unchecked"), "not a part of this check", "")]
    about = "Four tiers, from cheap to dear; the worst of those that were checked speaks."
    heads = ("tier", "on", "verdict", "found", "would catch")
    return section("Tiers", about, table(heads, rows, (4,), "tiers stack"))


def _tier(tier: TierResult) -> tuple[str, str, str, str]:
    # The outputs of tier C have a card each.
    others = [
        f'<div class="soft small">{esc(output.message)}</div>'
        for output in (tier.outputs if tier.tier != "C" else ())
        if output.verdict.value != "pass" and output.message != tier.message
    ]
    hidden = len(others) - LISTED
    more = f'<div class="soft small">and {hidden:,} more</div>' if hidden > 0 else ""
    said = esc(tier.message) + "".join(others[:LISTED]) + more
    caught = words.number(tier.caught) if tier.caught is not None else ""
    return esc(tier.provider), mark(tier.verdict.value), said, caught


def _warnings(check: CheckResult) -> str:
    if not check.warnings:
        return ""
    items = "".join(f"<li>{esc(warning)}</li>" for warning in check.warnings)
    return section("Worth knowing", "", f'<ul class="plain">{items}</ul>')


# ---- tier B ----


def _sites(tier: TierResult, guilty: str) -> str:
    wrong = [site for site in tier.sites if site.verdict.value != "pass"]
    about = (
        f"{len(tier.sites):,} operators on real activations, in float64 with the stored weights: "
        f"{len(wrong):,} of them off by more than rounding explains or not computable. "
        "A line above a dot is what rounding explains there."
    )
    keys = [(swatch(DOT), "error of a site"), (swatch(DASHES), "what rounding explains"),
            (swatch(diamond(11, 6, 5, "over")), "fails"),
            (swatch(diamond(11, 6, 5, "unsure")), "inconclusive")]  # fmt: skip
    chart = sites_chart(tier.sites, guilty)
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


def weights_section(weights: Sequence[WeightRange]) -> str:
    """How large the channels of each weight are, before and after; empty where none changed."""
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
