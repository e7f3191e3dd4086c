"""`tools.latency` keeps what it has measured, shows what failed, and counts what is slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnfold.report.bench import BenchResult, Speed
from tests.test_bench import result
from tools import latency
from tools.compare import Outcome, Steps
from tools.latency import arguments, load, save
from tools.latency_table import Row, mean, report

TOOLS = ("onnxsim", "onnxslim", "bnfold")


def row(*factors: float, again: float | None = None, **given: Any) -> Row:
    found = None if again is None else result(*factors[:-1], again)
    return Row("net", ("1",), TOOLS, {}, result(*factors, **given), found)


class Faked:
    """Tools that make copies and a benchmark that finds what it is told to find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, str] = {}
        self.unusable = ""
        self.factors: list[float] = [1.0, 1.0, 1.0]
        self.runs: list[tuple[int, int]] = []
        monkeypatch.setattr(latency, "made", self.made)
        monkeypatch.setattr(latency, "timed", self.timed)

    def made(self, tool: str, source: Path, target: Path, level: str, limit: float) -> Outcome:
        assert level == "max"
        target.write_bytes(source.read_bytes())
        return Outcome(None, self.failing[tool]) if tool in self.failing else Outcome(Steps())

    def timed(self, files: Sequence[Path], options: Any) -> BenchResult | str:
        assert all(path.is_file() for path in files)
        if self.unusable and any(self.unusable in str(path) for path in files):
            return self.unusable
        if options.runs == 1:
            return result(1.0)
        self.runs.append((len(files), options.runs))
        return result(*self.factors[: len(files) - 1])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Faked:
    return Faked(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"a model")
    return path


def run(model: Path, *words: str) -> list[Row]:
    options = arguments([str(model), "--json", str(model.parent / "kept.json"), *words])
    return latency.all_measured([model], options)


def test_every_tool_is_timed_beside_the_original(fake: Faked, model: Path) -> None:
    (found,) = run(model, "--runs", "9")
    assert fake.runs == [(4, 9)]
    assert (found.model, found.tools, found.failures) == ("net", TOOLS, {})


def test_what_is_kept_is_not_measured_again(fake: Faked, model: Path) -> None:
    first = run(model)
    assert run(model) == first and len(fake.runs) == 1
    run(model, "--runs", "8")
    run(model, "--only", "bnfold")
    model.write_bytes(b"another model")
    run(model, "--only", "bnfold")
    assert fake.runs == [(4, 30), (4, 8), (2, 30), (2, 30)]


def test_what_is_unclear_is_measured_again_when_asked_for(fake: Faked, model: Path) -> None:
    run(model, "--unclear")
    run(model, "--unclear")
    assert len(fake.runs) == 1
    kept = model.parent / "kept.json"
    rows = load(kept)
    (key,) = rows
    save(kept, {key: replace(rows[key], bench=result(1.0, 1.0, 1.0, jitter=0.5))})
    run(model)
    assert len(fake.runs) == 1
    assert not run(model, "--unclear")[0].unclear("bnfold")
    assert len(fake.runs) == 2


@pytest.mark.parametrize("way", ["tool", "result"])
def test_a_tool_that_fails_is_shown_as_failed_and_the_others_are_timed(
    fake: Faked, model: Path, way: str
) -> None:
    if way == "tool":
        fake.failing["onnxslim"] = "onnxslim/ says no"
    else:
        fake.unusable = "onnxslim/"
    (found,) = run(model)
    assert found.tools == ("onnxsim", "bnfold") and fake.runs == [(3, 30)]
    assert "onnxslim/" in found.failures["onnxslim"]
    assert found.ratio("onnxslim", 1) == 1.0
    text = report([found], TOOLS)
    assert "net: onnxslim failed: onnxslim/" in text and "| failed |" in text


@pytest.mark.parametrize(
    ("first", "again", "slower"), [(1.2, None, [1, 2]), (1.2, 1.2, [1, 2]), (1.2, 1.0, [])]
)
def test_only_what_is_slower_both_times_counts(
    first: float, again: float | None, slower: list[int]
) -> None:
    found = row(1.0, 1.0, first, again=again)
    assert [setting.threads for setting in found.slower("bnfold")] == slower
    assert found.slower("onnxsim") == []


@pytest.mark.parametrize(("factor", "runs"), [(1.0, 1), (0.8, 1), (1.2, 2)])
def test_a_model_that_bnfold_makes_slower_is_timed_once_more(
    fake: Faked, model: Path, factor: float, runs: int
) -> None:
    fake.factors = [1.0, 1.0, factor]
    (found,) = run(model)
    assert len(fake.runs) == runs
    assert (found.again is not None) == (runs == 2)


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = {"a": row(1.0, 1.1, 0.9, again=1.0), "b": Row("b", (), (), {"original": "broken"})}
    save(tmp_path / "kept.json", rows)
    assert load(tmp_path / "kept.json") == rows
    assert load(tmp_path / "none.json") == {}


def test_means_are_geometric_and_over_all_that_were_timed() -> None:
    rows = [row(1.0, 1.0, 0.5, jitter=0.0), row(1.0, 1.0, 2.0, jitter=0.0), Row("c", ())]
    assert mean(rows, "bnfold", 1) == pytest.approx(1.0)
    assert mean(rows[:1], "bnfold", 2) == pytest.approx(0.5)
    assert mean([], "bnfold", 1) == 1.0


def test_the_table_has_every_column_and_ends_with_the_sums() -> None:
    broken = Row("c", (), (), {"original": "broken"})
    lines = report([row(1.0, 0.8, 1.2), broken], TOOLS).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert {len(cells) for cells in rows} == {1 + 2 + 2 * 3 + 1}
    assert [cells[5][-1] for cells in rows[1:2]] == ["▲"]
    assert rows[1][-1] == "49, 49, 49, 49 |"
    assert rows[-1][0] == "| **geometric mean**"
    bnfold = next(line for line in lines if line.startswith("- bnfold: "))
    assert "on 1 of 2 models: net (1." in bnfold and "on 2 threads)" in bnfold
    assert "- c: original failed: broken" in lines


def test_nothing_that_was_timed_is_said_so() -> None:
    assert report([Row("c", ())], TOOLS).startswith("Nothing was timed.")


def test_a_real_model_goes_through(tmp_path: Path) -> None:
    model = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
    words = ["--json", str(tmp_path / "kept.json"), "--table", str(tmp_path / "table.md"),
             "--only", "bnfold", "--runs", "2", "--threads", "1"]  # fmt: skip
    assert latency.main([str(model), *words]) == 0
    (found,) = load(tmp_path / "kept.json").values()
    assert found.failures == {} and found.tools == ("bnfold",)
    timing = found.timing("bnfold", 1)
    assert timing is not None and timing.speed is Speed.UNCLEAR  # two runs tell nothing
    assert "digits_resnet" in (tmp_path / "table.md").read_text()
