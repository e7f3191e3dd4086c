"""Text and JSON of fixed reports, compared whole."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from bnfold import __version__
from bnfold.report.as_json import render_json
from bnfold.report.envelope import Envelope
from bnfold.report.html import render_html
from bnfold.report.lines import LISTED, human_bytes, one_line
from bnfold.report.markdown import render_markdown
from bnfold.report.model import SCHEMA_VERSION, Report, Size, Step
from bnfold.report.text import (
    count_steps,
    render_explain,
    render_outcome,
    render_report,
)
from bnfold.report.text_check import render_check
from bnfold.verify.judge import Figures, Gates, Verdict
from bnfold.verify.result import (
    CheckResult,
    InputUse,
    OutputResult,
    ProviderRun,
    SiteResult,
    TierResult,
)
from tests import report_samples as samples

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def folded(name: str, into: str) -> Step:
    return Step(
        name,
        "BatchNormalization",
        "folded",
        "backward",
        (into,),
        sentence=f"into {into} before it",
    )


def kept(name: str, code: str, reason: str, sentence: str) -> Step:
    return Step(name, "Mul", "kept", code=code, reason=reason, sentence=sentence)


STEPS = (
    folded("bn1", "conv1"),
    kept(
        "mul1",
        "BNF014",
        "no-linear-neighbour",
        "no constant weight is next to it, only relu1",
    ),
    folded("bn2", "conv2"),
    Step("bn3", "BatchNormalization", "folded", "forward", ("fc",), sentence="into fc after it"),
    kept("mul2", "BNF010", "zero-padding", "its shift does not reach every output of conv3 alike"),
    kept(
        "mul3",
        "BNF014",
        "no-linear-neighbour",
        "no constant weight is next to it, only relu2",
    ),
)
BEFORE = Size({"BatchNormalization": 3, "Conv": 3, "Identity": 1, "Mul": 3}, 1_207_000, 4_828_000)
AFTER = Size({"Add": 1, "Conv": 3, "Mul": 3}, 1_206_750, 4_827_000)
REPORT = Report("net.onnx", "local", STEPS, BEFORE, AFTER)

REPORT_TEXT = """\
net.onnx (level local)

                       before      after   change
BatchNormalization          3          0       -3  -100.0 %
Add                         0          1       +1
Identity                    1          0       -1  -100.0 %
nodes                      10          7       -3   -30.0 %
parameters          1,207,000  1,206,750     -250      ~0 %
bytes                  4.8 MB     4.8 MB  -1.0 kB      ~0 %

6 affine steps: 3 folded (2 backward, 1 forward), 3 kept

kept for BNF010 zero-padding: 1 step
  mul2 (Mul): its shift does not reach every output of conv3 alike

kept for BNF014 no-linear-neighbour: 2 steps
  mul1 (Mul): no constant weight is next to it, only relu1
  mul3 (Mul): no constant weight is next to it, only relu2"""

EXPLAIN_TEXT = """\
net.onnx (level local)
6 affine steps: 3 folded (2 backward, 1 forward), 3 kept

fold  bn1 (BatchNormalization): into conv1 before it
fold  bn2 (BatchNormalization): into conv2 before it
fold  bn3 (BatchNormalization): into fc after it

keep  mul1 (Mul): BNF014 no-linear-neighbour: no constant weight is next to it, only relu1
keep  mul2 (Mul): BNF010 zero-padding: its shift does not reach every output of conv3 alike
keep  mul3 (Mul): BNF014 no-linear-neighbour: no constant weight is next to it, only relu2"""

NUMBERS = Figures(
    e_fold=2e-6,
    e_unfold=1e-6,
    jitter=0.0,
    mean_ratio=math.inf,
    sure_ratio=1.0,
    worst_ratio=math.nan,
)
CHECK = CheckResult(
    "net.onnx",
    "net.folded.onnx",
    (
        TierResult("A", "", Verdict.PASS, "4 folded tensors are correctly rounded"),
        TierResult(
            "C",
            "CPUExecutionProvider",
            Verdict.FAIL,
            "output 'y': its error is 2e-06",
            (
                OutputResult("y", Verdict.FAIL, "output 'y': its error is 2e-06", NUMBERS),
                OutputResult("z", Verdict.INCONCLUSIVE, "output 'z' is the same for every sample"),
                OutputResult("w", Verdict.PASS, "output 'w': fine"),
            ),
        ),
    ),
    samples=8,
    seed=3,
    warnings=("conv1 has a range ratio of 1e5",),
)
CHECK_TEXT = """\
check: fail (8 samples, seed 3)
  tier A: pass: 4 folded tensors are correctly rounded
  tier C on CPUExecutionProvider: fail: output 'y': its error is 2e-06
    also: inconclusive: output 'z' is the same for every sample
  warning: conv1 has a range ratio of 1e5"""


def test_the_report_is_the_table_the_count_and_the_kept_steps_by_reason() -> None:
    assert render_report(REPORT) == REPORT_TEXT


def test_explain_has_a_line_for_each_step() -> None:
    assert render_explain(REPORT) == EXPLAIN_TEXT


def test_a_check_has_a_line_for_each_tier() -> None:
    assert render_check(CHECK) == CHECK_TEXT


CERTIFIED_TEXT = """\
check: fail (8 samples, given)
  tier B: fail: site 'conv2' is off
    site: fail: conv2 (Conv): off by 10,000 times what rounding explains on channel 3 \
(error 0.001, bound 1e-07)
  first wrong site: conv2
  ran 120 of 124 nodes on CUDAExecutionProvider (promise 124), TF32 off (measured 6e-08), jitter 0
  ran on torch:cpu, jitter 1e-08
  input x float32 1x3x8x8, scalar (given)
  gates: rtol 0.001, atol 0
  8 tensors could not be paired: t0, t1, t2, t3, t4, t5 and 2 more
  would have caught: a scale error of 1e-06 on any channel
  warning: w"""


def test_a_check_says_what_it_rests_on() -> None:
    sites = (
        SiteResult("conv1", "Conv", "t", "r", Verdict.PASS, 1e-8, 1e-7, 0.1),
        SiteResult("conv2", "Conv", "t", "r", Verdict.FAIL, 1e-3, 1e-7, 1e4, channel=3),
    )
    cuda = "CUDAExecutionProvider"
    ran, promised = {cuda: 120, "CPUExecutionProvider": 4}, {cuda: 124}
    check = CheckResult(
        "a", "b", (TierResult("B", "", Verdict.FAIL, "site 'conv2' is off", sites=sites),), 8, None,
        warnings=("w",),
        runs=(
            ProviderRun(cuda, "onnxruntime", promised=promised, ran=ran, tf32="off",
                        tf32_error=6e-8),
            ProviderRun("torch:cpu", "torch 2.13", jitter=1e-8),
        ),
        inputs=(InputUse("x", "float32", ((1, 3, 8, 8), ()), "given"),),
        unpaired=tuple(f"t{i}" for i in range(8)), guilty="conv2",
        caught="a scale error of 1e-06 on any channel", gates=Gates(rtol=1e-3),
    )  # fmt: skip
    assert render_check(check) == CERTIFIED_TEXT


@pytest.mark.parametrize("extra", [0, 3])
def test_a_check_lists_so_many_sites_and_no_more(extra: int) -> None:
    sites = tuple(
        SiteResult(f"c{i}", "Conv", "t", "r", Verdict.FAIL, 1, 1, 1) for i in range(LISTED + extra)
    )
    tier = TierResult("B", "", Verdict.FAIL, "off", sites=sites)
    lines = render_check(CheckResult("a", "b", (tier,), 1, 0)).splitlines()
    assert sum(line.startswith("    site: ") for line in lines) == LISTED
    assert (lines[-1] == f"  ... and {extra} more, see --report") == (extra > 0)


def test_a_check_on_given_inputs_names_no_seed() -> None:
    given = CheckResult("a", "b", (), samples=1, seed=None)
    assert render_check(given) == "check: inconclusive (1 sample, given)"


@pytest.mark.parametrize("render", [render_report, render_explain])
@pytest.mark.parametrize("width", [60, 1 << 20])
def test_color_changes_nothing_but_the_color(render: Any, width: int) -> None:
    colored = render(REPORT, color=True, width=width)
    assert ANSI.search(colored)
    assert ANSI.sub("", colored) == render(REPORT, color=False, width=width)


def test_a_check_in_color_says_the_same() -> None:
    colored = render_check(CHECK, color=True)
    assert colored.count("\x1b[31mfail\x1b[0m") == 2
    assert ANSI.sub("", colored) == CHECK_TEXT


def test_a_narrow_terminal_wraps_and_loses_no_word() -> None:
    narrow = render_explain(REPORT, color=False, width=50)
    assert max(len(line) for line in narrow.splitlines()) <= 50
    assert narrow.split() == EXPLAIN_TEXT.split()


def test_a_pipe_is_not_cut() -> None:
    name = "/".join(["block"] * 80)
    long = Report("net.onnx", "local", (kept(name, "BNF001", "x", "why"),), BEFORE)
    assert f"  {name} (Mul): why" in render_report(long).splitlines()


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_a_long_list_is_cut_in_the_report_and_whole_in_explain(extra: int) -> None:
    steps = tuple(kept(f"m{i}", "BNF010", "zero-padding", "s") for i in range(LISTED + extra))
    long = Report("net.onnx", "local", steps, BEFORE, AFTER)
    lines = render_report(long).splitlines()
    assert sum(line.startswith("  m") for line in lines) == LISTED
    assert (lines[-1] == f"  ... and {extra} more, see --report") == (extra > 0)
    explained = render_explain(long).splitlines()
    assert sum(line.startswith("keep  m") for line in explained) == LISTED + extra


def test_a_model_without_affine_steps_says_so() -> None:
    assert count_steps(Report("m", "local", (), BEFORE)) == "no affine steps: nothing to fold"
    assert "before" not in render_report(Report("m", "local", (), BEFORE))


def test_an_unchanged_model_shows_only_the_totals() -> None:
    text = render_report(Report("m", "local", (), BEFORE, BEFORE))
    assert [line.split() for line in text.splitlines()[2:6]] == [
        ["before", "after", "change"],
        ["nodes", "10", "10", "0"],
        ["parameters", "1,207,000", "1,207,000", "0"],
        ["bytes", "4.8", "MB", "4.8", "MB", "0", "B"],
    ]


@pytest.mark.parametrize("hostile", ["\x1b[2Jgone", "two\nlines", "tab\there", "\ud800", "\u202e"])
def test_no_name_can_break_a_line_or_reach_the_terminal(hostile: str) -> None:
    steps = (folded(hostile, hostile), kept(hostile, "BNF010", "zero-padding", hostile))
    size = Size({hostile: 1}, 1, 1)
    report = Report(hostile, "local", steps, size, Size({}, 1, 1))
    plain = Report("n", "local", (folded("n", "n"), kept("n", "BNF010", "zero-padding", "n")),
                   Size({"n": 1}, 1, 1), Size({}, 1, 1))  # fmt: skip
    for render in (render_report, render_explain):
        text = render(report)
        assert hostile not in text
        assert len(text.splitlines()) == len(render(plain).splitlines())
        assert all(line.isprintable() for line in text.splitlines())


def test_what_prints_stays_as_it_is() -> None:
    assert one_line("/blöck/卷积_1 (×2)") == "/blöck/卷积_1 (×2)"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (-999, "-999 B"),
        (1000, "1.0 kB"),
        (-106_240, "-106.2 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (531_483_301, "531.5 MB"),
        (4_000_000_000, "4.0 GB"),
        (3_200_000_000_000, "3.2 TB"),
    ],
)
def test_bytes_have_human_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("written", "checked", "folded", "text"),
    [
        (True, True, True, "written to out.onnx"),
        (True, False, True, "written to out.onnx, not checked"),
        (True, False, False, "written to out.onnx, not checked: nothing was folded"),
        (False, True, True, "nothing was written to out.onnx: the check did not pass"),
    ],
)
def test_the_outcome_says_where_the_file_is(
    written: bool, checked: bool, folded: bool, text: str
) -> None:
    said = render_outcome("out.onnx", written=written, checked=checked, folded=folded)
    assert said == text


def strict(text: str) -> Any:
    """Parse JSON without the NaN and Infinity that Python would let through."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_one_envelope_and_has_everything() -> None:
    data = strict(render_json(Envelope(REPORT, CHECK, "out.onnx")))
    assert list(data) == [
        "schema_version", "tool", "report", "check", "target", "dropped", "reproducer", "bench",
    ]  # fmt: skip
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["tool"] == {"name": "bnfold", "version": __version__}
    assert data["report"] == json.loads(json.dumps(REPORT.to_dict()))
    assert data["check"]["verdict"] == "fail"
    assert data["target"] == "out.onnx"


def test_json_has_a_word_for_what_is_not_finite_and_null_for_what_is_not_there() -> None:
    data = strict(render_json(Envelope(check=CHECK)))
    figures = data["check"]["tiers"][1]["outputs"][0]["figures"]
    assert (figures["mean_ratio"], figures["worst_ratio"]) == ("inf", "nan")
    assert figures["e_fold"] == 2e-6
    assert (data["report"], data["target"], data["reproducer"]) == (None, None, None)
    assert data["dropped"] == []


def test_json_is_ascii_whatever_the_names() -> None:
    odd = Report("卷积\ud800\x1b", "local", (), BEFORE)
    text = render_json(Envelope(odd))
    assert text.isascii()
    assert strict(text)["report"]["source"] == "卷积\ud800\x1b"


def test_operators_that_became_one_are_counted_and_named() -> None:
    text = render_report(samples.report())
    assert "joined: 8 operators became 2 linear operators (1 parallel, 1 serial)" in text
    apart = "linear operators next to each other that stay apart: 1 (1 for BNF027 grows)"
    assert apart in text
    explained = render_explain(samples.report())
    assert "join  conv_kxk (Conv): parallel: does what conv_kxk_1x1, conv_kxk_bn" in explained
    assert "apart fc2 (Gemm): BNF027 grows: one operator in place of fc2 would" in explained


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_every_page_has_operators_that_became_one(render: Callable[[Envelope], str]) -> None:
    text = html.unescape(render(Envelope(samples.report())))
    assert "conv_kxk" in text
    assert "parallel: does what" in text
    assert "BNF027" in text
