"""The planner on the channel graph alone: what vanishes, into what, and why the rest stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from bnfold.affine import AffineMap
from bnfold.channel_graph import (
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Form,
    Linear,
    Opaque,
    Operator,
    ShiftRule,
    Sign,
    Tie,
    Value,
    Weight,
)
from bnfold.passes import plan_local, plan_max
from bnfold.planning import How, Kept, Plan, Reason, Stored

SCALE = AffineMap.scaling([2.0, -3.0])
BOTH = AffineMap.of([2.0, -3.0], [1.0, 0.5])


def graph(operators: Sequence[Operator], anchors: dict[int, Anchor] | None = None) -> ChannelGraph:
    """A chain by default: operator i reads value i and writes value i + 1."""
    count = 1 + max(v for op in operators for v in (*op.inputs, *op.outputs))
    values = tuple(Value(f"v{i}", None, "FLOAT") for i in range(count))
    ends = {0: Anchor.INPUT, count - 1: Anchor.OUTPUT}
    return ChannelGraph(values, tuple(operators), ends if anchors is None else anchors)


def linear(at: int, **other: object) -> Linear:
    facts: dict[str, object] = {
        "name": f"conv{at}", "op_type": "Conv", "inputs": (at,), "outputs": (at + 1,),
        "in_axis": 1, "out_axis": 1, "in_channels": 2, "out_channels": 2,
        "weight": Weight(f"w{at}", "FLOAT", (f"conv{at}",)), "bias": Bias.BUILT_IN,
    }  # fmt: skip
    return Linear(**{**facts, **other})  # type: ignore[arg-type]


def step(at: int, taken: AffineMap | None = BOTH, **other: object) -> Affine:
    facts: dict[str, object] = {
        "name": f"bn{at}", "op_type": "BatchNormalization", "inputs": (at,), "outputs": (at + 1,),
        "axis": 1, "map": taken, "form": Form.BOTH,
    }  # fmt: skip
    return Affine(**{**facts, **other})  # type: ignore[arg-type]


def relu(at: int) -> Opaque:
    return Opaque(name=f"relu{at}", op_type="Relu", inputs=(at,), outputs=(at + 1,))


def identity(at: int) -> Tie:
    return Tie(name=f"identity{at}", op_type="Identity", inputs=(at,), outputs=(at + 1,),
               sign=Sign.ANY, shift=ShiftRule.EQUAL)  # fmt: skip


def only_kept(plan: Plan) -> Kept:
    assert not plan.folds
    return plan.kept[0]


def test_a_step_after_a_linear_operator_goes_backward() -> None:
    plan = plan_local(graph([linear(0), step(1)]))
    assert [(f.step, f.how, f.into, f.stored) for f in plan.folds] == [
        (1, How.BACKWARD, (0,), Stored.AFTER)
    ]
    taken = plan.absorptions[0].output
    assert taken is not None
    np.testing.assert_array_equal(taken.scale, BOTH.scale)


def test_a_step_before_a_linear_operator_goes_forward() -> None:
    plan = plan_local(graph([step(0), linear(1)]))
    assert [(f.how, f.into, f.stored) for f in plan.folds] == [(How.FORWARD, (1,), Stored.BEFORE)]
    assert plan.absorptions[1].input is not None


def test_between_two_linear_operators_the_one_before_takes_the_step() -> None:
    plan = plan_local(graph([linear(0), step(1), linear(2)]))
    assert [f.how for f in plan.folds] == [How.BACKWARD]
    assert set(plan.absorptions) == {0}


def test_any_number_of_steps_through_identities_compose_in_order() -> None:
    plan = plan_local(graph([linear(0), step(1), identity(2), step(3, SCALE), step(4)]))
    taken = plan.absorptions[0].output
    assert taken is not None
    expected = BOTH.after(SCALE.after(BOTH))
    np.testing.assert_allclose(taken.scale, expected.scale)
    np.testing.assert_allclose(taken.shift, expected.shift)
    assert len(plan.folds) == 3


def test_steps_before_a_linear_operator_compose_in_order() -> None:
    plan = plan_local(graph([relu(0), step(1), step(2, SCALE), linear(3)]))
    taken = plan.absorptions[3].input
    assert taken is not None
    expected = SCALE.after(BOTH)
    np.testing.assert_allclose(taken.shift, expected.shift)
    assert not plan.kept


def test_steps_that_nothing_absorbs_merge_into_the_one_that_can_express_it() -> None:
    mul = step(2, SCALE, op_type="Mul", form=Form.EITHER, name="mul")
    add = step(3, AffineMap.shifting([1.0, 2.0]), op_type="Add", form=Form.EITHER, name="add")
    plan = plan_local(graph([relu(0), step(1), mul, add, relu(4)]))
    assert [(f.step, f.how, f.into) for f in plan.folds] == [
        (2, How.MERGED, (1,)), (3, How.MERGED, (1,)),
    ]  # fmt: skip
    assert [k.step for k in plan.kept] == [1]
    merged = plan.absorptions[1].output
    assert merged is not None
    np.testing.assert_array_equal(merged.shift, [1.0, 2.0])


def test_a_mul_and_an_add_do_not_merge_with_each_other() -> None:
    mul = step(1, SCALE, form=Form.EITHER)
    add = step(2, AffineMap.shifting([1.0, 2.0]), form=Form.EITHER)
    assert not plan_local(graph([relu(0), mul, add, relu(3)])).folds


def test_an_identity_step_vanishes_but_not_from_input_to_output() -> None:
    assert [f.how for f in plan_local(graph([relu(0), step(1, AffineMap.identity())])).folds] == [
        How.IDENTITY
    ]
    kept = only_kept(plan_local(graph([step(0, AffineMap.identity())])))
    assert kept.reason is Reason.GRAPH_BOUNDARY


def test_a_zero_scale_folds_in_both_directions() -> None:
    pruned = AffineMap.of([0.0, 1.0], [3.0, 0.0])
    assert plan_local(graph([linear(0), step(1, pruned)])).folds
    assert plan_local(graph([step(0, pruned), linear(1)])).folds


def test_a_scale_passes_zero_padding_where_a_shift_does_not() -> None:
    padded = linear(1, shift_barrier="it pads with zeros")
    assert plan_local(graph([step(0, SCALE), padded])).folds
    kept = only_kept(plan_local(graph([step(0), padded])))
    assert (kept.reason, kept.witness) == (Reason.ZERO_PADDING, ("conv1",))


def test_all_readers_absorb_a_step_or_none() -> None:
    readers = [step(0), linear(1), linear(1, name="other", outputs=(3,))]
    plan = plan_local(graph(readers, {0: Anchor.INPUT, 2: Anchor.OUTPUT, 3: Anchor.OUTPUT}))
    assert plan.folds[0].into == (1, 2)
    readers[2] = relu(1)
    kept = only_kept(plan_local(graph(readers)))
    assert (kept.reason, kept.witness) == (Reason.OTHER_READER, ("relu1",))


def test_a_second_reader_of_the_linear_output_keeps_the_step() -> None:
    other = Opaque(name="other", op_type="Relu", inputs=(1,), outputs=(3,))
    kept = only_kept(plan_local(graph([linear(0), step(1), other])))
    assert (kept.reason, kept.witness) == (Reason.OTHER_READER, ("other",))


@pytest.mark.parametrize(
    ("anchor", "reason"),
    [
        (Anchor.OUTPUT, Reason.GRAPH_BOUNDARY),
        (Anchor.CAPTURED, Reason.CAPTURED),
        (Anchor.HOOK, Reason.HOOK),
        (Anchor.CHANGED, Reason.IN_PLACE),
    ],
)
def test_a_linear_output_that_others_see_keeps_its_units(anchor: Anchor, reason: Reason) -> None:
    kept = only_kept(plan_local(graph([linear(0), step(1)], {1: anchor, 2: Anchor.OUTPUT})))
    assert kept.reason is reason


@pytest.mark.parametrize(
    ("facts", "taken", "reason"),
    [
        ({"weight": None}, BOTH, Reason.WEIGHT_NOT_CONSTANT),
        ({"weight": Weight("w", "INT8", ("conv0",))}, BOTH, Reason.WEIGHT_TYPE),
        ({"weight": Weight("w", "FLOAT", ("conv0", "twin"))}, BOTH, Reason.SHARED_WEIGHT),
        ({"out_axis": 2}, BOTH, Reason.CHANNEL_AXIS),
        ({"out_channels": 3}, BOTH, Reason.CHANNEL_AXIS),
        ({"bias": Bias.DYNAMIC}, SCALE, Reason.BIAS_NOT_CONSTANT),
        ({"bias": Bias.NOWHERE}, BOTH, Reason.EXTRA_OPERATOR),
    ],
)
def test_every_guard_of_the_output_side_refuses(
    facts: dict[str, object], taken: AffineMap, reason: Reason
) -> None:
    assert only_kept(plan_local(graph([linear(0, **facts), step(1, taken)]))).reason is reason


def test_a_scale_folds_where_a_bias_has_no_place() -> None:
    assert plan_local(graph([linear(0, bias=Bias.NOWHERE), step(1, SCALE)])).folds


@pytest.mark.parametrize("planner", [plan_local, plan_max])
def test_a_step_in_code_stays_and_says_where(planner: Callable[[ChannelGraph], Plan]) -> None:
    kept = only_kept(planner(graph([linear(0), step(1, BOTH, stays="the_block")])))
    assert (kept.reason, kept.witness) == (Reason.IN_CODE, ("the_block",))


def test_a_scale_passes_one_that_is_written_in_code() -> None:
    code = step(1, AffineMap.scaling([0.5, 4.0]), stays="the_block")
    plan = plan_max(graph([linear(0), code, step(2, SCALE)]))
    assert [fold.step for fold in plan.folds] == [2]
    assert plan.absorptions[0].output is not None


def test_a_shared_weight_may_have_biases_of_its_own() -> None:
    shared = linear(0, weight=Weight("w", "FLOAT", ("conv0", "twin")))
    assert plan_local(graph([shared, step(1, AffineMap.shifting([1.0, 2.0]))])).folds


def test_one_add_is_paid_for_by_a_step_and_two_are_not() -> None:
    bare = linear(1, bias=Bias.OPERATOR, op_type="MatMul")
    assert plan_local(graph([step(0), bare])).folds
    twin = linear(1, bias=Bias.OPERATOR, name="twin", outputs=(3,))
    ends = {0: Anchor.INPUT, 2: Anchor.OUTPUT, 3: Anchor.OUTPUT}
    kept = only_kept(plan_local(graph([step(0), bare, twin], ends)))
    assert (kept.reason, kept.witness) == (Reason.EXTRA_OPERATOR, ("conv1", "twin"))
    wider = linear(1, bias=Bias.OPERATOR, out_channels=4)
    assert only_kept(plan_local(graph([step(0), wider]))).reason is Reason.EXTRA_OPERATOR


def test_training_mode_and_changeable_parameters_stay() -> None:
    training = plan_local(graph([linear(0), step(1, None, training_mode=True)]))
    assert only_kept(training).reason is Reason.TRAINING_MODE
    changeable = plan_local(graph([linear(0), step(1, None, unproved="'gamma'")]))
    assert only_kept(changeable).sentence == (
        "its parameters are not constant: 'gamma' can change them"
    )


def test_one_step_that_can_not_fold_stops_no_other() -> None:
    chain = [linear(0), step(1, None, training_mode=True), linear(2), step(3), linear(4), step(5)]
    plan = plan_local(graph(chain))
    assert [f.step for f in plan.folds] == [3, 5]
    assert [k.step for k in plan.kept] == [1]


def test_a_refused_step_is_kept_with_the_reason_that_is_given() -> None:
    refused = Kept(1, Reason.RANGE, ("conv0",), "overflows on channel 1")
    plan = plan_local(graph([linear(0), step(1), step(2, SCALE)]), {1: refused})
    assert refused in plan.kept
    assert not plan.folds


def test_a_map_that_is_not_finite_stays() -> None:
    broken = AffineMap.of([np.inf, 1.0], [0.0, 0.0])
    assert only_kept(plan_local(graph([linear(0), step(1, broken)]))).reason is Reason.RANGE


def test_every_step_is_folded_or_kept() -> None:
    chain = [step(0), relu(1), step(2), linear(3), step(4), relu(5), step(6)]
    plan = plan_local(graph(chain))
    assert sorted([*(f.step for f in plan.folds), *(k.step for k in plan.kept)]) == [0, 2, 4, 6]
