"""Tier C's rule on arrays: what must pass, what must fail, what shows nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnfold.verify.judge import (
    Gates,
    Measured,
    OutputVerdict,
    Verdict,
    judge_decisions,
    judge_errors,
    judge_outputs,
    worst,
)
from bnfold.verify.measure import judge_output, measure_output, upper_hull

Array = NDArray[Any]
PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
U32 = 2.0**-24


def outputs(samples: int = 8, size: int = 100, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, size)) for _ in range(samples)]


def noisy(arrays: list[Array], error: float, seed: int) -> list[Array]:
    """The arrays as a runtime with this relative error gives them."""
    rng = np.random.default_rng([1, seed])
    return [(a + error * np.abs(a).mean() * rng.standard_normal(a.shape)) for a in arrays]


def judged(
    oracle: list[Array], before: list[Array], after: list[Array], **options: Any
) -> OutputVerdict:
    return judge_output("y", oracle, before, after, **{"unit": U32, **options})


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (1e-6, 1e-6, PASS),
        (1e-6, 1.5e-6, PASS),
        (1e-6, 3e-6, FAIL),
        (1e-6, 1e-3, FAIL),
        (1e-9, 2e-7, PASS),  # below what four roundings of float32 explain
        (1e-9, 2e-6, FAIL),
        (0.1, 0.1, PASS),  # a net whose own error is 10 %
        (0.1, 0.5, FAIL),
        (2.0, 2.0, INCONCLUSIVE),  # the error is as large as the output
    ],
)
def test_the_folds_error_is_held_against_the_runtimes_own(
    before: float, after: float, verdict: Verdict
) -> None:
    y = outputs()
    assert judged(y, noisy(y, before, 1), noisy(y, after, 2)).verdict is verdict


def test_one_bad_sample_is_enough() -> None:
    y = outputs()
    before, after = noisy(y, 1e-6, 1), noisy(y, 1e-6, 2)
    assert judged(y, before, after).verdict is PASS
    after[5] = noisy(y, 1e-5, 3)[5]
    said = judged(y, before, after)
    assert said.verdict is FAIL
    assert said.figures is not None
    assert said.figures.mean_ratio < 2 < 4 < said.figures.worst_ratio


def test_one_sample_of_large_error_does_not_hide_a_fault_in_the_others() -> None:
    y = outputs()
    before, after = noisy(y, 1e-6, 1), noisy(y, 1e-5, 2)
    before[3] = noisy(y, 0.1, 3)[3]
    assert judged(y, before, after).verdict is FAIL


def test_jitter_explains_an_error_of_its_size() -> None:
    y = outputs()
    before, after = noisy(y, 1e-6, 1), noisy(y, 1e-5, 2)
    assert judged(y, before, after).verdict is FAIL
    assert judged(y, before, after, jitter=1e-5).verdict is PASS


def test_the_unit_of_a_narrow_type_explains_its_roundings() -> None:
    y = outputs()
    before, after = noisy(y, 1e-5, 1), noisy(y, 1e-3, 2)
    assert judged(y, before, after).verdict is FAIL
    assert judged(y, before, after, unit=2.0**-11).verdict is PASS


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_equal_errors_raise_an_alarm_less_than_twice_in_a_hundred(size: int) -> None:
    """Also with one number per output, where the unfolded error is near zero by chance."""
    alarms = 0
    for seed in range(400):
        y = [a + 3 for a in outputs(size=size, seed=seed)]
        said = judged(y, noisy(y, 1e-5, 2 * seed), noisy(y, 1e-5, 2 * seed + 1))
        alarms += said.verdict is FAIL
    assert alarms < 8


def test_a_net_near_chaos_raises_no_alarm_and_hides_no_fault() -> None:
    """Errors of LeViT-128S on noise, measured: from 1e-6 to 0.5, and not the same ones."""
    unfolded = [1.1e-1, 3.4e-1, 4.3e-5, 4.2e-6, 3.7e-6, 1.8e-2, 7.4e-2, 4.8e-3]
    right = [1.0e-1, 1.7e-1, 2.5e-5, 6.3e-6, 1.4e-6, 5.4e-2, 7.3e-2, 5.3e-2]
    bias_off = [1.5e-1, 3.2e-1, 3.6e-4, 1.5e-4, 1.1e-4, 2.1e-1, 9.8e-2, 2.0e-1]
    y = outputs()
    shift = outputs(seed=1)

    def off(errors: list[float]) -> list[Array]:
        unit = [np.linalg.norm(a) / np.linalg.norm(s) * s for a, s in zip(y, shift, strict=True)]
        return [a + e * s for a, e, s in zip(y, errors, unit, strict=True)]

    assert judged(y, off(unfolded), off(right)).verdict is PASS
    assert judged(y, off(unfolded), off(bias_off)).verdict is FAIL


def test_a_single_sample_shows_nothing() -> None:
    y = outputs(samples=1)
    assert judged(y, y, y).verdict is INCONCLUSIVE


def test_a_fault_is_caught_with_one_number_per_output() -> None:
    for seed in range(50):
        y = outputs(size=1, seed=seed)
        assert judged(y, noisy(y, 1e-6, 2 * seed), noisy(y, 1e-4, 2 * seed + 1)).verdict is FAIL


def with_value(arrays: list[Array], value: float) -> list[Array]:
    changed = [a.copy() for a in arrays]
    changed[2][0, 7] = value
    return changed


@pytest.mark.parametrize(
    ("oracle", "before", "after", "verdict"),
    [
        (0.0, 0.0, np.nan, FAIL),
        (0.0, 0.0, np.inf, FAIL),
        (np.inf, np.inf, 0.0, FAIL),  # the oracle says infinity, the fold does not
        (np.inf, np.inf, -np.inf, FAIL),
        (np.nan, np.nan, np.nan, INCONCLUSIVE),
        (0.0, np.inf, 0.0, INCONCLUSIVE),  # the unfolded model overflowed, the fold cured it
        (0.0, np.inf, np.inf, INCONCLUSIVE),
        (-np.inf, -np.inf, -np.inf, PASS),  # a mask that the model itself puts there
    ],
)
def test_values_that_are_not_finite_must_agree(
    oracle: float, before: float, after: float, verdict: Verdict
) -> None:
    y = outputs()
    sets = (with_value(y, v) for v in (oracle, before, after))
    assert judged(*sets).verdict is verdict


def test_a_constant_output_shows_nothing_and_a_changed_constant_fails() -> None:
    y = [np.ones((1, 5)) for _ in range(8)]
    said = judged(y, y, y)
    assert said.verdict is INCONCLUSIVE
    assert said.constant
    assert judged(y, y, [a + 1e-4 for a in y]).verdict is FAIL
    zeros = [0 * a for a in y]
    assert judged(zeros, zeros, zeros).constant
    assert judged(zeros, zeros, [a + 1e-9 for a in zeros]).verdict is FAIL


def test_an_output_of_another_type_or_shape_fails() -> None:
    y = outputs()
    assert judged(y, y, [a.astype(np.float32) for a in y]).verdict is FAIL
    assert judged(y, y, [a[:, :-1] for a in y]).verdict is FAIL


LABELS = [np.array([i % 4]) for i in range(8)]


def changed(*samples: int) -> list[Array]:
    return [a + 1 if i in samples else a for i, a in enumerate(LABELS)]


@pytest.mark.parametrize(
    ("oracle", "before", "after", "verdict"),
    [
        (changed(), changed(), changed(), PASS),
        (changed(), changed(), changed(3), FAIL),
        (changed(3), changed(), changed(3), INCONCLUSIVE),  # rounding decides sample 3
        (changed(3), changed(), changed(3, 4), FAIL),
        (changed(*range(8)), changed(), changed(*range(8)), FAIL),
    ],
)
def test_integers_agree_exactly(
    oracle: list[Array], before: list[Array], after: list[Array], verdict: Verdict
) -> None:
    assert judged(oracle, before, after).verdict is verdict


def test_constant_labels_show_nothing() -> None:
    same = [np.array([2])] * 8
    assert judged(same, same, same).constant


def test_the_worst_verdict_speaks() -> None:
    assert worst([PASS, INCONCLUSIVE, FAIL]) is FAIL
    assert worst([PASS, INCONCLUSIVE]) is INCONCLUSIVE
    assert worst([PASS, PASS]) is PASS
    assert worst([]) is INCONCLUSIVE
    assert [v.exit_code for v in (PASS, FAIL, INCONCLUSIVE)] == [0, 1, 3]


def test_a_constant_output_takes_nothing_from_the_proof_of_another() -> None:
    good, bad = OutputVerdict("a", PASS, "good"), OutputVerdict("b", FAIL, "bad")
    constant = OutputVerdict("c", INCONCLUSIVE, "constant", constant=True)
    unknown = OutputVerdict("d", INCONCLUSIVE, "unknown")
    assert judge_outputs([good, constant]).verdict is PASS
    assert judge_outputs([constant]).verdict is INCONCLUSIVE
    assert judge_outputs([good, unknown]).message == "unknown"
    assert judge_outputs([good, unknown, bad, constant]).message == "bad"
    assert judge_outputs([]).verdict is INCONCLUSIVE


# ---- the user's own limits ----


def gated(rtol: float | None, atol: float | None, after: float = 1e-4) -> OutputVerdict:
    """An output of 100 numbers, one of which is off by ``after`` where the unfolded's is 2."""
    y = outputs()
    for sample in y:
        sample[0, 3] = 2.0
    before = noisy(y, 0.05, 1)  # so that the noise floor explains it
    for sample in before:
        sample[0, 3] = 2.0
    folded = [a.copy() for a in before]
    folded[4][0, 3] += after
    return judged(y, before, folded, gates=Gates(rtol, atol))


@pytest.mark.parametrize(
    ("rtol", "atol", "verdict"),
    [
        (None, None, PASS),
        (None, 1e-3, PASS),
        (None, 1e-5, FAIL),
        (1e-4, None, PASS),  # 1e-4 of 2
        (1e-5, None, FAIL),
        (1e-5, 9e-5, PASS),  # 2e-5 and 9e-5
        (1e-5, 7e-5, FAIL),
        (0.0, 0.0, FAIL),
    ],
)
def test_gates_are_asked_beside_the_noise_floor(
    rtol: float | None, atol: float | None, verdict: Verdict
) -> None:
    said = gated(rtol, atol)
    assert said.verdict is verdict
    if verdict is FAIL:
        assert "would do" in said.message


def test_the_atol_that_is_said_to_do_does() -> None:
    assert "atol 8e-05 would do" in gated(1e-5, 7e-5).message
    assert gated(1e-5, 8.001e-5).verdict is PASS
    assert gated(1e-5, 7.999e-5).verdict is FAIL


def test_wide_gates_hide_no_fault() -> None:
    y = outputs()
    said = judged(y, noisy(y, 1e-6, 1), noisy(y, 1e-3, 2), gates=Gates(1.0, 1.0))
    assert said.verdict is FAIL


numbers = st.floats(0, 1e6, allow_nan=False, width=32)
limits = st.floats(0, 10, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(points=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=60), rtol=limits)
def test_the_hull_gives_the_answer_of_all_elements(
    points: list[tuple[float, float]], rtol: float
) -> None:
    sizes, differences = (np.array(column) for column in zip(*points, strict=True))
    hull = upper_hull(sizes, differences)
    assert set(hull) <= set(points)
    of_all = float((differences - rtol * sizes).max())
    of_hull = max(far - rtol * size for size, far in hull)
    assert of_hull == pytest.approx(of_all, rel=1e-9, abs=1e-9 * float(differences.max()))


def test_the_hull_of_many_elements_is_small() -> None:
    rng = np.random.default_rng(0)
    sizes, differences = np.abs(rng.normal(size=(2, 100_000)))
    assert 3 <= len(upper_hull(sizes, differences)) < 60
    assert upper_hull(np.zeros(0), np.zeros(0)) == ()


# ---- decisions ----

CLASSES = 12


def scores(margin: float, top: float = 1.0) -> Array:
    """A row of which class 3 leads by ``margin`` and five lead the rest by ``top``."""
    row = np.linspace(-3, -2, CLASSES)
    row[[1, 3, 5, 7, 9]] = np.array([0.1, 0.4 + margin, 0.2, 0.4, 0.3]) + top
    return row[None]


def swapped(one: int, other: int) -> Array:
    """The first row with two entries exchanged."""
    row = scores(1.0)
    row[0, [one, other]] = row[0, [other, one]]
    return row


def decided(after: Array, margin: float = 1.0, error: float = 1e-6) -> OutputVerdict | None:
    rng = np.random.default_rng(0)
    y = [scores(margin) for _ in range(4)]
    before = [a + error * rng.uniform(-1, 1, a.shape) for a in y]
    return judge_decisions(measure_output("y", y, before, [*before[:3], after], unit=U32))


@pytest.mark.parametrize(
    ("after", "verdict", "said"),
    [
        (scores(1.0), PASS, "all of these agree"),
        (swapped(3, 7), FAIL, "4 of 4 decisions are clear, and rows differ: 1 by the largest"),
        (swapped(3, 0), FAIL, "1 by the largest value and 1 by the five largest"),
        (swapped(9, 0), FAIL, "rows differ: 1 by the five largest"),
        (swapped(1, 9), PASS, "all of these agree"),  # within the five
        (swapped(0, 2), PASS, "all of these agree"),  # among the rest
    ],
)
def test_decisions_are_the_largest_and_the_five_largest(
    after: Array, verdict: Verdict, said: str
) -> None:
    found = decided(after)
    assert found is not None
    assert found.verdict is verdict
    assert said in found.message


def test_a_margin_that_rounding_can_take_away_decides_nothing() -> None:
    # The unfolded model's error is 1e-3: eight times that is asked for.
    close = decided(swapped(3, 7), margin=5e-3, error=1e-3)
    assert close is not None
    assert close.verdict is PASS
    assert "0 of 4 decisions are clear" in close.message
    clear = decided(swapped(3, 7), margin=5e-2, error=1e-3)
    assert clear is not None
    assert clear.verdict is FAIL
    assert decided(scores(1.0), margin=1e-3, error=10.0) is None


@pytest.mark.parametrize(
    ("shape", "rows", "top"),
    [((3, 2), 3, 0), ((2, 4, 7), 8, 8), ((2, 6, 3, 3), 18, 18), ((2, 4, 3, 3), 18, 0)],
)
def test_rows_are_classes_along_the_last_axis_or_along_axis_1_of_images(
    shape: tuple[int, ...], rows: int, top: int
) -> None:
    y = [np.random.default_rng(seed).normal(size=shape) for seed in range(2)]
    found = measure_output("y", y, y, y, unit=2.0**-53).decisions
    assert found is not None
    assert (found.rows, found.clear, found.clear_top) == (2 * rows, 2 * rows, 2 * top)
    assert (found.flipped, found.flipped_top) == (0, 0)


def test_what_is_one_number_per_row_decides_nothing() -> None:
    y = [np.random.default_rng(seed).normal(size=(4, 1)) for seed in range(2)]
    assert measure_output("y", y, y, y, unit=U32).decisions is None


# ---- what would have been caught ----


@pytest.mark.parametrize("error", [1e-7, 1e-5, 1e-2])
def test_an_error_that_is_said_to_be_caught_is(error: float) -> None:
    """On top of the folded model's own, at a right angle to it; and a quarter of it is not."""
    y = outputs(size=1000)
    before, after = noisy(y, error, 1), noisy(y, error, 2)
    said = judged(y, before, after)
    assert said.verdict is PASS
    assert said.figures is not None
    caught = said.figures.caught
    assert error < caught < 16 * max(error, 4 * U32)
    for factor, verdict in ((1.0, FAIL), (0.25, PASS)):
        more = [a + across(a - b, caught * factor * float(np.linalg.norm(b)))
                for a, b in zip(after, y, strict=True)]  # fmt: skip
        assert judged(y, before, more).verdict is verdict


def across(error: Array, size: float) -> Array:
    """Something of norm ``size`` at a right angle to ``error``."""
    drawn = np.random.default_rng(3).normal(size=error.shape)
    drawn -= error * float((drawn * error).sum() / np.square(error).sum())
    return drawn * (size / float(np.linalg.norm(drawn)))


def test_what_was_measured_can_be_judged_again_with_other_gates() -> None:
    y = outputs()
    measured = measure_output("y", y, noisy(y, 1e-6, 1), noisy(y, 1e-6, 2), unit=U32)
    assert judge_errors(measured).verdict is PASS
    assert judge_errors(measured, Gates(atol=1e-9)).verdict is FAIL
    assert judge_errors(measured, Gates(atol=1e-3)).verdict is PASS


def test_numbers_whose_squares_overflow_are_judged() -> None:
    rng = np.random.default_rng(0)
    y = [rng.normal(size=50) for _ in range(7)] + [rng.normal(size=50) * 1e160]
    right = [a * (1 + 1e-17) for a in y]
    assert judged(y, right, right, unit=2.0**-53).verdict is PASS
    assert judged(y, right, [a * 1.01 for a in y], unit=2.0**-53).verdict is FAIL


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_error_that_is_no_number_never_passes(wrong: float) -> None:
    errors = (1e-7,) * 7
    spoilt = Measured("y", "float32", U32, e_fold=(*errors, wrong), e_unfold=(1e-7,) * 8)
    assert judge_errors(spoilt).verdict is FAIL
    blind = Measured("y", "float32", U32, e_fold=(1e-7,) * 8, e_unfold=(*errors, wrong))
    assert judge_errors(blind).verdict is INCONCLUSIVE
    assert judge_errors(Measured("y", "float32", U32)).verdict is INCONCLUSIVE
