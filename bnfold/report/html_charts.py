"""The pictures of a check as SVG: errors of an output, errors along the graph, weights' ranges.

Every mark that stands for one thing has a ``<title>``, and shapes differ as well as colors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bnfold.report.html_axis import LogAxis, grid
from bnfold.report.html_parts import esc, shortened
from bnfold.report.words import number
from bnfold.verify.judge import MEAN_LIMIT

if TYPE_CHECKING:
    from bnfold.verify.judge import Measured
    from bnfold.verify.result import SiteResult, WeightRange

TITLED = 400  # with more sites than this each dot has no title of its own
# The signs of the charts, for their legends.
DOT = '<circle class="after" cx="11" cy="6" r="4"/>'
RING = '<circle class="before" cx="11" cy="6" r="4.5"/>'
DASHES = '<path class="limit" d="M0 6H22"/>'


def levels(measured: Measured) -> list[float]:
    """Each sample's floor, as `judge_errors` has it: what the runtime gets wrong or can't tell."""
    least = max(measured.jitter, 4 * measured.unit)
    return [e if math.isnan(e) else max(e, least) for e in measured.e_unfold]


def error_chart(measured: Measured, beside: Sequence[Measured] = ()) -> str:
    """Each sample's error after and before folding, on a log axis, and twice the floor.

    Args:
        measured: What is shown.
        beside: What is shown beside it, on an axis with the same numbers.
    """
    left, right, top, bottom = 44.0, 350.0, 12.0, 168.0
    limits = _limits(measured)
    shown = [v for m in (measured, *beside) for v in (*m.e_fold, *m.e_unfold, *_limits(m))]
    axis = LogAxis.around(shown, top, bottom)
    wide = (right - left) / len(measured.e_fold)
    size = min(4.5, max(1.5, wide / 4))
    parts = [grid(axis, left, right), _limit_line(axis, limits, left, wide)]
    for i, (after, before) in enumerate(zip(measured.e_fold, measured.e_unfold, strict=True)):
        x, over = left + (i + 0.5) * wide, after > limits[i] or not math.isfinite(after)
        parts.append(_sample(i, x, size, axis, (after, before), over))
    ends = _ends(len(measured.e_fold), left, right, wide, bottom + 20)
    said = f"Relative error of output {measured.output} against the float64 oracle, by sample"
    return _svg(360, 196, said, "".join(parts) + ends)


def _limits(measured: Measured) -> list[float]:
    return [MEAN_LIMIT * level for level in levels(measured)]


def _limit_line(axis: LogAxis, limits: Sequence[float], left: float, wide: float) -> str:
    path = "".join(
        f"{'L' if i else 'M'}{left + i * wide:.1f} {axis.at(limit):g}H{left + (i + 1) * wide:.1f}"
        for i, limit in enumerate(limits)
    )
    return f'<path class="limit" d="{path}"/>'


def _sample(
    index: int, x: float, size: float, axis: LogAxis, errors: tuple[float, float], over: bool
) -> str:
    """One sample: a ring before folding, and after it a dot, or a diamond where it is too large."""
    after, before = errors
    high, low = axis.at(after), axis.at(before)
    said = f"sample {index + 1}: {number(after)} after folding, {number(before)} before"
    shape = (
        diamond(x, high, size * 1.4, "over")
        if over
        else f'<circle class="after" cx="{x:.1f}" cy="{high:g}" r="{size:.1f}"/>'
    )
    return (
        f'<g><title>{said}</title><path class="stem" d="M{x:.1f} {low:g}V{high:g}"/>'
        f'<circle class="before" cx="{x:.1f}" cy="{low:g}" r="{size + 0.8:.1f}"/>{shape}</g>'
    )


def diamond(x: float, y: float, size: float, kind: str) -> str:
    """A diamond around a point."""
    s = round(size, 1)
    return f'<path class="{kind}" d="M{x:.1f} {y - s:g}l{s} {s} {-s} {s} {-s} {-s}z"/>'


def _ends(count: int, left: float, right: float, wide: float, y: float) -> str:
    first = f'<text x="{left + wide / 2:.1f}" y="{y:g}" text-anchor="middle">1</text>'
    middle = f'<text x="{(left + right) / 2:g}" y="{y:g}" text-anchor="middle">sample</text>'
    last = f'<text x="{right - wide / 2:.1f}" y="{y:g}" text-anchor="middle">{count}</text>'
    return first + middle + (last if count > 1 else "")


def sites_chart(sites: Sequence[SiteResult], guilty: str) -> str:
    """Each site's error and what rounding its weights explains, in the order of the graph."""
    left, right, top, bottom = 48.0, 1088.0, 26.0, 238.0
    # Where nothing is rounded the bound is next to nothing, and would only hide the others.
    least = max((site.bound for site in sites), default=0.0) / 1e3
    bound = [site.bound for site in sites if site.bound >= least]
    axis = LogAxis.around([*(site.error for site in sites), *bound], top, bottom)
    wide = (right - left) / len(sites)
    places = [(left + (i + 0.5) * wide, site) for i, site in enumerate(sites)]
    half = max(wide / 2, 2.5)
    bounds = "".join(
        f"M{x - half:.1f} {axis.at(site.bound):g}h{2 * half:.1f}"
        for x, site in places
        if site.bound >= least
    )
    parts = [grid(axis, left, right), f'<path class="limit fine" d="{bounds}"/>']
    parts += [_guilty(x, top, bottom, site) for x, site in places if site.site == guilty][:1]
    parts += _site_marks(places, axis, min(4.0, max(1.8, wide / 3)))
    parts.append(f'<text x="{left:g}" y="258">first site</text>')
    parts.append(f'<text x="{right:g}" y="258" text-anchor="end">last of {len(sites):,}</text>')
    return _svg(1100, 266, "Error of each site along the graph, and its bound", "".join(parts))


def _guilty(x: float, top: float, bottom: float, site: SiteResult) -> str:
    name, right = esc(shortened(site.site, 48)), x > 700
    place = f'x="{x + (-6 if right else 6):.1f}" text-anchor="{"end" if right else "start"}"'
    return (
        f'<path class="guilty" d="M{x:.1f} {top - 18:g}V{bottom:g}"/>'
        f'<text class="guilty-name" {place} y="{top - 8:g}">first wrong: {name}</text>'
    )


def _site_marks(
    places: Sequence[tuple[float, SiteResult]], axis: LogAxis, size: float
) -> list[str]:
    kinds = {"fail": "over", "inconclusive": "unsure"}
    right = [place for place in places if place[1].verdict.value == "pass"]
    marks = []
    if len(right) > TITLED:
        path = "".join(f"M{x:.1f} {axis.at(site.error):g}h0" for x, site in right)
        marks.append(f'<path class="dots" d="{path}"/>')
        right = []
    for x, site in right:
        y, said = axis.at(site.error), _site_title(site)
        marks.append(
            f'<circle class="after" cx="{x:.1f}" cy="{y:g}" r="{size:.1f}">{said}</circle>'
        )
    for x, site in places:
        if site.verdict.value in kinds:
            shape = diamond(x, axis.at(site.error), size * 1.5, kinds[site.verdict.value])
            marks.append(f"<g>{_site_title(site)}{shape}</g>")
    return marks


def _site_title(site: SiteResult) -> str:
    said = f"{site.site}: {site.verdict.value}, error {number(site.error)}"
    return f"<title>{esc(said)}, bound {number(site.bound)}</title>"


def weight_chart(weight: WeightRange) -> str:
    """Each channel's largest absolute value, before and after, on a log axis."""
    left, right, top, bottom = 40.0, 232.0, 10.0, 84.0
    axis = LogAxis.around([*weight.before, *weight.after], top, bottom)
    parts = [grid(axis, left, right)]
    for kind, values in (("line-before", weight.before), ("line-after", weight.after)):
        if values:
            parts.append(f'<path class="{kind}" d="{_steps(values, axis, left, right)}"/>')
    said = f"Largest absolute value of each channel of {weight.tensor}, before and after"
    return _svg(240, 92, said, "".join(parts))


def _steps(values: Sequence[float], axis: LogAxis, left: float, right: float) -> str:
    wide = (right - left) / len(values)
    return "".join(
        f"{'L' if i else 'M'}{left + i * wide:.1f} {axis.at(value):g}h{wide:.2f}"
        for i, value in enumerate(values)
    )


def _svg(width: int, height: int, said: str, inner: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{esc(said)}">{inner}</svg>'
    )
