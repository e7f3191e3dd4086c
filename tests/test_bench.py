"""What is told from times: rounds are pairs, noise is no difference; and how it is shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import jsonschema
import numpy as np
import pytest

import bnfold.report
from bnfold.errors import BnfoldError, UsageError
from bnfold.latency import setting_of
from bnfold.report.as_json import render_json
from bnfold.report.bench import BenchModel, BenchResult, Speed
from bnfold.report.envelope import Envelope, envelope_from_json
from bnfold.report.formats import FORMATS, OF_TIMES, format_of, render
from bnfold.report.github import step_summary
from bnfold.report.model import Size
from bnfold.report.text_bench import render_bench
from bnfold.verify.paired import (
    F64,
    FEWEST,
    LEAST_NOISE,
    MOST_CALLS,
    TURN,
    compared,
    noise_of,
    orders,
    sign_rank,
    take_turns,
)
from bnfold.verify.result import InputUse

ROUNDS = 30
HOSTILE = "a|b`<i>\x1b[2J\n::error::x.onnx"


def seconds(*factors: float, rounds: int = ROUNDS, again: float = 1.0, jitter: float = 0.01) -> F64:
    """Times of a baseline of 10 ms, of models by their factors, and of the baseline again."""
    rng = np.random.default_rng(3)
    drift = np.exp(np.cumsum(rng.normal(0, 0.2, rounds)))  # of the machine, the same for all
    rows = [1.0, *factors, again]
    return np.stack([
        0.01 * drift * factor * np.exp(rng.normal(0, jitter, rounds)) for factor in rows
    ])  # fmt: skip


def result(*factors: float, names: tuple[str, ...] = (), **given: Any) -> BenchResult:
    """What a benchmark of such times finds, on one thread and on two."""
    times = seconds(*factors, **given)
    names = names or ("net.onnx", *(f"net{number}.onnx" for number in range(len(factors))))
    models = tuple(
        BenchModel(name, Size({"Conv": 20, "BatchNormalization": 19, "Gemm": 1, "Relu": 9},
                              1000, 4000), 21)
        for name in names
    )  # fmt: skip
    settings = (setting_of(1, 1, times), setting_of(2, 3, times / 2))
    return BenchResult(
        models, settings, "CPUExecutionProvider", "AMD EPYC", "onnxruntime 1.31.1",
        times.shape[1], 0, (InputUse("x", "float32", ((1, 3, 8, 8),), "normal"),),
        environment={"onnx": "1.23"},
    )  # fmt: skip


def speeds(found: BenchResult) -> list[str]:
    return [timing.speed.value for timing in found.settings[0].timings]


# ---- the statistic ----


@pytest.mark.parametrize(
    ("rounds", "rank"), [(1, 0), (7, 0), (8, 1), (10, 1), (15, 3), (20, 4), (30, 8), (100, 37)]
)
def test_the_interval_ends_at_the_ranks_of_the_tables(rounds: int, rank: int) -> None:
    assert sign_rank(rounds) == rank  # Conover, table of the binomial distribution


@pytest.mark.parametrize("rounds", range(FEWEST, 60))
def test_the_interval_misses_the_median_in_at_most_one_case_of_a_hundred(rounds: int) -> None:
    def missed(rank: int) -> float:
        return math.ldexp(sum(math.comb(rounds, k) for k in range(rank)), 1 - rounds)

    rank = sign_rank(rounds)
    assert missed(rank) <= 0.01 < missed(rank + 1)


def test_fewer_rounds_than_the_fewest_tell_nothing() -> None:
    assert sign_rank(FEWEST) == 1 and sign_rank(FEWEST - 1) == 0
    few = compared(np.full(FEWEST - 1, 2.0), np.ones(FEWEST - 1))
    assert few.interval is None and few.beyond(0.0) == 0


def test_ratios_are_taken_within_a_round() -> None:
    baseline = np.geomspace(1, 1e6, 9)  # no two rounds are alike, the ratio always is
    found = compared(1.5 * baseline, baseline)
    assert found.ratio == pytest.approx(1.5)
    assert found.interval == pytest.approx((1.5, 1.5))


def test_one_round_that_went_wrong_changes_nothing() -> None:
    times = np.ones(ROUNDS)
    times[4] = 1e3
    found = compared(times, np.ones(ROUNDS))
    assert (found.ratio, found.interval) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("low", "high", "noise", "said"),
    [(1.05, 1.1, 0.02, 1), (1.01, 1.1, 0.02, 0), (0.9, 0.95, 0.02, -1), (0.9, 0.99, 0.02, 0),
     (0.9, 1.1, 0.0, 0), (1.05, 1.1, 0.06, 0)],
)  # fmt: skip
def test_a_difference_counts_where_the_whole_interval_is_beyond_the_noise(
    low: float, high: float, noise: float, said: int
) -> None:
    times = np.concatenate([np.full(15, low), np.full(15, high)])
    assert compared(times, np.ones(ROUNDS)).beyond(noise) == said


@pytest.mark.parametrize(
    ("again", "expected"), [(1.0, LEAST_NOISE), (1.1, 0.1), (1 / 1.1, 0.1), (1.001, LEAST_NOISE)]
)
def test_noise_is_what_two_sessions_of_one_model_differ_by(again: float, expected: float) -> None:
    first = np.geomspace(1, 2, ROUNDS)
    assert noise_of(first, first * again) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("factor", "again", "said"),
    [(0.9, 1.0, Speed.FASTER), (1.1, 1.0, Speed.SLOWER), (1.0, 1.0, Speed.SAME),
     (1.01, 1.0, Speed.SAME), (0.99, 1.0, Speed.SAME), (1.1, 1.6, Speed.UNCLEAR)],
)  # fmt: skip
def test_what_is_said_follows_from_the_interval_and_the_noise(
    factor: float, again: float, said: Speed
) -> None:
    _, timing = result(factor, again=again).settings[0].timings
    assert timing.speed is said
    if again == 1.0:
        assert timing.ratio == pytest.approx(factor, rel=0.01)


def test_the_baseline_is_the_mean_of_its_sessions_and_is_held_against_nobody() -> None:
    times = seconds(0.5)
    first = setting_of(1, 1, times).timings[0]
    assert (first.ratio, first.interval, first.speed) == (1.0, None, Speed.BASELINE)
    assert first.milliseconds == pytest.approx(1e3 * np.sqrt(times[0] * times[-1]))


def test_a_model_alone_is_timed() -> None:
    assert speeds(result()) == ["baseline"]


def test_too_few_runs_are_said_to_tell_nothing() -> None:
    assert speeds(result(3.0, rounds=5)) == ["baseline", "unclear"]


@pytest.mark.parametrize("factor", [1.0, 1.1, 0.9])
def test_where_noise_could_hide_a_difference_none_is_denied(factor: float) -> None:
    assert speeds(result(factor, jitter=0.5)) == ["baseline", "unclear"]


# ---- turns ----


@pytest.mark.parametrize("players", range(1, 7))
def test_everybody_is_at_each_place_and_before_each_other_equally_often(players: int) -> None:
    rounds = list(orders(players, 2 * players))
    assert all(sorted(order) == list(range(players)) for order in rounds)
    for place in range(players):
        assert set(Counter(order[place] for order in rounds).values()) == {2}
    before = Counter(
        (a, b) for order in rounds for i, a in enumerate(order) for b in order[i + 1 :]
    )
    assert len(set(before.values())) <= 1


class Clock:
    """Players of known speed that write down when they had their turn."""

    def __init__(self, *speeds: float) -> None:
        self.speeds, self.turns = speeds, list[tuple[int, int, int]]()

    def player(self, index: int) -> Any:
        def play(number: int, calls: int) -> float:
            self.turns.append((index, number, calls))
            return self.speeds[index]

        return play

    def run(self, rounds: int) -> tuple[F64, int]:
        return take_turns([self.player(i) for i in range(len(self.speeds))], rounds, lambda _: None)


@pytest.mark.parametrize(
    ("fastest", "calls"), [(1.0, 1), (TURN, 1), (TURN / 3.5, 4), (1e-9, MOST_CALLS)]
)
def test_a_turn_takes_its_time_and_is_the_same_for_all(fastest: float, calls: int) -> None:
    clock = Clock(2.0, fastest)
    times, found = clock.run(4)
    assert found == calls
    assert times.tolist() == [[2.0] * 4, [fastest] * 4]
    warm, timed = clock.turns[:4], clock.turns[4:]
    assert {index for index, _, _ in warm} == {0, 1}
    assert timed == [
        (index, number, calls) for number, order in enumerate(orders(2, 4)) for index in order
    ]


# ---- --fail-if-slower ----


@pytest.mark.parametrize(
    ("factor", "percent", "fails"),
    [(1.2, 0, True), (1.2, 10, True), (1.2, 25, False), (0.8, 0, False), (1.01, 0, False)],
)
def test_what_is_slower_than_allowed_fails(factor: float, percent: float, fails: bool) -> None:
    found = result(0.7, factor)
    if not fails:
        found.raise_if_slower(percent)
        return
    with pytest.raises(BnfoldError, match=r"than net.onnx.*: net1.onnx takes 1\.\d+ times") as met:
        found.raise_if_slower(percent)
    assert met.value.exit_code == 1
    assert "net0.onnx" not in str(met.value)


def test_too_few_runs_can_not_pass_for_fast() -> None:
    with pytest.raises(UsageError, match=r"7 runs can't tell .*; take at least 8"):
        result(0.5, rounds=7).raise_if_slower()


# ---- how it is shown ----


def test_the_text_has_a_table_of_models_and_one_for_each_number_of_threads() -> None:
    lines = render_bench(result(0.9, 1.1)).splitlines()
    assert lines[0] == "bench: 3 models side by side"
    assert lines[1].endswith("all optimisations on, on CPUExecutionProvider (AMD EPYC)")
    assert "  input x float32 1x3x8x8 (normal)" in lines
    at = lines.index("")
    assert lines[at + 1].split("  ")[-1] == "affine steps"
    assert lines[at + 2].split() == ["net.onnx", "4.0", "kB", "49", "21", "19", "21"]
    heads = [line.split()[:2] for line in lines if "median" in line and "quartiles" in line]
    assert heads == [["1", "thread"], ["2", "threads"]]
    assert [line.rpartition("  ")[2] for line in lines if line.startswith("net") and ".." in line
            ] == ["baseline", "faster", "slower"] * 2  # fmt: skip
    assert lines[-1].endswith("3 calls in a row timed at once")


def test_no_difference_is_said_in_words() -> None:
    assert "no difference beyond noise" in render_bench(result(1.0))


def test_colors_are_only_there_when_asked_for() -> None:
    assert "\x1b" not in render_bench(result(0.9))
    assert "\x1b[32mfaster\x1b[0m" in render_bench(result(0.9), color=True)


def test_markdown_is_one_table_for_a_readme() -> None:
    text = render("markdown", Envelope(bench=result(0.9, 1.1, 1.0)))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {10}
    assert [[sign for sign in "▼▲≈" if sign in row[7]] for row in rows[2:]] == [
        [], ["▼"], ["▲"], ["≈"],
    ]  # fmt: skip
    assert step_summary(Envelope(bench=result(0.9))).startswith("### bnfold: latency")


@pytest.mark.parametrize("form", ["markdown", "text"])
def test_a_hostile_name_breaks_no_table(form: str) -> None:
    text = render(form, Envelope(bench=result(1.0, names=(HOSTILE, "b.onnx"))))
    assert "\x1b" not in text
    assert not any(line.startswith("::") for line in text.splitlines())
    if form == "markdown":
        assert {line.count(" | ") for line in text.splitlines() if line.startswith("|")} == {9}


@pytest.mark.parametrize("rounds", [3, ROUNDS])
def test_json_fits_the_schema_and_is_read_again(rounds: int) -> None:
    envelope = Envelope(bench=result(0.9, 1.1, rounds=rounds))
    text = render_json(envelope)
    jsonschema.Draft202012Validator(bnfold.report.schema()).validate(json.loads(text))
    assert envelope_from_json(text) == envelope
    assert envelope.model == "net.onnx"


@pytest.mark.parametrize("path", ["r.xml", "r.sarif", "r.sarif.json", "r.html", "r.pdf"])
def test_forms_that_are_about_verdicts_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match=r"no format .*\.json \(json\), \.md .*, \.txt \(text\)$"):
        format_of(path, OF_TIMES)
    assert set(OF_TIMES) < set(FORMATS)
