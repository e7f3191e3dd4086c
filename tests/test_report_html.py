"""The HTML page: whole, self-contained, harmless, and its pictures show what was measured."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from bnfold.report.envelope import Envelope
from bnfold.report.html import render_html
from bnfold.report.html_axis import LogAxis, decade
from bnfold.report.html_charts import error_chart, levels, sites_chart, weight_chart
from bnfold.report.html_check import WEIGHTS
from bnfold.report.html_outputs import OUTPUTS
from bnfold.report.html_parts import shortened
from bnfold.verify.judge import Measured, Verdict
from bnfold.verify.result import (
    CheckResult,
    Mutation,
    OutputResult,
    SiteResult,
    TierResult,
    WeightRange,
)
from tests.report_samples import (
    EMPTY,
    EXPLAINED,
    FAILING,
    LARGE,
    PASSING,
    SAMPLES,
    check,
    measured,
    output,
    weight,
)

VOID = {"meta", "input", "wbr"}


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text; refuses tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_is_whole_and_loads_nothing(name: str) -> None:
    page = render_html(SAMPLES[name])
    found = Tags(page)
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in found.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "form", "base"}
        assert not {"src", "href", "style", "xlink:href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert "@import" not in page
    assert "url(" not in page


@pytest.mark.parametrize("name", SAMPLES)
def test_there_is_one_script_and_the_policy_names_it(name: str) -> None:
    page = render_html(SAMPLES[name])
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == len(Tags(page).named("script")) == 1
    policy = Tags(page).named("meta")[1]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", SAMPLES)
def test_no_number_in_a_picture_is_none(name: str) -> None:
    for tag, attributes in Tags(render_html(SAMPLES[name])).tags:
        if tag in {"path", "circle", "rect", "text"}:
            assert not re.search(r"nan|inf", " ".join(v or "" for v in attributes.values()))


def test_every_picture_says_what_it_shows() -> None:
    pictures = [a for a in Tags(render_html(PASSING)).named("svg") if a.get("role") == "img"]
    assert len(pictures) == 2 + 1 + 12
    assert all(picture["aria-label"] for picture in pictures)
    others = [a for a in Tags(render_html(PASSING)).named("svg") if a.get("role") != "img"]
    assert all(picture["aria-hidden"] == "true" for picture in others)


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("passing", "Pass: both models say the same"),
        ("failing", "Fail: the models do not say the same"),
        ("checked", "Inconclusive: nothing could be told"),
        ("explained", "A plan: nothing was changed"),
        ("empty", "Not checked"),
    ],
)
def test_the_verdict_comes_first(name: str, headline: str) -> None:
    text = Tags(render_html(SAMPLES[name])).text
    assert headline in text
    assert text.index(headline) < 25_000


def test_the_number_to_trust_stands_beside_a_pass() -> None:
    assert PASSING.check is not None
    text = Tags(render_html(PASSING)).text.replace("\N{NON-BREAKING HYPHEN}", "-")
    assert 0 < text.index(PASSING.check.caught) < text.index("Four tiers")
    silent = replace(PASSING, check=replace(PASSING.check, caught=""))
    assert "smallest error that this check" not in render_html(silent)


def test_each_step_has_a_row_and_a_bar() -> None:
    found = Tags(render_html(LARGE))
    assert sum("data-kind" in attributes for attributes in found.named("tr")) == 2000
    bars = [a for a in found.named("i") if "title" in a]
    assert len(bars) == 2000
    assert sum(a["class"] == "kept" for a in bars) == 500


def test_a_large_model_makes_a_page_that_opens() -> None:
    assert len(render_html(LARGE)) < 2_000_000


def test_what_is_not_there_has_no_section() -> None:
    assert "<h2>" not in render_html(EMPTY)
    assert "<h2>Tiers" not in render_html(EXPLAINED)
    assert "<h2>Size" not in render_html(EXPLAINED)


def test_more_pictures_than_anybody_looks_at_are_counted() -> None:
    outputs = tuple(output(measured(f"y{i}", seed=i)) for i in range(OUTPUTS + 3))
    weights = tuple(weight(i) for i in range(WEIGHTS + 2))
    tiers = (TierResult("C", "", Verdict.PASS, "fine", outputs),)
    many = CheckResult("a", "b", tiers, 8, 0, weights=weights)
    text = Tags(render_html(replace(PASSING, check=many))).text
    assert "3 more outputs are in the JSON report" in text
    assert "2 more are in the JSON report" in text


def test_an_output_on_several_providers_has_its_cards_side_by_side_on_one_axis() -> None:
    places = ("CPUExecutionProvider", "CUDAExecutionProvider")
    right = (output(measured("y")), output(measured("z")))
    wrong = (right[0], output(measured("z", factor=1e4)))
    tiers = tuple(
        TierResult("C", place, outputs[1].verdict, "said", outputs)
        for place, outputs in zip(places, (right, wrong), strict=True)
    )
    page = render_html(Envelope(check=CheckResult("a", "b", tiers, 8, 0)))
    cards = [re.sub("<[^>]*>", "", head).split() for head in re.findall("<h3>(.*?)</h3>", page)]
    assert cards == [  # what fails anywhere comes first, whatever the order of the providers
        ["z", "on", "CPU", "pass"], ["z", "on", "CUDA", "fail"],
        ["y", "on", "CPU", "pass"], ["y", "on", "CUDA", "pass"],
    ]  # fmt: skip
    ticks = [re.findall('text-anchor="end">([^<]*)<', svg) for svg in page.split("<h3>")[1:]]
    assert ticks[0] == ticks[1] != ticks[2] == ticks[3]
    assert page.count('<div class="cards">') == 2


def test_outputs_on_several_providers_are_cut_and_counted_as_one() -> None:
    outputs = tuple(output(measured(f"y{i}", seed=i)) for i in range(OUTPUTS))
    tiers = tuple(TierResult("C", place, Verdict.PASS, "fine", outputs) for place in ("a", "b"))
    page = render_html(Envelope(check=CheckResult("a", "b", tiers, 8, 0)))
    assert page.count("<h3>") == OUTPUTS
    assert f"{OUTPUTS // 2} more outputs are in the JSON report" in page


def test_tiers_that_were_not_checked_are_named() -> None:
    """Of two frameworks, say: a reader has to see that nobody looked at the weights."""
    tiers = tuple(TierResult(letter, "CPUExecutionProvider", Verdict.PASS, "ok") for letter in "CD")
    mixed = CheckResult("a.pt2", "b.onnx", tiers, 8, 0, warnings=("tiers A and B are left out",))
    page = render_html(Envelope(check=mixed))
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr>(.*?)</tr>", page)]
    assert [(row[0], "not" in row) for row in rows[1:5]] == [
        ("A", True), ("B", True), ("C", False), ("D", False),
    ]  # fmt: skip
    assert "Error along the graph" not in page
    whole = Tags(render_html(PASSING)).text
    assert "not a part of this check" in page
    assert "not a part of this check" not in whole


def test_every_output_that_decides_otherwise_is_named() -> None:
    outputs = tuple(
        OutputResult(name, verdict, f"output '{name}' {verdict.value}")
        for name, verdict in (("y", Verdict.FAIL), ("z", Verdict.FAIL), ("w", Verdict.PASS))
    )
    tier = TierResult("D", "CPU", Verdict.FAIL, outputs[0].message, outputs)
    text = Tags(render_html(Envelope(check=CheckResult("a", "b", (tier,), 8, 0)))).text
    assert [text.count(one.message) for one in outputs] == [2, 1, 0]  # once as the headline


def test_mutants_say_what_was_caught_where_no_tier_b_does() -> None:
    assert PASSING.check is not None
    assert "Mutants" not in render_html(PASSING)
    found = (Mutation("CPUExecutionProvider", "head/<w>", 2.0**-12),)
    page = render_html(replace(PASSING, check=replace(PASSING.check, mutations=found)))
    section = page[page.index("<h2>Mutants") :]
    for part in ("head/<wbr>&lt;w&gt;", "CPUExecutionProvider", ">0.00024<"):
        assert part in section[: section.index("</section>")]


# ---- pictures ----


def test_an_axis_puts_larger_above_smaller_and_has_a_place_for_all() -> None:
    axis = LogAxis.around([1e-7, 1e-3, 0.0, math.inf, math.nan], 10.0, 200.0)
    heights = [axis.at(v) for v in (0.0, 1e-7, 1e-5, 1e-3, math.inf)]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 5
    assert axis.at(math.nan) == axis.at(math.inf) == 10.0
    assert [label for _, label in axis.ticks()] == ["0", *map(decade, range(-7, -2)), "inf"]


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [math.nan], [1e-300, 1e300], [5e-324]])
def test_an_axis_stands_whatever_the_values(values: list[float]) -> None:
    axis = LogAxis.around(values, 10.0, 200.0)
    assert all(10.0 <= axis.at(value) <= 200.0 for value in values)
    assert 2 <= len(axis.ticks()) <= 8


@pytest.mark.parametrize(
    ("power", "text"), [(-7, "10⁻⁷"), (0, "1"), (-1, "0.1"), (2, "100"), (12, "10¹²")]
)
def test_a_decade_is_written_as_people_write_it(power: int, text: str) -> None:
    assert decade(power) == text


def test_the_floor_is_the_largest_of_error_jitter_and_roundings() -> None:
    found = Measured("y", "float32", 1e-7, 3e-7, (1e-6,) * 3, (1e-6, 1e-9, math.nan))
    assert levels(found)[:2] == [1e-6, 4e-7]
    assert math.isnan(levels(found)[2])
    assert levels(replace(found, jitter=1e-5))[0] == 1e-5


def test_a_sample_above_twice_the_floor_is_a_diamond() -> None:
    fine = Measured("y", "float32", 1e-9, 0.0, (1e-6, 1.9e-6), (1e-6, 1e-6))
    wrong = replace(fine, e_fold=(1e-6, 2.1e-6))
    assert error_chart(fine).count('class="over"') == 0
    assert error_chart(wrong).count('class="over"') == 1
    assert error_chart(wrong).count('class="after"') == 1
    assert "<title>sample 2: 2.1e-06 after folding, 1e-06 before</title>" in error_chart(wrong)


def test_the_first_wrong_site_is_marked_once_and_named() -> None:
    found = check(guilty=20)
    chart = sites_chart(found.tiers[1].sites, found.guilty)
    assert chart.count('class="guilty"') == 1
    assert f"first wrong: {found.guilty}" in chart
    assert 'class="guilty"' not in sites_chart(check().tiers[1].sites, "")


@pytest.mark.parametrize("count", [1, 2, 400, 401, 3000])
def test_every_site_has_its_mark(count: int) -> None:
    sites = tuple(
        SiteResult(f"s{i}", "Conv", "t", "r", Verdict.PASS, 1e-8, 1e-7, 0.1) for i in range(count)
    )
    chart = sites_chart(sites, "")
    assert chart.count("<circle") + len(re.findall(r'h0(?=[M"])', chart)) == count


def test_a_weight_has_a_line_for_each_side_that_there_is() -> None:
    both = WeightRange("w", (1.0, 2.0), (3.0, 4.0))
    assert weight_chart(both).count("<path class=\"line-") == 2  # fmt: skip
    assert "line-before" not in weight_chart(replace(both, before=()))


def test_a_failing_output_comes_first() -> None:
    text = Tags(render_html(FAILING)).text
    after = text[text.index("Error of each output") :]
    assert after.index("logits") < after.index("features") < after.index("anchors")


@pytest.mark.parametrize(("name", "short"), [("abc", "abc"), ("a" * 9 + "b" * 9, "aaaa…bbbb")])
def test_a_long_name_loses_its_middle(name: str, short: str) -> None:
    assert shortened(name, 9) == short
