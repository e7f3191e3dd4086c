"""One sample that stands alone is looked at again: a fault stays, chance does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from bnfold.verify.ends import Pair, Runs
from bnfold.verify.interface import Interface
from bnfold.verify.judge import Measured, Verdict, judge_errors
from bnfold.verify.second_look import NEIGHBOURS, second_look
from bnfold.verify.subject import Feeds, Outputs, RunOptions

U = 2.0**-24
USUAL = (1e-6,) * 8


@dataclass
class Fake:
    """A subject whose error on each run is drawn by ``error``."""

    error: Callable[[], float]
    seen: list[Any] = field(default_factory=list)
    name = "fake"
    inputs = outputs = ()
    unit = U

    def oracle(self) -> Callable[[Feeds], Outputs]:
        return lambda feeds: {"y": np.ones(100)}

    def runner(self, provider: str, options: RunOptions) -> Any:
        return self

    def run(self, feeds: Feeds) -> Outputs:
        self.seen.append(feeds["x"])
        return {"y": np.full(100, 1.0 + self.error())}


def looked(fold: Fake, unfold: Fake, measured: Measured, dtype: Any = np.float32) -> Measured:
    pair: Any = Pair(unfold, fold, Interface({"x": "x"}, {"y": "y"}))
    feeds = [{"x": np.full(4, i + 1.0, dtype)} for i in range(8)]
    (found,) = second_look(pair, Runs("CPU"), feeds, [measured], RunOptions())
    return found


def drawn(*errors: float) -> Fake:
    draws = iter(errors * NEIGHBOURS)
    return Fake(lambda: next(draws))


ALONE = Measured("y", "float64", U, e_fold=(*USUAL[:5], 9e-6, *USUAL[:2]), e_unfold=USUAL)


def test_chance_goes_away_and_a_fault_stays() -> None:
    assert judge_errors(ALONE).verdict is Verdict.FAIL
    chance = looked(drawn(1e-6, 2e-6), drawn(1e-6), ALONE)
    assert judge_errors(chance).verdict is Verdict.PASS
    assert chance.e_fold[:5] == ALONE.e_fold[:5]
    assert 1e-6 < chance.e_fold[5] < 3e-6
    fault = looked(drawn(9e-6), drawn(1e-6), ALONE)
    assert judge_errors(fault).verdict is Verdict.FAIL


def test_neighbours_are_a_rounding_away_and_in_the_type_of_the_input() -> None:
    fold = drawn(1e-6)
    looked(fold, drawn(1e-6), ALONE)
    assert len(fold.seen) == NEIGHBOURS
    for x in fold.seen:
        assert x.dtype == np.float32
        assert 0 < np.abs(x / 6 - 1).max() < 4 * U
    assert len({x.tobytes() for x in fold.seen}) == NEIGHBOURS


@pytest.mark.parametrize(
    "measured",
    [
        Measured("y", "float64", U, e_fold=USUAL, e_unfold=USUAL),
        Measured("y", "float64", U, e_fold=(3e-6,) * 8, e_unfold=USUAL),
    ],
    ids=["passes", "fails on the mean"],
)
def test_nothing_is_run_again_where_no_sample_stands_alone(measured: Measured) -> None:
    fold = drawn(1e-6)
    assert looked(fold, drawn(1e-6), measured) == measured
    assert fold.seen == []
