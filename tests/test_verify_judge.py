"""Tier C's rule on arrays: what must pass, what must fail, what shows nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnfold.verify.judge import OutputVerdict, Verdict, judge_outputs, worst
from bnfold.verify.measure import judge_output

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
