"""The schema in the repository is what its classes say, and can be written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from bnfold.verify.judge import Verdict
from tools.report_schema import FILE, WIDTH, _define, _schema, main, report_schema, written


def test_the_schema_in_the_repository_is_what_its_classes_say() -> None:
    said = "a class of the report has changed: python -m tools.report_schema"
    assert FILE.read_text(encoding="utf-8") == written(report_schema()) + "\n", said


def test_a_dash_prints_it_and_leaves_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    before = FILE.stat().st_mtime_ns
    main(["-"])
    assert capsys.readouterr().out == FILE.read_text(encoding="utf-8")
    assert FILE.stat().st_mtime_ns == before


@dataclass(frozen=True)
class Inner:
    """An inner one.

    Attributes:
        size: How large ``it``
            is; None where that is not known.
    """

    size: float | None


@dataclass(frozen=True)
class Outer:
    """An outer ``one``.

    Attributes:
        inner: What it holds.
        count: How many.
    """

    inner: tuple[Inner, ...]
    count: int


@dataclass(frozen=True)
class Silent:
    """It says nothing of what it holds."""

    count: int


NUMBER = {"$ref": "#/$defs/number"}


def test_a_class_is_an_object_with_what_its_docstring_says() -> None:
    found: dict[str, Any] = {}
    _define(Outer, found)
    assert set(found) == {"Outer", "Inner"}
    assert found["Outer"]["description"] == "An outer one."
    assert found["Outer"]["required"] == ["inner", "count"]
    assert found["Outer"]["additionalProperties"] is False
    assert found["Outer"]["properties"]["count"] == {
        "description": "How many.", "type": "integer", "minimum": 0,
    }  # fmt: skip
    assert found["Inner"]["properties"]["size"] == {
        "description": "How large it is; null where that is not known.",
        "anyOf": [NUMBER, {"type": "null"}],
    }


def test_a_field_that_is_not_described_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="Silent: its docstring has no attribute count"):
        _define(Silent, {})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (str | None, {"type": ["string", "null"]}),
        (bool, {"type": "boolean"}),
        (float, NUMBER),
        (Verdict, {"enum": ["pass", "inconclusive", "fail"]}),
        (Mapping[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (tuple[str, ...], {"type": "array", "items": {"type": "string"}}),
        (tuple[str, float], {"type": "array", "prefixItems": [{"type": "string"}, NUMBER],
                             "items": False, "minItems": 2}),
    ],
)  # fmt: skip
def test_a_type_has_its_schema(kind: Any, expected: Any) -> None:
    assert _schema(kind, {}) == expected


@pytest.mark.parametrize("kind", [complex, int | str])
def test_a_type_that_no_report_holds_is_refused(kind: Any) -> None:
    with pytest.raises((KeyError, ValueError)):
        _schema(kind, {})


def test_what_fits_on_a_line_stands_on_one() -> None:
    value = {"a": ["x" * 30] * 5, "b": {"c": [1, None, True]}, "d": "y" * 200, "e": []}
    text = written(value)
    assert json.loads(text) == value
    assert '  "b": {"c": [1, null, true]},' in text.splitlines()
    assert [len(line) > WIDTH + 20 for line in text.splitlines()].count(True) == 1
