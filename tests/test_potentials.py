"""Unknowns up to one free value a class, and sums of them: against known values and by sabotage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfold.passes.constraints import Sums
from bnfold.passes.potentials import Edges, Potentials
from bnfold.passes.shift_sums import solve_sums

SEEDS = st.integers(0, 2**32 - 1)
COUNT = 40


def relations(seed: int) -> tuple[np.ndarray, Edges]:
    """Values for all unknowns, the first being 0, and edges that these satisfy."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, COUNT)
    values[0] = 0
    source, target = rng.integers(0, COUNT, (2, rng.integers(1, 2 * COUNT)))
    slope = rng.choice([1.0, 1.0, -1.0], source.size)  # no path makes rounding grow
    slope[source == target] = 1.0
    return values, Edges.of(source, target, slope, values[target] - slope * values[source])


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_relations_that_hold_are_taken_and_known_values_found(seed: int) -> None:
    values, edges = relations(seed)
    found, wrong = Potentials.free(COUNT, 0.0).joined(edges)
    assert found is not None
    assert not wrong.any()
    anchored = found.root == 0
    np.testing.assert_allclose(found.offset[anchored], values[anchored], rtol=1e-6, atol=1e-6)
    whole = found.slope * values[found.root] + found.offset
    np.testing.assert_allclose(whole, values, rtol=1e-6, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_one_relation_that_does_not_hold_is_noticed(seed: int) -> None:
    values, edges = relations(seed)
    plain = Edges.of(edges.source, edges.target, 1.0, (values[edges.target] - values[edges.source]))
    found = Potentials.free(COUNT, 0.0).joined(plain)[0]
    assert found is not None
    at = np.flatnonzero((found.root == 0) & (np.arange(COUNT) > 0))
    if not at.size:
        return
    lie = Edges.of(np.zeros(1, np.int64), at[:1], 1.0, values[at[:1]] + 0.1)
    again, wrong = found.joined(lie)
    assert again is None
    assert wrong.all()


def test_two_lines_through_one_unknown_give_its_value() -> None:
    # x1 = 2 x2 + 1 and x1 = -x2 + 4: x2 = 1, x1 = 3
    two, one = np.array([2, 2]), np.array([1, 1])
    found, _ = Potentials.free(3, 0.0).joined(Edges.of(two, one, [2.0, -1.0], [1.0, 4.0]))
    assert found is not None
    assert found.root.tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.offset, [0, 3, 1])


def sums(rows: list[list[int]], factors: list[list[float]], constant: list[float]) -> Sums:
    return Sums(np.array(rows), np.array(factors), np.array(constant), np.arange(len(rows)))


@pytest.mark.parametrize(
    ("rows", "factors", "constant", "solvable"),
    [
        ([[1, 2, 3]], [[-1, 1, 1]], [5.0], True),
        ([[0, 0, 0]], [[-1, 1, 1]], [0.0], True),
        ([[0, 0, 0]], [[-1, 1, 1]], [5.0], False),
        # Three unknowns, each in more than one equation.
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[1, 1, 1], [1, -1, 1], [1, 1, -1]], [1, 2, 3], True),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[1, 1, 1], [1, 1, 1], [1, 2, 1]], [1, 2, 3], False),
        # One unknown, then none.
        ([[1, 0, 0], [1, 0, 0]], [[2, 1, 1], [1, 1, 1]], [4.0, 2.0], True),
        ([[1, 0, 0], [1, 0, 0]], [[2, 1, 1], [1, 1, 1]], [4.0, 3.0], False),
        # The same unknown twice: x - x = 0.
        ([[1, 1, 0]], [[1, -1, 1]], [0.0], True),
        ([[1, 1, 0]], [[1, -1, 1]], [1.0], False),
    ],
)
def test_sums_are_solvable_or_not(
    rows: list[list[int]], factors: list[list[float]], constant: list[float], solvable: bool
) -> None:
    solved = solve_sums(sums(rows, factors, constant), Potentials.free(4, 0.0))
    assert (solved is not None) == solvable
