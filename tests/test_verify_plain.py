"""Frozen dataclasses to JSON's own types and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold.verify.plain import plain, restored


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Leaf:
    size: float
    colour: Colour = Colour.RED


@dataclass(frozen=True, slots=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...] = ()
    best: Leaf | None = None
    pair: tuple[int, str] = (0, "")
    counts: Mapping[str, int] = field(default_factory=dict)
    nested: tuple[tuple[float, float], ...] = ()
    old: bool = False


TREE = Tree(
    "oak", (Leaf(1.5), Leaf(math.inf, Colour.BLUE)), Leaf(-math.inf), (3, "x"), {"a": 1},
    ((1.0, 2.0), (0.0, -1.0)), True,
)  # fmt: skip

finite = st.floats(allow_nan=False)
leaves = st.builds(Leaf, size=finite, colour=st.sampled_from(Colour))
trees = st.builds(
    Tree, name=st.text(), leaves=st.lists(leaves).map(tuple), best=st.none() | leaves,
    pair=st.tuples(st.integers(), st.text()), counts=st.dictionaries(st.text(), st.integers()),
    nested=st.lists(st.tuples(finite, finite)).map(tuple), old=st.booleans(),
)  # fmt: skip


@given(tree=trees)
def test_what_goes_through_json_comes_back(tree: Tree) -> None:
    text = json.dumps(plain(tree), allow_nan=False)
    assert restored(Tree, json.loads(text)) == tree


def test_it_is_strings_numbers_lists_and_mappings() -> None:
    assert plain(TREE) == {
        "name": "oak",
        "leaves": [{"size": 1.5, "colour": "red"}, {"size": "inf", "colour": "blue"}],
        "best": {"size": "-inf", "colour": "red"},
        "pair": [3, "x"],
        "counts": {"a": 1},
        "nested": [[1.0, 2.0], [0.0, -1.0]],
        "old": True,
    }


def test_no_number_is_a_word() -> None:
    assert plain(math.nan) == "nan"
    assert math.isnan(restored(float, "nan"))
    assert restored(float, 3) == 3.0
    assert isinstance(restored(float, 3), float)


def test_unknown_keys_are_ignored_and_missing_ones_have_their_defaults() -> None:
    assert restored(Tree, {"name": "fir", "height": 12}) == Tree("fir")


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "no mapping": ({"name": "oak", "best": [1]}, "best"),
    "a word for a number": ({"name": "oak", "leaves": [{"size": "big"}]}, "leaves: size"),
    "a truth value for a number": ({"name": "oak", "leaves": [{"size": True}]}, "leaves: size"),
    "a number for a truth value": ({"name": "oak", "old": 1}, "old: 1 is out of place"),
    "a number for a name": ({"name": 3}, "name: 3 is out of place"),
    "no such colour": ({"name": "oak", "best": {"size": 1, "colour": "green"}}, "best: colour"),
    "too short": ({"name": "oak", "pair": [3]}, "pair: 1 values, not 2"),
    "a word for a list": ({"name": "oak", "leaves": "none"}, "leaves"),
    "a list for a mapping": ({"name": "oak", "counts": []}, "counts"),
    "a fraction for a count": ({"name": "oak", "counts": {"a": 0.5}}, "counts: 0.5 is out"),
    "a field is missing": ({"leaves": []}, "Tree: .*name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(case: str) -> None:
    stored, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        restored(Tree, stored)
