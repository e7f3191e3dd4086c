"""The schema describes what is written, whole; what is written can be read again."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import jsonschema
import pytest

import bnfold.report
from bnfold.errors import UsageError
from bnfold.report.as_json import render_json
from bnfold.report.bench import BenchModel, BenchResult, Setting, Timing
from bnfold.report.envelope import Envelope, envelope_from_json
from bnfold.report.formats import FORMATS, format_of, render
from bnfold.report.model import SCHEMA_VERSION, Joint, Report, Size, Step
from bnfold.verify import judge, result
from tests.report_samples import FAILING, PASSING, SAMPLES

SCHEMA = bnfold.report.schema()
CHECKER = jsonschema.Draft202012Validator(SCHEMA)
CLASSES = (
    BenchModel, BenchResult, Setting, Timing,
    Joint, Report, Size, Step, result.CheckResult, result.InputUse, result.Mutation,
    result.OutputResult, result.ProviderRun, result.SiteResult, result.TierResult,
    result.WeightRange, judge.Decisions, judge.Figures, judge.Gates, judge.Measured, judge.Settled,
)  # fmt: skip
ADDED = {"Report": {"schema_version", "folded", "kept"},
         "CheckResult": {"verdict", "exit_code", "message"}}  # fmt: skip


def test_the_schema_is_one_and_names_its_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == f"urn:bnfold:report:{SCHEMA_VERSION}"
    assert SCHEMA["properties"]["schema_version"] == {
        "description": SCHEMA["properties"]["schema_version"]["description"],
        "const": SCHEMA_VERSION,
    }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_schema_has_every_field_and_says_what_it_is(kind: Any) -> None:
    found = SCHEMA["$defs"][kind.__name__]
    expected = {field.name for field in fields(kind)} | ADDED.get(kind.__name__, set())
    assert set(found["properties"]) == expected
    assert set(found["required"]) == expected
    assert found["additionalProperties"] is False
    assert all(inner["description"] for inner in found["properties"].values())


def test_the_schema_describes_no_class_that_is_not_there() -> None:
    assert set(SCHEMA["$defs"]) == {kind.__name__ for kind in CLASSES} | {"number"}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_envelope_fits_the_schema(name: str) -> None:
    CHECKER.validate(json.loads(render_json(SAMPLES[name])))


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def sabotage(data: dict[str, Any]) -> None:
        *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
        inner: Any = data
        for key in way:
            inner = inner[key]
        inner[last] = value

    return sabotage


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", SCHEMA_VERSION + 1),
        ("surprise", 1),
        ("tool.name", "another"),
        ("dropped", None),
        ("report.surprise", 1),
        ("report.steps.0.verdict", "perhaps"),
        ("report.steps.0.code", "BNF1"),
        ("report.before.parameters", -1),
        ("check.verdict", "perhaps"),
        ("check.samples", "8"),
        ("check.tiers.0.tier", "E"),
        ("check.tiers.1.sites.0.error", "Infinity"),
        ("check.tiers.1.sites.0.surprise", 1),
        ("check.tiers.2.outputs.0.measured.e_fold", 0.5),
        ("check.tiers.2.outputs.0.measured.hull.0", [1, 2, 3]),
        ("check.runs.0.ran", {"CPU": "all"}),
        ("check.gates", None),
    ],
)
def test_the_schema_refuses_a_sabotaged_envelope(path: str, value: Any) -> None:
    data = json.loads(render_json(PASSING))
    broken = copy.deepcopy(data)
    _put(path, value)(broken)
    assert CHECKER.is_valid(data)
    assert not CHECKER.is_valid(broken)


def test_the_schema_refuses_an_envelope_without_one_of_its_fields() -> None:
    data = json.loads(render_json(PASSING))
    for key in data:
        assert not CHECKER.is_valid({name: value for name, value in data.items() if name != key})


# ---- reading again ----


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "hostile"])
def test_what_is_written_can_be_read_again(name: str) -> None:
    assert envelope_from_json(render_json(SAMPLES[name])) == SAMPLES[name]


def test_hostile_names_and_numbers_that_are_none_are_read_again() -> None:
    text = render_json(SAMPLES["hostile"])
    again = envelope_from_json(text)
    assert render_json(again) == text
    assert again.check is not None
    assert math.isnan(again.check.tiers[0].sites[0].error)


def test_a_stored_report_is_judged_again() -> None:
    stored = envelope_from_json(render_json(PASSING))
    assert stored.check is not None
    measured = stored.check.tiers[2].outputs[0].measured
    assert measured is not None
    assert judge.judge_errors(measured).verdict is judge.Verdict.PASS
    strict = judge.Gates(rtol=0.0, atol=1e-12)
    assert judge.judge_errors(measured, strict).verdict is judge.Verdict.FAIL


def test_a_version_of_the_schema_that_is_newer_is_refused() -> None:
    data = json.loads(render_json(Envelope())) | {"schema_version": SCHEMA_VERSION + 1}
    said = f"r.json: the report has schema version {SCHEMA_VERSION + 1}, .*; use a newer bnfold"
    with pytest.raises(UsageError, match=said):
        envelope_from_json(json.dumps(data), "r.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it has no schema_version"),
        ("{}", "it has no schema_version"),
        ('{"schema_version": true}', "it has no schema_version"),
        ('{"schema_version": "1"}', "it has no schema_version"),
        ('{"schema_version": 1, "report": 7}', "it is not a report of bnfold: 7 is out of place"),
        ('{"schema_version": 1, "check": {"tiers": 1}}', "not a report of bnfold: .*tiers"),
        ('{"schema_version": 1, "check": {}}', "it is not a report of bnfold: CheckResult"),
        ('{"schema_version": 1, "tool": []}', None),
        ('{"schema_version": 1, "tool": 3}', "it is not a report of bnfold"),
        ('{"schema_version": 1, "dropped": "abc"}', "it is not a report of bnfold"),
        ('{"schema_version": 1, "check": {"gates": {"rtol": 1%s}}}' % ("0" * 400), "not a report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(text: str, said: str | None) -> None:
    if said is None:
        assert envelope_from_json(text) == replace(Envelope(), version="")
        return
    with pytest.raises(UsageError, match=said) as caught:
        envelope_from_json(text, "r.json")
    assert str(caught.value).startswith("r.json: ")
    assert "\n" not in str(caught.value)


# ---- formats ----


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("-", "json"), ("r.json", "json"), ("a/R.JSON", "json"), ("r.xml", "junit"),
        ("r.sarif", "sarif"), ("r.sarif.json", "sarif"), ("r.md", "markdown"), ("r.html", "html"),
        ("r.txt", "text"),
    ],
)  # fmt: skip
def test_the_ending_asks_for_the_format(path: str, expected: str) -> None:
    assert format_of(path) == expected
    assert expected in FORMATS


@pytest.mark.parametrize("path", ["r", "r.pdf", "json", "r.json.gz", ""])
def test_an_unknown_ending_is_refused_with_those_that_there_are(path: str) -> None:
    with pytest.raises(UsageError, match=r"\.json \(json\), \.xml \(junit\)"):
        format_of(path)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_takes_every_envelope(form: str, name: str) -> None:
    text = render(form, SAMPLES[name])
    assert text == render(form, SAMPLES[name])
    text.encode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_names_the_guilty_site_and_what_was_rolled_back(form: str) -> None:
    text = render(form, FAILING).replace("/<wbr>", "/")
    assert FAILING.check is not None
    assert FAILING.check.guilty in text
    if form != "junit":
        assert FAILING.dropped[0] in text
