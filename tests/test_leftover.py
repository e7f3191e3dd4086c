"""Which steps that stay can take another form: the decision alone, on the channel graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, Anchor, ChannelGraph, Dim, Form, Leftover, Opaque, Value
from bnfold.errors import UsageError
from bnfold.folding import FoldRefusedError, Options, leftover_numbers, refusals
from bnfold.planning import How, Reason
from bnfold.report.model import Report, Size, steps_of
from bnfold.report.text import render_explain

BOTH = AffineMap.of([2.0, -3.0], [1.0, 0.5])
FORMS = tuple(Leftover)
IMAGE = ("N", 2, None, 7)


def step(at: int, taken: AffineMap | None = BOTH, **other: Any) -> Affine:
    facts: dict[str, Any] = {
        "name": f"bn{at}", "op_type": "BatchNormalization", "inputs": (at,), "outputs": (at + 1,),
        "axis": 1, "map": taken, "form": Form.BOTH, "alternatives": frozenset(FORMS),
    }  # fmt: skip
    return Affine(**facts | other)


def fenced(*steps: Affine, shape: tuple[Dim, ...] | None = IMAGE, dtype: str = "FLOAT") -> Any:
    """Steps one behind the other between operators that nothing is known of."""
    last = len(steps) + 1
    first = Opaque(name="before", op_type="Sigmoid", inputs=(0,), outputs=(1,))
    after = Opaque(name="after", op_type="Sigmoid", inputs=(last,), outputs=(last + 1,))
    values = tuple(Value(f"v{i}", shape, dtype) for i in range(last + 2))
    ends = {0: Anchor.INPUT, last + 1: Anchor.OUTPUT}
    return ChannelGraph(values, (first, *steps, after), ends)


def forms(graph: ChannelGraph, wanted: str, **options: Any) -> dict[int, Leftover]:
    return dict(Options(leftover=wanted, **options).plan(graph, {}).forms)


@pytest.mark.parametrize("level", ["max", "local"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_stays_takes_the_form_that_is_asked_for(form: Leftover, level: str) -> None:
    assert forms(fenced(step(1)), form.value, level=level) == {1: form}


def test_by_default_what_stays_is_left_as_it_is() -> None:
    graph = fenced(step(1))
    assert Options().plan(graph, {}) == replace(Options("max").plan(graph, {}), forms={})
    assert forms(graph, "keep") == {}


RANKS: dict[str, tuple[tuple[Dim, ...] | None, set[Leftover]]] = {
    "a matrix": (("N", 2), {Leftover.AFFINE}),
    "three": (("N", 2, "L"), set(FORMS)),
    "four": (IMAGE, set(FORMS)),
    "five": (("N", 2, 3, 4, 5), set(FORMS)),
    "six": (("N", 2, 3, 4, 5, 6), {Leftover.AFFINE}),
    "unknown": (None, set()),
    "channels of unknown number": (("N", "C", 5), set()),
    "a vector": ((2,), set()),
}


@pytest.mark.parametrize(("shape", "possible"), RANKS.values(), ids=RANKS.keys())
def test_the_shape_decides_which_forms_there_are(
    shape: tuple[Dim, ...] | None, possible: set[Leftover]
) -> None:
    graph = fenced(step(1), shape=shape)
    assert {form for form in FORMS if forms(graph, form.value)} == possible


STAYING: dict[str, Any] = {
    "in training mode": {"taken": None, "training_mode": True},
    "not constant": {"taken": None, "unproved": "'gamma'"},
    "of another formula": {"unproved": "spatial=0: one set a position"},
    "without alternatives": {"alternatives": frozenset()},
    "not finite": {"taken": AffineMap.of([np.inf, 1.0], [0.0, 0.0])},
}


@pytest.mark.parametrize("facts", STAYING.values(), ids=STAYING.keys())
@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_not_proved_keeps_its_form(form: Leftover, facts: dict[str, Any]) -> None:
    graph = fenced(step(1, **{"taken": BOTH} | facts))
    plan = Options(leftover=form.value).plan(graph, {})
    assert [kept.step for kept in plan.kept] == [1]
    assert plan.forms == {}


def test_an_unknown_type_and_an_axis_that_is_not_the_second_are_no_convolution() -> None:
    assert forms(fenced(step(1), dtype="UNDEFINED"), "depthwise") == {}
    tokens = fenced(step(1, axis=2), shape=("N", 7, 2))
    assert forms(tokens, "depthwise") == {}
    assert forms(tokens, "affine") == {1: Leftover.AFFINE}


def test_a_step_takes_its_form_with_all_that_it_absorbed() -> None:
    plan = Options(leftover="depthwise").plan(fenced(step(1), step(2)), {})
    (kept,), (fold,) = plan.kept, plan.folds
    assert fold.how is How.MERGED
    assert plan.forms == {kept.step: Leftover.DEPTHWISE}
    merged = plan.absorptions[kept.step].around(BOTH)
    np.testing.assert_array_equal(merged.scale, BOTH.after(BOTH).scale)


def test_what_does_not_fit_its_type_keeps_its_form_and_is_planned_again() -> None:
    graph, options = fenced(step(1), dtype="FLOAT16"), Options(leftover="affine")
    plan = options.plan(graph, {})
    refused = refusals(graph, plan, FoldRefusedError(1, Reason.RANGE, "overflows"))
    again = options.plan(graph, refused)
    assert [(k.step, k.reason) for k in again.kept] == [(k.step, k.reason) for k in plan.kept]
    assert again.forms == {}


# ---- numbers ----

NUMBERS = {
    "both": (BOTH, True, True),
    "a scale": (AffineMap.scaling([2.0, 3.0]), True, False),
    "a shift": (AffineMap.shifting([2.0, 3.0]), False, True),
    "one for all": (AffineMap.of([2.0], [1.0]), True, True),
}


@pytest.mark.parametrize(("taken", "scales", "shifts"), NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_cast_once_and_what_changes_nothing_is_left_out(
    form: Leftover, taken: AffineMap, scales: bool, shifts: bool
) -> None:
    third = AffineMap(taken.scale / 3 if scales else taken.scale, taken.shift / 3)
    scale, shift = leftover_numbers(0, form, third, 2, np.float16)
    assert (shift is not None) == shifts
    assert (scale is not None) == (scales or form is Leftover.DEPTHWISE)
    wide = third.expand(2)
    for found, exact in ((scale, wide.scale), (shift, wide.shift)):
        if found is not None:
            np.testing.assert_array_equal(found, exact.astype(np.float16))


MISFITS = {
    "too large a scale": (AffineMap.of([1.0, 7e4], [0.0, 0.0]), "scale overflows on channel 1"),
    "too large a shift": (AffineMap.of([2.0, 2.0], [7e4, 0.0]), "shift overflows on channel 0"),
    "too small a scale": (AffineMap.scaling([1e-6, 1.0]), "scale underflows on channel 0"),
    "lost altogether": (AffineMap.scaling([1.0, 1e-9]), "scale underflows on channel 1"),
}


@pytest.mark.parametrize(("taken", "said"), MISFITS.values(), ids=MISFITS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_do_not_fit_are_refused(form: Leftover, taken: AffineMap, said: str) -> None:
    with pytest.raises(FoldRefusedError, match=said):
        leftover_numbers(0, form, taken, 2, np.float16)


def test_a_dead_channel_is_no_reason_to_refuse() -> None:
    dead = AffineMap.scaling([1e-41, 0.0])  # as weight decay leaves them, in float32
    scale, _ = leftover_numbers(0, Leftover.AFFINE, dead, 2, np.float32)
    assert scale is not None
    np.testing.assert_array_equal(scale, dead.scale.astype(np.float32))


# ---- the option and the report ----


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no leftover 'mul'"):
        Options(leftover="mul")


WORDS = {
    Leftover.AFFINE: "it becomes a multiplication and an addition",
    Leftover.DEPTHWISE: "it becomes a depthwise 1x1 convolution",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_report_says_which_form_a_step_has(form: Leftover) -> None:
    graph = fenced(step(1))
    steps = steps_of(graph, Options(leftover=form.value).plan(graph, {}))
    report = Report("net", "max", steps, Size({}, 0, 0))
    assert [found.form for found in report.kept] == [form.value]
    assert report.changed
    said = render_explain(report)
    assert WORDS[form] in said
    assert f"1 kept (1 as {form.value})" in said


def test_a_step_that_keeps_its_form_changes_nothing() -> None:
    graph = fenced(step(1))
    report = Report("net", "max", steps_of(graph, Options().plan(graph, {})), Size({}, 0, 0))
    assert not report.changed
    assert [found.form for found in report.kept] == [""]
