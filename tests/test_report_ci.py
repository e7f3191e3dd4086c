"""What CI systems read: JUnit XML, SARIF, Markdown, GitHub's commands and step summary."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from bnfold.planning import Reason
from bnfold.report.envelope import Envelope
from bnfold.report.github import SHOWN, command, step_summary, workflow_commands
from bnfold.report.junit import render_junit
from bnfold.report.markdown import code, escaped, render_markdown
from bnfold.report.sarif import render_sarif
from bnfold.verify.judge import Verdict
from bnfold.verify.result import CheckResult, OutputResult, TierResult
from tests.report_samples import (
    CUDA,
    EXPLAINED,
    FAILING,
    HOSTILE,
    LARGE,
    PASSING,
    SAMPLES,
)


def tier(verdict: Verdict, *outputs: Verdict, name: str = "C") -> TierResult:
    said = tuple(OutputResult(f"y{i}", one, f"y{i} {one.value}") for i, one in enumerate(outputs))
    return TierResult(name, CUDA, verdict, f"it says {verdict.value}", said)


def checked(*tiers: TierResult) -> Envelope:
    return Envelope(check=CheckResult("a.onnx", "b.onnx", tiers, 8, 0))


# ---- JUnit ----


def counts(found: Envelope) -> dict[str, int]:
    root = ET.fromstring(render_junit(found))
    return {key: int(root.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}


@pytest.mark.parametrize("name", SAMPLES)
def test_junit_is_xml_and_counts_what_it_holds(name: str) -> None:
    root = ET.fromstring(render_junit(SAMPLES[name]))
    for element in (root, *root.iter("testsuite")):
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"),
                         ("skipped", "skipped")):  # fmt: skip
            assert int(element.attrib[key]) == len(list(element.iter(tag)))


@pytest.mark.parametrize("name", SAMPLES)
def test_junit_is_all_green_exactly_when_the_exit_code_is_zero(name: str) -> None:
    found, said = SAMPLES[name], counts(SAMPLES[name])
    passes = found.check is None or found.check.exit_code == 0
    assert (said["failures"] + said["errors"] == 0) == passes


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ((tier(Verdict.PASS),), (1, 0, 0, 0)),
        ((tier(Verdict.FAIL),), (1, 1, 0, 0)),
        ((tier(Verdict.INCONCLUSIVE),), (1, 0, 1, 0)),
        ((tier(Verdict.PASS, Verdict.PASS, Verdict.PASS),), (2, 0, 0, 0)),
        ((tier(Verdict.FAIL, Verdict.FAIL, Verdict.PASS),), (2, 1, 0, 0)),
        ((tier(Verdict.FAIL, Verdict.PASS),), (2, 1, 0, 0)),
        ((tier(Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),), (1, 0, 1, 0)),
        ((tier(Verdict.PASS, Verdict.PASS, Verdict.INCONCLUSIVE),), (2, 0, 0, 1)),
        ((tier(Verdict.PASS, Verdict.INCONCLUSIVE),), (2, 0, 0, 1)),
        ((tier(Verdict.PASS), tier(Verdict.FAIL, name="D")), (2, 1, 0, 0)),
    ],
)
def test_junit_fails_for_a_mismatch_and_errs_for_what_is_inconclusive(
    tiers: tuple[TierResult, ...], expected: tuple[int, int, int, int]
) -> None:
    assert tuple(counts(checked(*tiers)).values()) == expected


def test_junit_skips_the_steps_that_stay_in_a_suite_of_their_own() -> None:
    assert PASSING.report is not None
    suite = ET.fromstring(render_junit(PASSING)).findall("testsuite")[-1]
    assert suite.attrib["name"] == "steps that stay"
    cases = {case.attrib["name"]: case for case in suite.iter("testcase")}
    assert len(cases) == len(PASSING.report.kept)
    first = PASSING.report.kept[0]
    skipped = cases[f"{first.name} ({first.op_type})"].find("skipped")
    assert skipped is not None
    assert skipped.attrib["message"] == f"{first.code} {first.reason}: {first.sentence}"
    assert skipped.text == first.hint


def test_junit_says_how_it_was_checked() -> None:
    suites = {s.attrib["name"]: s for s in ET.fromstring(render_junit(PASSING))}
    inner = suites[f"tier C on {CUDA}"].iter("property")
    properties = {one.attrib["name"]: one.attrib["value"] for one in inner}
    assert properties["seed"] == "0"
    assert properties["runtime"] == "onnxruntime 1.31.1"
    assert properties["placement"].startswith("ran 124 of 124 nodes")
    assert properties["caught"] == "3.1e-07"


def test_no_two_cases_of_a_suite_have_one_name() -> None:
    for suite in ET.fromstring(render_junit(LARGE)):
        names = [case.attrib["name"] for case in suite.iter("testcase")]
        assert len(names) == len(set(names))


# ---- SARIF ----


def sarif(found: Envelope) -> dict[str, Any]:
    log = json.loads(render_sarif(found))
    assert log["version"] == "2.1.0"
    run: dict[str, Any] = log["runs"][0]
    return run


@pytest.mark.parametrize("name", SAMPLES)
def test_sarif_has_what_the_standard_and_code_scanning_ask_for(name: str) -> None:
    run = sarif(SAMPLES[name])
    rules = run["tool"]["driver"]["rules"]
    ids = [rule["id"] for rule in rules]
    assert run["tool"]["driver"]["name"] == "bnfold"
    assert len(ids) == len(set(ids))
    for rule in rules:
        assert rule["name"].isalpha()
        assert rule["shortDescription"]["text"]
        assert rule["fullDescription"]["text"]
        assert rule["help"]["text"]
        assert "{" not in rule["help"]["text"] + rule["shortDescription"]["text"]
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in {"note", "warning", "error"}
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9._~%/:-]+", place["artifactLocation"]["uri"])
        assert place["region"]["startLine"] >= 1
        assert result["partialFingerprints"]["primaryLocationLineHash"]


def test_every_reason_is_a_rule_with_its_hint() -> None:
    rules = {rule["id"]: rule for rule in sarif(EXPLAINED)["tool"]["driver"]["rules"]}
    for reason in Reason:
        hint = reason.hint.format(witness="(witness)")
        assert rules[reason.code]["help"]["text"] == hint
    assert {"mismatch", "inconclusive", "hazard", "rolled-back"} <= set(rules)


def test_sarif_has_a_result_for_each_finding_with_its_level_and_node() -> None:
    assert FAILING.report is not None
    assert FAILING.check is not None
    results = sarif(FAILING)["results"]
    found = [(one["ruleId"], one["level"]) for one in results]
    assert found[:4] == [("mismatch", "error"), ("mismatch", "error"), ("hazard", "warning"),
                         ("rolled-back", "warning")]  # fmt: skip
    assert found[4:] == [(step.code, "note") for step in FAILING.report.kept]
    logical = results[0]["locations"][0]["logicalLocations"][0]
    assert logical["fullyQualifiedName"] == FAILING.check.guilty


def test_what_is_inconclusive_is_an_error() -> None:
    results = sarif(checked(tier(Verdict.PASS), tier(Verdict.INCONCLUSIVE)))["results"]
    assert [(one["ruleId"], one["level"]) for one in results] == [("inconclusive", "error")]


def test_a_check_of_no_tier_is_no_pass_in_any_form() -> None:
    """As of a model without clear decisions, of which tier D alone was asked."""
    case = next(ET.fromstring(render_junit(checked())).iter("testcase"))
    error = case.find("error")
    assert error is not None
    assert (case.attrib["name"], error.attrib["message"]) == ("check", "nothing was checked")
    (result,) = sarif(checked())["results"]
    assert (result["ruleId"], result["level"]) == ("inconclusive", "error")
    (line,) = workflow_commands(checked())
    assert line == "::error file=b.onnx,title=bnfold%3A inconclusive%2C check::nothing was checked"


def test_a_reason_that_another_version_knows_is_a_result_without_a_rule() -> None:
    assert EXPLAINED.report is not None
    kept = replace(EXPLAINED.report.kept[0], code="BNF999")
    other = replace(EXPLAINED, report=replace(EXPLAINED.report, steps=(kept,)))
    (result,) = sarif(other)["results"]
    assert result["ruleId"] == "BNF999"
    assert "ruleIndex" not in result


def test_fingerprints_are_distinct_and_do_not_hang_on_numbers() -> None:
    def prints(found: Envelope) -> list[str]:
        return [one["partialFingerprints"]["bnfold/v1"] for one in sarif(found)["results"]]

    assert FAILING.check is not None
    one, other = FAILING.check.tiers[1], FAILING.check.tiers[2]
    changed = replace(FAILING.check, tiers=(replace(one, message="off by 3"), other))
    assert len(set(prints(SAMPLES["hostile"]))) == len(prints(SAMPLES["hostile"]))
    assert prints(FAILING) == prints(replace(FAILING, check=changed))


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("net.onnx", "net.onnx"),
        ("a b/ü.onnx", "a%20b/%C3%BC.onnx"),
        ("a\\b.onnx", "a/b.onnx"),
        ("/abs/x.onnx", "file:///abs/x.onnx"),
        ("C:\\m\\x.onnx", "file:///C%3A/m/x.onnx"),
        ("<candidate>", "%3Ccandidate%3E"),
        ("\ud800", "%5Cud800"),
        ("", "model"),
    ],
)
def test_a_file_is_a_uri(path: str, uri: str) -> None:
    found = Envelope(check=CheckResult("a", path, (tier(Verdict.FAIL),), 1, 0))
    place = sarif(found)["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == uri


# ---- Markdown ----


def test_markdown_begins_with_the_verdict_and_what_would_have_been_caught() -> None:
    lines = render_markdown(PASSING).splitlines()
    assert lines[0] == "### ✅ bnfold: pass <code>resnet50.onnx</code>"
    assert lines[2] == f"tiers A, B, C, D pass on {CUDA} (8 samples, seed 0)"
    assert lines[4].startswith("**Would have caught:** a scale error of 1.2e-07")


def test_markdown_has_the_table_the_tiers_and_the_kept_steps() -> None:
    text = render_markdown(PASSING)
    assert "| **nodes** | 171 | 119 | -30.4 % |" in text
    assert "| A stored weights |  | ✅ pass | 104 folded tensors are correctly rounded |" in text
    assert "<details><summary>BNF001 training-mode: 1 step kept</summary>\n\n- <code>" in text


@pytest.mark.parametrize("name", SAMPLES)
def test_markdown_rows_have_as_many_cells_as_their_head_and_details_close(name: str) -> None:
    text = render_markdown(SAMPLES[name])
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert text.count("<details>") == text.count("</details>")


def test_no_name_reaches_markdown_or_html() -> None:
    text = render_markdown(SAMPLES["hostile"])
    tags = set(re.findall(r"</?\w+>?", text))
    assert tags == {"<code>", "</code>", "<details>", "</details>", "<summary>", "</summary>"}
    assert "@team" not in re.sub(r"<code>.*?</code>", "", text)  # GitHub links none in code
    assert "alert('x')" not in text
    for raw in ("`a`", "|`", " #1", "]]"):
        assert raw not in text


@pytest.mark.parametrize("special", list("\\`*_{}[]<>&|~#!$\"'"))
def test_special_characters_are_entities(special: str) -> None:
    assert escaped(f"a{special}b") == f"a&#{ord(special)};b"
    assert code(f"a{special}b") == f"<code>a&#{ord(special)};b</code>"


# ---- GitHub ----


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("100 %", "::error file=f,title=t::100 %25"),
        ("a\nb\r\nc\rd", "::error file=f,title=t::a%0Ab%0Ac%0Ad"),
        ("%0A::warning::x", "::error file=f,title=t::%250A::warning::x"),
        ("a:b,c", "::error file=f,title=t::a:b,c"),
    ],
)
def test_a_message_of_a_command_is_escaped(message: str, expected: str) -> None:
    assert command("error", "f", "t", message) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("C:\\a,b.onnx", "C%3A\\a%2Cb.onnx"),
        ("a::b", "a%3A%3Ab"),
        ("50%.onnx", "50%25.onnx"),
        ("a\nb", "a\\nb"),
    ],
)
def test_a_property_of_a_command_is_escaped(file: str, expected: str) -> None:
    assert command("error", file, "t", "m") == f"::error file={expected},title=t::m"
    assert command("error", "", file, "m") == f"::error title={expected}::m"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_command_is_one_line_that_begins_as_one(name: str) -> None:
    for line in workflow_commands(SAMPLES[name]):
        assert re.match(r"::(error|warning|notice) [^:]+::.", line)
        assert line.isprintable()


def test_the_worst_comes_first_and_no_more_than_is_shown() -> None:
    tiers = [tier(Verdict.INCONCLUSIVE)] * 15 + [tier(Verdict.FAIL)]
    lines = workflow_commands(checked(*tiers))
    assert len(lines) == SHOWN
    assert lines[0] == (f"::error file=b.onnx,title=bnfold%3A fail%2C tier C on {CUDA}"
                        "::it says fail")  # fmt: skip


def test_a_pass_has_no_errors_but_its_hazards() -> None:
    levels = [line.split(" ")[0] for line in workflow_commands(PASSING)]
    assert levels == ["::warning", "::notice"]


@pytest.mark.parametrize("limit", [1 << 20, 80_000, 9_000, 3_000])
def test_the_summary_fits(limit: int) -> None:
    text = step_summary(LARGE, limit=limit)
    assert len(text.encode()) <= limit
    assert text.startswith("### ❌ bnfold: fail")
    assert text.count("<details>") == text.count("</details>")
    assert ("does not fit" in text) == (limit < 10_000)


def test_the_hostile_name_is_hostile() -> None:
    assert any(not c.isprintable() for c in HOSTILE)
    with pytest.raises(ET.ParseError):
        ET.fromstring(f"<a>{HOSTILE}</a>".encode("utf-8", "surrogatepass"))
