"""Whatever a planner decides on a random graph, the folded graph computes the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import Anchor, Bias, ChannelGraph, Form, Linear, ValueId
from bnfold.passes import plan_local, plan_max
from bnfold.planning import Absorption, Kept, Plan, Reason, Units
from tests.channel_graph_runs import execute, impossible
from tests.channel_graphs import Builder, Net
from tests.random_channel_graphs import Taste, nets

Planner = Callable[[ChannelGraph, Mapping[int, Kept] | None], Plan]

PLAIN = nets(Taste(nice=False, odd=False, steps=8))
ODD = nets(Taste(nice=False, odd=True, steps=8))
POSITIVE = nets(Taste(nice=False, odd=False, steps=8, negative=0.0))
NICE = nets(Taste(nice=True, odd=False, steps=8, negative=0.05))
ANY = st.one_of(PLAIN, ODD, POSITIVE, NICE)

# A step with a scale of 1e-6 in the net may cost six of the sixteen digits, two of them must not.
TOLERANCE = 1e-9

often = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
seldom = settings(often, max_examples=100)


def feeds(net: Net, seed: int = 0) -> dict[ValueId, F64]:
    rng = np.random.default_rng(seed)
    entries = [v for v, anchor in net.graph.anchors.items() if anchor is Anchor.INPUT]
    return {v: rng.normal(size=net.shapes[v]) for v in entries}


def differing(net: Net, plan: Plan) -> list[ValueId]:
    """The values seen from outside that the plan changes."""
    data = feeds(net)
    before, after = execute(net, data), execute(net, data, plan)
    largest = max(float(np.abs(v).max()) for v in before.values())
    close = {v: np.abs(before[v] - after[v]).max() <= TOLERANCE * (1 + largest) for v in before}
    return [v for v in net.graph.anchors if not close[v]]


def around(net: Net, plan: Plan, step: int) -> AffineMap:
    own = net.steps[step].map
    assert own is not None
    return plan.absorptions.get(step, Absorption()).around(own)


def test_the_planners_fold_something_on_these_graphs() -> None:
    """Or the tests below would say nothing."""
    counts: list[int] = []

    @settings(often, max_examples=60, derandomize=True)
    @given(ANY)
    def count(net: Net) -> None:
        counts.append(len(plan_max(net.graph).folds))

    count()
    assert sum(counts) > 60


@pytest.mark.parametrize("planner", [plan_local, plan_max])
@often
@given(net=ANY)
def test_the_folded_graph_computes_the_same(planner: Planner, net: Net) -> None:
    plan = planner(net.graph, None)
    assert not differing(net, plan)
    assert not impossible(net, plan)


@often
@given(ANY)
def test_every_step_is_folded_or_kept_with_a_witness(net: Net) -> None:
    plan = plan_max(net.graph)
    decided = [fold.step for fold in plan.folds] + [kept.step for kept in plan.kept]
    assert sorted(decided) == sorted(net.steps)
    assert all(kept.witness and all(kept.witness) for kept in plan.kept)


@often
@given(ANY)
def test_what_others_see_is_in_true_units(net: Net) -> None:
    plan = plan_max(net.graph)
    assert not set(plan.units) & set(net.graph.anchors)


@seldom
@given(ANY)
def test_a_value_in_other_units_says_in_which(net: Net) -> None:
    plan, data = plan_max(net.graph), feeds(net)
    true, stored = execute(net, data), execute(net, data, plan)
    largest = max(float(np.abs(v).max()) for v in true.values())
    for value, units in plan.units.items():
        said = read_back(stored[value], units)
        known = np.isfinite(said)
        error = np.abs(said - true[value])[known]
        assert error.max(initial=0) <= TOLERANCE * (1 + largest)


def read_back(stored: F64, units: Units) -> F64:
    """The true value of what is stored in ``units``."""
    sizes = [stored.shape[axis] for axis in units.axes]
    wide = units.map.expand(int(np.prod(sizes)))
    shape = [size if axis in units.axes else 1 for axis, size in enumerate(stored.shape)]
    return stored * wide.scale.reshape(shape) + wide.shift.reshape(shape)


@often
@given(ANY)
def test_a_mul_or_add_that_stays_is_still_a_mul_or_an_add(net: Net) -> None:
    plan = plan_max(net.graph)
    for kept in plan.kept:
        step = net.steps[kept.step]
        if step.form is Form.EITHER and step.map is not None:
            own = around(net, plan, kept.step)
            assert own.is_scaling or own.is_shifting


@often
@given(st.one_of(PLAIN, POSITIVE, NICE))
def test_no_more_is_left_than_between_direct_neighbours(net: Net) -> None:
    assert net.left(plan_max(net.graph)) <= net.left(plan_local(net.graph))


@seldom
@given(ANY, st.integers(0, 255))
def test_refused_steps_stay_as_they_are_told(net: Net, mask: int) -> None:
    chosen = [step for k, step in enumerate(net.steps) if mask >> k & 1]
    refused = {i: Kept(i, Reason.RANGE, ("conv",), "overflows on channel 0") for i in chosen}
    plan = plan_max(net.graph, refused)
    assert set(refused.values()) <= set(plan.kept)
    assert not differing(net, plan)


@seldom
@given(ANY)
def test_a_graph_is_planned_the_same_way_twice(net: Net) -> None:
    one, other = plan_max(net.graph), plan_max(net.graph)
    assert (one.folds, one.kept) == (other.folds, other.kept)


# ---- the judge itself is seen to say no ----


def folding_net() -> Net:
    net = Builder()
    x = net.linear(net.input())
    x = net.step(x, AffineMap.of([2.0, -0.5], [1.0, 0.25]))
    net.linear(net.relu(x))
    return net.done()


def test_a_plan_that_drops_an_absorption_is_caught() -> None:
    net = folding_net()
    plan = plan_local(net.graph)
    assert plan.absorptions
    assert not differing(net, plan)
    assert differing(net, replace(plan, absorptions={}))


def test_a_shift_that_is_moved_through_zero_padding_is_caught() -> None:
    net = Builder()
    taken = AffineMap.of([2.0, -0.5], [1.0, 0.25])
    net.padded(net.step(net.opaque(net.input()), taken))
    made = net.done()
    honest = plan_local(replace_barrier(made).graph)
    assert honest.folds
    assert differing(made, honest)
    scaling = {2: Absorption(input=AffineMap.scaling(taken.scale))}
    assert differing(made, replace(honest, absorptions=scaling))


def replace_barrier(net: Net) -> Net:
    """The same graph, but it does not say that it pads."""
    operators = tuple(
        replace(op, shift_barrier="") if isinstance(op, Linear) else op
        for op in net.graph.operators
    )
    return replace(net, graph=replace(net.graph, operators=operators))


@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ("relu", Absorption(output=AffineMap.scaling(2.0))),
        ("no bias that could be changed", Absorption(output=AffineMap.shifting(2.0))),
        ("no weight that could be scaled", Absorption(input=AffineMap.scaling(2.0))),
        ("shares its weight", Absorption(input=AffineMap.scaling(2.0))),
    ],
)
def test_what_an_operator_can_not_store_is_caught(what: str, taken: Absorption) -> None:
    net = Builder()
    x = net.relu(net.input())
    x = net.linear(x, bias=Bias.DYNAMIC)
    x = net.linear(x, weight=None)
    net.linear(net.linear(x, storage="both"), storage="both")
    at = {"relu": 0, "no bias that could be changed": 1, "no weight that could be scaled": 2}
    plan = Plan("max", (), (), {at.get(what, 3): taken})
    assert what in impossible(net.done(), plan)[0]
