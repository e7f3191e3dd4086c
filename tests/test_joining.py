"""Which linear operators become one, decided on the channel graph alone, and why others don't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from bnfold.affine import AffineMap
from bnfold.channel_graph import POINT, Anchor, Bias, Linear, Taps, ValueId, Weight
from bnfold.passes import plan_local, plan_max
from bnfold.planning import How, Joining, Kept, Merge, Plan, Reason
from tests.kernel_runs import run
from tests.linear_graphs import Net

POINTS = (POINT, POINT)
THREE = Taps.of(3, begin=1, end=1)
FIVE = Taps.of(5, begin=2, end=2)
WIDE = Taps.of(3, dilation=2, begin=2, end=2)
FREE = Taps.of(3)
HALF = Taps.of(3, 2, begin=1, end=1)
STEP = Taps.of(1, 2)

Case = Callable[[Net], object]


def planned(case: Case) -> tuple[Net, Plan]:
    """The net of ``case`` between operators that nothing is known of, and its plan."""
    net = Net()
    case(net)
    return net, plan_max(net.graph())


def assert_right(net: Net, plan: Plan) -> None:
    """Every merge computes what the operators computed that it stands for."""
    values = net.values()
    for merge in plan.merges:
        made = run(net.merged(merge), values[merge.source])
        np.testing.assert_allclose(made, values[merge.target], atol=1e-11)


# ---- what becomes one ----


@dataclass(frozen=True, slots=True)
class One:
    """One operator: what it reads, in how many groups."""

    taps: tuple[Taps, ...]
    groups: int = 1
    kind: Joining = Joining.PARALLEL


def every_branch(net: Net) -> None:
    x = net.input()
    branches = [net.conv(x, 4, *taps) for taps in ((THREE, THREE), POINTS, (POINT, THREE))]
    branches += [net.step(net.conv(x, 4, THREE, POINT, bias=False)), net.step(x)]
    scaled = net.step(net.conv(x, 4), AffineMap.scaling([2.0]), axis=None)
    net.step(net.sum(*branches, x, scaled))


def nested_sums(net: Net) -> None:
    x = net.input()
    one = net.sum(net.conv(x, 4, THREE, THREE), net.conv(x))
    net.sum(net.sum(one, net.step(x)), net.identity(net.conv(x, 4, POINT, THREE)))


def difference(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.conv(x), x, signs=(1, -1, -1))


def twice(net: Net) -> None:
    x = net.input()
    net.sum(x, x, net.conv(x))


def the_same_value_twice(net: Net) -> None:
    made = net.conv(net.input())
    net.sum(made, made)


def behind_a_relu_with_negative_scales(net: Net) -> None:
    x = net.relu(net.conv(net.input()))
    net.relu(net.sum(net.step(net.conv(x, 4, THREE, THREE, bias=False)), net.step(x)))


def grouped(net: Net) -> None:
    x = net.input(6)
    net.sum(net.conv(x, 6, THREE, THREE, groups=2), net.conv(x, 6, groups=2), net.step(x))


def depthwise(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE, groups=4), net.conv(x, 4, groups=4), net.step(x))


def depthwise_beside_dense_of_one_channel(net: Net) -> None:
    x = net.input(1)
    net.sum(net.conv(x, 1, THREE, THREE, groups=1), net.conv(x, 1))


def dilated_beside_a_point(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, WIDE, WIDE), net.conv(x))


def dilated_beside_a_larger_one(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, WIDE, WIDE), net.conv(x, 4, FIVE, FIVE))


def average_beside(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.pool(x, THREE, THREE), net.conv(x))


def halved(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 8, HALF, HALF), net.step(net.conv(x, 8, STEP, STEP)))


def off_centre(net: Net) -> None:
    """Positions -1 0 1 and 0 1 2: four in all, of six weights each."""
    x = net.input(4, 8)
    net.sum(net.conv(x, 4, THREE), net.conv(x, 4, Taps.of(3, end=2)))


def chains_beside_each_other(net: Net) -> None:
    """Diverse branches: a chain, a chain with an average, a window."""
    x = net.input()
    chain = net.conv(net.step(net.conv(x, bias=False), AffineMap.scaling([2.0])), 4, THREE, THREE)
    average = net.pool(net.conv(x, bias=False), THREE, THREE)
    net.sum(chain, average, net.conv(x, 4, THREE, THREE))


def lines(net: Net) -> None:
    x = net.input(4, 9)
    net.sum(net.conv(x, 4, FIVE), net.conv(x, 4, THREE), net.step(x))


def volumes(net: Net) -> None:
    x = net.input(2, 5, 4, 5)
    net.sum(net.conv(x, 2, THREE, THREE, THREE), net.conv(x, 2, POINT, THREE, POINT), x)


def matrices(net: Net) -> None:
    x = net.input(4, 1)
    x = net.conv(x, taps=None)  # of which nothing is known
    net.sum(net.conv(x), net.step(net.conv(x)), x)


PARALLEL: list[tuple[Case, One]] = [
    (every_branch, One((THREE, THREE))), (nested_sums, One((THREE, THREE))),
    (difference, One((THREE, THREE))), (twice, One(POINTS)), (the_same_value_twice, One(POINTS)),
    (behind_a_relu_with_negative_scales, One((THREE, THREE))),
    (grouped, One((THREE, THREE), 2)), (depthwise, One((THREE, THREE), 4)),
    (depthwise_beside_dense_of_one_channel, One((THREE, THREE))),
    (dilated_beside_a_point, One((WIDE, WIDE))), (dilated_beside_a_larger_one, One((FIVE, FIVE))),
    (average_beside, One((THREE, THREE))), (halved, One((HALF, HALF))),
    (off_centre, One((Taps.of(4, begin=1, end=2),))),
    (chains_beside_each_other, One((THREE, THREE))), (lines, One((FIVE,))),
    (volumes, One((THREE,) * 3)), (matrices, One((POINT,))),
]  # fmt: skip


def point_then_window(net: Net) -> None:
    net.conv(net.step(net.conv(net.input())), 4, FREE, FREE)


def point_then_padded_window_without_a_shift(net: Net) -> None:
    scale = AffineMap.scaling([2.0, -1.0, 0.0, 1.0])
    net.conv(net.step(net.conv(net.input(), bias=False), scale), 4, THREE, THREE)


def window_then_point(net: Net) -> None:
    net.step(net.conv(net.step(net.conv(net.input(), 4, THREE, THREE)), 4))


def strided_point_then_window(net: Net) -> None:
    """4 channels to 1 to 4: a quarter of the positions."""
    net.conv(net.conv(net.input(1), 1, STEP, STEP), 2, FREE, FREE)


def pad_then_window(net: Net) -> None:
    net.conv(net.pool(net.input(), Taps.of(1, begin=1, end=1), Taps.of(1)), 4, FREE, FREE)


def cut_then_padded_window(net: Net) -> None:
    """What is cut off comes back as weights of zero, and is paid for by the one before."""
    cut = net.pool(net.conv(net.input(4, 9)), Taps.of(1, begin=-1, end=0))
    net.conv(cut, 4, FREE)


def expanding_then_narrowing(net: Net) -> None:
    net.conv(net.conv(net.input(2), 8), 2, FREE, FREE)


def three_in_a_row(net: Net) -> None:
    net.conv(net.conv(net.conv(net.input(2)), 2, THREE, THREE), 2)


def depthwise_then_depthwise_point(net: Net) -> None:
    net.conv(net.conv(net.input(), 4, THREE, THREE, groups=4), 4, groups=4)


SERIAL: list[tuple[Case, One]] = [
    (point_then_window, One((FREE, FREE), 1, Joining.SERIAL)),
    (point_then_padded_window_without_a_shift, One((THREE, THREE), 1, Joining.SERIAL)),
    (window_then_point, One((THREE, THREE), 1, Joining.SERIAL)),
    (strided_point_then_window,
     One((Taps(3, 0, 2, 2, -5), Taps(3, 0, 2, 2, -5)), 1, Joining.SERIAL)),
    (pad_then_window, One((THREE, FREE), 1, Joining.SERIAL)),
    (cut_then_padded_window, One((Taps(4, 0, 1, 1, -4),), 1, Joining.SERIAL)),
    (expanding_then_narrowing, One((FREE, FREE), 1, Joining.SERIAL)),
    (three_in_a_row, One((THREE, THREE), 1, Joining.SERIAL)),
    (depthwise_then_depthwise_point, One((THREE, THREE), 4, Joining.SERIAL)),
]  # fmt: skip


def named(cases: list[tuple[Case, One]]) -> list[object]:
    return [pytest.param(case, one, id=case.__name__) for case, one in cases]


@pytest.mark.parametrize(("case", "one"), named(PARALLEL + SERIAL))
def test_what_is_linear_as_a_whole_becomes_one_operator(case: Case, one: One) -> None:
    net, plan = planned(case)
    (merge,) = plan.merges
    assert (merge.taps, merge.groups, merge.kind) == (one.taps, one.groups, one.kind)
    assert not plan.kept
    assert not plan.apart
    assert_right(net, plan)


@pytest.mark.parametrize("case", [c for c, _ in PARALLEL + SERIAL], ids=lambda c: c.__name__)
def test_what_became_one_has_no_more_weights_than_before(case: Case) -> None:
    net, plan = planned(case)
    (merge,) = plan.merges
    before = [net.kernels[i].weight.size for i in merge.operators if i in net.kernels]
    steps = [net.operators[i] for i in merge.operators if i not in net.kernels]
    assert net.merged(merge).weight.size <= sum(before) + 8 * len(steps)


@pytest.mark.parametrize("case", [c for c, _ in PARALLEL + SERIAL], ids=lambda c: c.__name__)
def test_neighbours_alone_are_not_joined_at_level_local(case: Case) -> None:
    net = Net()
    case(net)
    assert not plan_local(net.graph()).merges


def test_steps_in_a_joint_are_folded_into_it_and_others_are_folded_as_ever() -> None:
    net = Net()
    x = net.relu(net.step(net.conv(net.input())))
    total = net.sum(net.step(net.conv(x, 4, THREE, THREE)), net.step(x))
    net.relu(net.step(total))
    plan = plan_max(net.graph())
    (merge,) = plan.merges
    hows = {fold.step: (fold.how, fold.into) for fold in plan.folds}
    inner = [i for i in merge.operators if net.operators[i].name.startswith("bn")]
    assert len(inner) == 2
    assert all(hows[i] == (How.JOINED, (merge.into,)) for i in inner)
    assert sorted(how.name for how, _ in hows.values()) == ["BACKWARD"] * 2 + ["JOINED"] * 2
    assert plan.joined == set(merge.operators) - {merge.into}


def test_the_largest_operator_stays() -> None:
    net, plan = planned(every_branch)
    (merge,) = plan.merges
    stays = net.operators[merge.into]
    assert isinstance(stays, Linear)
    assert stays.taps == (THREE, THREE)


def test_blocks_one_behind_the_other_are_joined_each() -> None:
    net = Net()
    x = net.input()
    for _ in range(3):
        x = net.relu(net.sum(net.step(net.conv(x, 4, THREE, THREE)), net.step(net.conv(x)), x))
    plan = plan_max(net.graph())
    assert len(plan.merges) == 3
    assert not plan.kept
    assert_right(net, plan)


def test_both_ends_of_a_joint_may_be_seen() -> None:
    net = Net()
    x = net.input()
    made = net.sum(net.conv(x), x)
    net.anchors[made] = Anchor.CAPTURED
    net.relu(made)
    plan = plan_max(net.graph())
    assert len(plan.merges) == 1
    assert_right(net, plan)


# ---- terms of a sum ----


def terms(net: Net, early: Taps, late: Taps) -> None:
    """((u + early x) + (v + (w + late x))), made in this order."""
    x = net.input()
    others = [net.relu(x) for _ in range(3)]
    first = net.sum(others[0], net.conv(x, 4, early, early))
    inner = net.sum(others[2], net.conv(x, 4, late, late))
    net.sum(first, net.sum(others[1], inner))


@pytest.mark.parametrize(("early", "late"), [(POINT, THREE), (THREE, POINT)])
def test_what_terms_become_stands_before_the_sum_that_reads_it(early: Taps, late: Taps) -> None:
    net, plan = planned(lambda net: terms(net, early, late))
    (merge,) = plan.merges
    assert len(merge.terms) == 2
    (left,) = merge.left
    readers = [i for i, op in enumerate(net.operators) if merge.target in op.inputs]
    assert merge.into < min(readers)
    assert left.total not in readers
    kernel, values = net.merged(merge), net.values()
    expected = sum(term.sign * values[term.value] for term in merge.terms)
    np.testing.assert_allclose(run(kernel, values[merge.source]), expected, atol=1e-11)


def test_a_thousand_sums_in_a_row_are_no_problem() -> None:
    net = Net()
    x = net.input(2, 3)
    total = net.relu(x)
    for _ in range(1100):
        total = net.sum(total, net.relu(x))
    assert not plan_max(net.graph()).merges


# ---- padding on both sides alike ----


def test_where_padding_is_the_same_on_both_sides_more_weights_are_counted() -> None:
    """Positions -1 0 as padding on both sides read -1 0 1."""
    for symmetric in (False, True):
        net = Net(symmetric=symmetric)
        x = net.input(4, 8)
        net.sum(net.conv(x, 4, Taps.of(2, begin=1)), net.conv(x, 4, groups=4))
        plan = plan_max(net.graph())
        reasons = [why.reason for why in plan.apart]
        assert (len(plan.merges), reasons) == ((0, [Reason.GROWS]) if symmetric else (1, []))


def test_a_joint_pads_the_same_on_both_sides_where_it_has_to() -> None:
    net = Net(symmetric=True)
    x = net.input(4, 8)
    net.sum(net.conv(x, 4, Taps.of(2, begin=1)), net.conv(x, 4, Taps.of(2, end=1)))
    plan = plan_max(net.graph())
    assert [merge.taps for merge in plan.merges] == [(THREE,)]
    assert_right(net, plan)


# ---- where a bias has a place ----


def test_a_product_of_matrices_may_gain_an_add_where_a_sum_goes() -> None:
    net = Net()
    x = net.opaque(net.input(4, 3))
    net.sum(net.conv(x, bias=False, place=Bias.OPERATOR), net.step(x))
    plan = plan_max(net.graph())
    assert len(plan.merges) == 1
    assert_right(net, plan)


def test_the_one_with_a_bias_stays_where_there_is_something_to_add() -> None:
    net = Net()
    shifted = net.step(net.conv(net.input(4, 3), 12, bias=False, place=Bias.OPERATOR))
    net.conv(shifted, 2, bias=False)
    plan = plan_max(net.graph())
    (merge,) = plan.merges
    assert net.operators[merge.into].name == "conv2"
    assert_right(net, plan)


@pytest.mark.parametrize("place", [Bias.OPERATOR, Bias.NOWHERE])
def test_without_a_place_for_a_bias_nothing_with_a_shift_is_joined(place: Bias) -> None:
    net = Net()
    shifted = net.step(net.conv(net.input(4, 3), bias=False, place=place))
    net.conv(shifted, bias=False, place=place)
    plan = plan_max(net.graph())
    assert not plan.merges
    why = plan.apart[0]
    assert (why.reason, why.witness) == (Reason.EXTRA_OPERATOR, ("conv0", "conv2"))


def test_code_without_a_place_for_a_bias_gets_none_where_a_sum_goes() -> None:
    net = Net()
    x = net.input(4, 3)
    net.sum(net.conv(x, bias=False, place=Bias.NOWHERE), net.step(x))
    plan = plan_max(net.graph())
    assert not plan.merges
    assert plan.apart[0].reason is Reason.EXTRA_OPERATOR


def test_what_has_no_place_for_a_bias_has_none_afterwards() -> None:
    """A shift behind two that became one stays, as it would behind either."""
    net = Net()
    first = net.conv(net.input(4, 3), bias=False, place=Bias.NOWHERE)
    made = net.conv(first, bias=False, place=Bias.NOWHERE)
    net.relu(net.step(made))
    plan = plan_max(net.graph())
    assert [kept.reason for kept in plan.kept] == [Reason.EXTRA_OPERATOR]


# ---- what stays apart, and why ----


def shift_before_padding(net: Net) -> None:
    net.conv(net.conv(net.input()), 4, THREE, THREE)


def shift_of_a_step_before_padding(net: Net) -> None:
    net.conv(net.step(net.conv(net.input(), bias=False)), 4, THREE, POINT)


def window_before_padding(net: Net) -> None:
    net.conv(net.conv(net.input(1), 1, THREE, THREE, bias=False), 1, THREE, THREE)


def cut_before_padding(net: Net) -> None:
    cut = net.pool(net.conv(net.input(1, 9), 1, bias=False), Taps.of(1, begin=-1))
    net.conv(cut, 1, Taps.of(1, begin=1))


def bottleneck(net: Net) -> None:
    net.conv(net.conv(net.input(8), 2), 8)


def two_windows(net: Net) -> None:
    net.conv(net.conv(net.input(4), 4, FREE, FREE), 4, FREE, FREE)


def dense_beside_depthwise(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE, groups=4), net.conv(x))


def other_groups(net: Net) -> None:
    x = net.input(6)
    net.sum(net.conv(x, 6, THREE, THREE, groups=2), net.conv(x, 6, THREE, THREE, groups=3))


def dilations_that_do_not_line_up(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, WIDE, WIDE), net.conv(x, 4, THREE, THREE))


def pointwise_beside_an_average(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x), net.pool(x, THREE, THREE))


def other_strides(net: Net) -> None:
    x = net.input(4, 1, 1)
    net.sum(net.conv(x, 4, STEP, STEP), net.conv(x))


def other_ends(net: Net) -> None:
    """The same positions of an even size only."""
    x = net.input(4, 8)
    net.sum(net.conv(x, 4, Taps.of(3, 2, end=1)), net.conv(x, 4, STEP))


APART: list[tuple[Case, Reason, tuple[str, ...], str]] = [
    (shift_before_padding, Reason.BORDER, ("conv0", "conv1"),
     "conv1: something is added before the zeros that it pads"),
    (shift_of_a_step_before_padding, Reason.BORDER, ("conv0", "conv2"),
     "conv2: something is added before the zeros that it pads"),
    (window_before_padding, Reason.BORDER, ("conv0", "conv1"),
     "conv1: it pads what the one before cuts off"),
    (cut_before_padding, Reason.BORDER, ("conv2",),
     "conv2: it pads what the one before cuts off"),
    (bottleneck, Reason.GROWS, ("conv0", "conv1"), "64 weights, 32 as it is"),
    (two_windows, Reason.GROWS, ("conv0", "conv1"), "400 weights, 288 as it is"),
    (dense_beside_depthwise, Reason.GROWS, ("conv0", "conv1"), "144 weights, 52 as it is"),
    (other_groups, Reason.GROWS, ("conv0", "conv1"), "324 weights, 270 as it is"),
    (dilations_that_do_not_line_up, Reason.GROWS, ("conv0", "conv1"), "400 weights, 288 as it is"),
    (pointwise_beside_an_average, Reason.GROWS, ("conv0",), "144 weights, 16 as it is"),
    (other_strides, Reason.GEOMETRY, ("conv0", "conv1"), ""),
    (other_ends, Reason.GEOMETRY, ("conv0", "conv1"), ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "reason", "witness", "detail"),
    [pytest.param(*row, id=row[0].__name__) for row in APART],
)
def test_what_stays_apart_says_why(
    case: Case, reason: Reason, witness: tuple[str, ...], detail: str
) -> None:
    _, plan = planned(case)
    assert not plan.merges
    (why,) = plan.apart
    assert (why.reason, why.witness, why.detail) == (reason, witness, detail)


def test_every_reason_that_keeps_operators_apart_has_a_case() -> None:
    assert {reason for _, reason, _, _ in APART} == {Reason.GROWS, Reason.BORDER, Reason.GEOMETRY}


# ---- what is no candidate: nothing is said of it ----


def branch_with_another_reader(net: Net) -> None:
    x = net.input()
    made = net.conv(x)
    net.sum(made, net.conv(x))
    net.relu(made)


def _block(net: Net, **facts: object) -> tuple[ValueId, ValueId]:
    """A window beside a point that ``facts`` are told of; what the point makes, and the sum."""
    x = net.input()
    window = net.conv(x, 4, THREE, THREE)
    point = net.conv(x, **facts)  # type: ignore[arg-type]
    return point, net.sum(window, point)


def branch_that_is_seen(net: Net) -> None:
    net.anchors[_block(net)[0]] = Anchor.HOOK


def branch_that_is_an_output(net: Net) -> None:
    net.anchors[_block(net)[0]] = Anchor.OUTPUT


def shared_weight(net: Net) -> None:
    _block(net, weight=Weight("w", "FLOAT", ("conv1", "another")))


def weight_that_is_computed(net: Net) -> None:
    _block(net, weight=None)


def integers(net: Net) -> None:
    _block(net, weight=Weight("w", "INT8", ("conv1",)))


def bias_that_is_computed(net: Net) -> None:
    _block(net, place=Bias.DYNAMIC)


def positions_that_are_not_known(net: Net) -> None:
    _block(net, taps=None)


def weight_of_another_type(net: Net) -> None:
    _block(net, weight=Weight("w", "FLOAT16", ("conv1",)))


def values_of_another_type(net: Net) -> None:
    net.dtypes[_block(net)[0]] = "FLOAT16"


def channels_on_another_axis(net: Net) -> None:
    _block(net, out_axis=2)


def step_in_training_mode(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.step(net.conv(x), training_mode=True, map=None))


def step_whose_axis_is_not_proved(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.step(net.conv(x), unproved="its axis"))


def step_that_is_not_finite(net: Net) -> None:
    x = net.input()
    broken = AffineMap.of([np.inf, 1.0, 1.0, 1.0], [0.0] * 4)
    net.sum(net.conv(x, 4, THREE, THREE), net.step(net.conv(x), broken))


def average_by_another_number_at_the_border(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.pool(x, THREE, THREE, exact=False))


def two_sources(net: Net) -> None:
    net.sum(net.conv(net.input()), net.conv(net.input()))


def nothing_linear(net: Net) -> None:
    x = net.input()
    net.sum(x, x, net.step(x))


def one_operator_and_its_step(net: Net) -> None:
    net.step(net.conv(net.input()))


def something_between(net: Net) -> None:
    x = net.input()
    net.sum(net.conv(net.relu(net.conv(x))), x)


NONE: list[Case] = [
    branch_with_another_reader, branch_that_is_seen, branch_that_is_an_output, shared_weight,
    weight_that_is_computed, integers, bias_that_is_computed, positions_that_are_not_known,
    weight_of_another_type, values_of_another_type, channels_on_another_axis,
    step_in_training_mode, step_whose_axis_is_not_proved, step_that_is_not_finite,
    average_by_another_number_at_the_border, two_sources, nothing_linear,
    one_operator_and_its_step, something_between,
]  # fmt: skip


@pytest.mark.parametrize("case", NONE, ids=lambda case: case.__name__)
def test_what_is_no_candidate_is_left_alone(case: Case) -> None:
    _, plan = planned(case)
    assert not plan.merges
    assert not plan.apart


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_operators_of_one_type_are_joined_whatever_it_is(dtype: str) -> None:
    net = Net(dtype=dtype)
    _block(net)
    assert len(plan_max(net.graph()).merges) == 1


# ---- what is refused ----


def root_of(merges: tuple[Merge, ...]) -> int:
    (merge,) = merges
    return merge.root


def test_a_merge_that_was_taken_back_is_not_made_again() -> None:
    net = Net()
    _block(net)
    root = root_of(plan_max(net.graph()).merges)
    refused = Kept(root, Reason.RANGE, ("conv1",), "overflows on channel 1")
    plan = plan_max(net.graph(), {root: refused})
    assert not plan.merges
    assert plan.apart == (refused,)
    assert not plan.kept


def test_a_step_that_must_stay_is_in_no_merge() -> None:
    net = Net()
    x = net.input()
    net.sum(net.conv(x, 4, THREE, THREE), net.step(net.conv(x)))
    refused = Kept(2, Reason.ROLLED_BACK, ("conv0",))
    plan = plan_max(net.graph(), {2: refused})
    assert not plan.merges
    assert plan.kept == (refused,)


def test_a_step_beside_a_merge_may_be_refused() -> None:
    net = Net()
    _, total = _block(net)
    net.relu(net.step(total))
    refused = Kept(3, Reason.RANGE, ("conv0",))
    plan = plan_max(net.graph(), {3: refused})
    assert len(plan.merges) == 1
    assert plan.kept == (refused,)
    assert_right(net, plan)
