"""Weights whose scales lie along one side: no plan asks for others, and what it does is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnfold.affine import AffineMap
from bnfold.channel_graph import Anchor, ChannelGraph, Linear, Operator, Side
from bnfold.passes import plan_local, plan_max
from bnfold.planning import Absorption, Kept, Plan, Reason
from tests.channel_graphs import Builder, Net
from tests.random_channel_graphs import Taste, nets
from tests.test_solver_random import differing

Planner = Callable[[ChannelGraph, Mapping[int, Kept] | None], Plan]

FORMS: tuple[tuple[Side, ...], ...] = (
    (Side.NONE,), (Side.INPUT,), (Side.OUTPUT,), (Side.BOTH,), (Side.OUTPUT, Side.INPUT),
)  # fmt: skip
ANY = st.one_of(
    nets(Taste(nice=False, odd=False, steps=8)), nets(Taste(nice=True, odd=False, steps=8))
)
often = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def quantised(net: Net, seed: int) -> Net:
    """The same net with weights of few scales, the same for all readers of one."""
    rng = np.random.default_rng(seed)
    chosen = {name: FORMS[int(rng.integers(len(FORMS)))] for name in net.weights}

    def narrowed(operator: Operator) -> Operator:
        if not isinstance(operator, Linear) or operator.weight is None:
            return operator
        varies = chosen.get(operator.weight.storage, FORMS[3])
        return replace(operator, weight=replace(operator.weight, varies=varies))

    stated = tuple(narrowed(operator) for operator in net.graph.operators)
    return replace(net, graph=replace(net.graph, operators=stated))


def varying(taken: AffineMap | None, side: Side) -> Side:
    """``side``, unless the scale is one number but for roundings of float64."""
    if taken is None or np.ptp(taken.scale) <= 2.0**-36 * np.abs(taken.scale).max():
        return Side.NONE
    return side


def misplaced(net: Net, plan: Plan) -> list[str]:
    """The operators that are asked for scales which their weights have no place for."""
    wrong = []
    for index, operator in enumerate(net.graph.operators):
        if isinstance(operator, Linear) and operator.weight is not None:
            taken = plan.absorptions.get(index, Absorption())
            asked = varying(taken.input, Side.INPUT) | varying(taken.output, Side.OUTPUT)
            if not any(asked in held for held in operator.weight.varies):
                wrong.append(operator.name)
    return wrong


@pytest.mark.parametrize("planner", [plan_local, plan_max])
@often
@given(net=ANY, seed=st.integers(0, 99))
def test_no_plan_asks_for_a_scale_without_a_place(planner: Planner, net: Net, seed: int) -> None:
    net = quantised(net, seed)
    plan = planner(net.graph, None)
    assert not misplaced(net, plan)
    assert not differing(net, plan)


def test_plans_for_floats_would_be_caught() -> None:
    """Or the test above would say nothing."""
    found: list[int] = []

    @settings(often, max_examples=60, derandomize=True)
    @given(ANY, st.integers(0, 99))
    def count(net: Net, seed: int) -> None:
        found.append(len(misplaced(quantised(net, seed), plan_max(net.graph))))

    count()
    assert sum(found) > 5


def one(varies: tuple[Side, ...], before: AffineMap | None, behind: AffineMap | None) -> Net:
    """step, linear operator, step; either of the two may be left out."""
    make = Builder()
    x = make.input(2)
    value = x if before is None else make.step(x, before)
    value = make.linear(value, 2)
    if behind is not None:
        value = make.step(value, behind)
    make.anchors[value] = Anchor.OUTPUT
    net = make.done()
    stated = tuple(
        replace(op, weight=replace(op.weight, varies=varies))
        if isinstance(op, Linear) and op.weight is not None else op
        for op in net.graph.operators
    )  # fmt: skip
    return replace(net, graph=replace(net.graph, operators=stated))


APART, ALIKE = AffineMap.of([2.0, 3.0], [1.0, -1.0]), AffineMap.of([3.0, 3.0], [1.0, -1.0])
ROWS = [
    ((Side.OUTPUT,), None, APART, 0),
    ((Side.OUTPUT,), APART, None, 1),
    ((Side.OUTPUT,), ALIKE, APART, 0),
    ((Side.INPUT,), APART, ALIKE, 0),
    ((Side.INPUT,), None, APART, 1),
    ((Side.NONE,), ALIKE, ALIKE, 0),
    ((Side.NONE,), None, APART, 1),
    ((Side.BOTH,), APART, APART, 0),
    ((Side.OUTPUT, Side.INPUT), APART, None, 0),
    ((Side.OUTPUT, Side.INPUT), None, APART, 0),
    ((Side.OUTPUT, Side.INPUT), APART, APART, 1),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("planner", [plan_local, plan_max])
def test_scales_lie_along_one_side(
    planner: Planner,
    row: tuple[tuple[Side, ...], AffineMap | None, AffineMap | None, int],
) -> None:
    varies, before, behind, left = row
    net = one(varies, before, behind)
    plan = planner(net.graph, None)
    assert [kept.reason for kept in plan.kept] == [Reason.WEIGHT_TYPE] * left
    assert all("quantised, with no scale for each" in kept.detail for kept in plan.kept)
    assert not misplaced(net, plan)
    assert not differing(net, plan)
