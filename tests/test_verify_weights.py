"""Tier A: bit for bit, with the place and the distance of the first difference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnfold.verify.judge import Verdict
from bnfold.verify.weights import hazards, judge_weights, ulp_distance
from tests.verify_nets import SABOTAGES, fold, statistics

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def weights(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"w": rng.normal(0, 1, (4, 3)).astype(dtype), "b": rng.normal(0, 1, 4).astype(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_weights_pass_and_others_are_not_looked_at(dtype: Any) -> None:
    said = judge_weights(weights(dtype), {**weights(dtype), "other": np.ones(3)})
    assert said.verdict is Verdict.PASS
    assert said.compared == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_ulp_in_one_place_fails_and_is_named(dtype: Any) -> None:
    found = weights(dtype)
    found["w"] = found["w"].copy()
    bits = found["w"].view(f"u{found['w'].itemsize}")
    bits[2, 1] += 1
    said = judge_weights(weights(dtype), found)
    assert said.verdict is Verdict.FAIL
    (difference,) = said.differences
    assert (difference.tensor, difference.index) == ("w", (2, 1))
    assert (difference.ulps, difference.count) == (1, 1)
    assert "'w'" in said.message
    assert "1 ulp" in said.message


@pytest.mark.parametrize("name", SABOTAGES)
def test_no_sabotage_of_a_fold_is_missed(name: str) -> None:
    right = fold(statistics())
    assert judge_weights(right, right).verdict is Verdict.PASS
    assert judge_weights(right, SABOTAGES[name](dict(right))).verdict is Verdict.FAIL


def test_a_fold_in_the_storage_type_or_with_a_wrong_epsilon_is_not_missed() -> None:
    right = fold(statistics())
    assert judge_weights(right, fold(statistics(), wide=np.float32)).verdict is Verdict.FAIL
    assert judge_weights(right, fold(statistics(), epsilon=0.0)).verdict is Verdict.FAIL
    # Stale: the weight as it was before the fold.
    assert judge_weights(right, {**right, "w1": statistics()["w1"]}).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    "found",
    [
        {"b": weights()["b"]},
        {**weights(), "w": weights()["w"].astype(np.float64)},
        {**weights(), "w": weights()["w"].T.copy()},
    ],
)
def test_a_weight_that_is_gone_or_of_another_type_or_shape_fails(found: dict[str, Any]) -> None:
    assert judge_weights(weights(), found).verdict is Verdict.FAIL


def test_a_scalar_that_differs_fails() -> None:
    said = judge_weights({"s": np.array(1, np.float32)}, {"s": np.array(2, np.float32)})
    assert said.verdict is Verdict.FAIL
    assert said.differences[0].ulps == 1 << 23


def test_nothing_to_compare_is_inconclusive() -> None:
    said = judge_weights({}, weights())
    assert said.verdict is Verdict.INCONCLUSIVE
    assert said.message == "no weights to compare"


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        (np.float32(0.0), np.float32(-0.0), 0),
        (np.float32(1.0), np.nextafter(np.float32(1), np.float32(2)), 1),
        (np.float16(2**-24), np.float16(-(2**-24)), 2),
        (np.float64(1.0), np.float64(np.inf), None),
        (np.float64(-1.0), np.nextafter(-1.0, 0.0), 1),
    ],
)
def test_the_distance_counts_representable_numbers(one: Any, other: Any, distance: Any) -> None:
    assert ulp_distance(one, other) == distance


def test_minus_zero_is_not_zero_and_nan_is_itself() -> None:
    zero, nan = np.zeros(1, np.float32), np.full(1, np.nan, np.float32)
    assert judge_weights({"w": zero}, {"w": -zero}).verdict is Verdict.FAIL
    assert judge_weights({"w": nan}, {"w": nan.copy()}).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("weight", "note"),
    [
        (np.array([[1.0, 2.0], [1e-5, 0]], np.float32), "differ in range"),
        (np.array([[1.0, 1e-40]], np.float32), "subnormal"),
        (np.array([[1.0, np.inf]], np.float32), "not finite"),
        (np.array([[1.0, 6e-6]], np.float16), "subnormal"),
        (np.array([[1.0, 1e-39]], np.float32).astype(ml_dtypes.bfloat16), "subnormal"),
    ],
)
def test_hazards_are_noted(weight: Any, note: str) -> None:
    (said,) = hazards("w", weight)
    assert note in said
    assert "'w'" in said
    assert judge_weights({"w": weight}, {"w": weight}).notes == (said,)


@pytest.mark.parametrize(
    "weight",
    [np.ones((3, 2), np.float32), np.zeros((3, 2), np.float16), np.arange(4), np.ones((0, 3)),
     np.array(3, np.float32)],
)  # fmt: skip
def test_sound_weights_have_no_hazards(weight: Any) -> None:
    assert not list(hazards("w", weight))
