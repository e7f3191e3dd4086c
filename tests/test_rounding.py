"""The cast to the stored type, against exact rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnfold.rounding import cast_once, round_into


@dataclass(frozen=True, slots=True)
class Format:
    """A binary format: its significant bits and the exponent of its smallest normal number."""

    dtype: Any
    digits: int
    smallest: int

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(2) ** (1 - self.digits)) * Fraction(2) ** (1 - self.smallest)


BFLOAT16 = Format(ml_dtypes.bfloat16, 8, -126)
FORMATS = [
    pytest.param(Format(np.float16, 11, -14), id="float16"),
    pytest.param(BFLOAT16, id="bfloat16"),
    pytest.param(Format(np.float32, 24, -126), id="float32"),
    pytest.param(Format(np.float64, 53, -1022), id="float64"),
]


def nearest(value: float, form: Format) -> float:
    """The nearest number of ``form``, ties to even, without a rounding on the way."""
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, form.smallest)
    unit = Fraction(2) ** (exponent - form.digits + 1)
    rounded = round(Fraction(value) / unit) * unit  # of a Fraction, round() takes ties to even
    return math.copysign(math.inf if abs(rounded) > form.largest else float(abs(rounded)), value)


def wrong(values: NDArray[np.float64], cast: NDArray[Any], form: Format) -> list[float]:
    """The judge: values whose cast is not the nearest number, down to the sign of zero."""
    pairs = zip(values.tolist(), cast.astype(np.float64).tolist(), strict=True)
    return [value for value, got in pairs if not same(got, nearest(value, form))]


def same(left: float, right: float) -> bool:
    if math.isnan(left) or math.isnan(right):
        return math.isnan(left) and math.isnan(right)
    return left == right and math.copysign(1, left) == math.copysign(1, right)


def traps(form: Format) -> NDArray[np.float64]:
    """Halfway between two numbers of ``form``, and a hair to either side, in every binade."""
    found = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308]
    top, bottom = 1 - form.smallest, form.smallest - form.digits - 1
    exponents = {*range(bottom, form.smallest + 3), *range(-3, 4), *range(top - 3, top + 1)}
    for exponent in sorted(exponents):
        for digits in (1.0, 2 - 2.0 ** (1 - form.digits), 1 + 2.0 ** (2 - form.digits)):
            start = math.ldexp(digits, exponent)
            half = math.ldexp(1.0, max(exponent, form.smallest) - form.digits)
            for middle in (start, start + half, start - half):
                if math.isfinite(middle):
                    around = (math.nextafter(middle, 0), middle, math.nextafter(middle, math.inf))
                    hairs = (middle * (1 + 2.0**-30), middle * (1 - 2.0**-30))
                    found += [*around, *hairs, -middle, -hairs[0], -hairs[1]]
    return np.array(found)


@pytest.mark.parametrize("form", FORMATS)
def test_traps_are_rounded_to_the_nearest(form: Format) -> None:
    values = traps(form)
    assert wrong(values, cast_once(values, form.dtype), form) == []


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_of_all_sizes_are_rounded_to_the_nearest(form: Format) -> None:
    rng = np.random.default_rng(0)
    exponents = rng.integers(form.smallest - form.digits - 3, 3 - form.smallest, 2000)
    values = np.ldexp(rng.uniform(-2, 2, 2000), np.minimum(exponents, 1022))
    assert wrong(values, cast_once(values, form.dtype), form) == []


@pytest.mark.parametrize("form", FORMATS)
@given(values=st.lists(st.floats(), min_size=1, max_size=20))
def test_any_float64_is_rounded_to_the_nearest(form: Format, values: list[float]) -> None:
    wide = np.array(values)
    assert wrong(wide, cast_once(wide, form.dtype), form) == []


@given(
    digits=st.integers(128, 255), exponent=st.integers(-140, 127),
    hair=st.integers(-(2**20), 2**20), negative=st.booleans(),
)  # fmt: skip
def test_bfloat16_near_a_tie_is_rounded_once(
    digits: int, exponent: int, hair: int, negative: bool
) -> None:
    value = math.ldexp(digits + 0.5 + hair * 2.0**-44, exponent - 7)
    values = np.array([-value if negative else value])
    assert wrong(values, cast_once(values, BFLOAT16.dtype), BFLOAT16) == []


def test_every_bfloat16_and_float16_survives() -> None:
    for dtype in (ml_dtypes.bfloat16, np.float16):
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):  # half of the NaNs are signalling ones
            wide = every.astype(np.float64)
        again = cast_once(wide, dtype)
        number = ~np.isnan(wide)
        assert np.array_equal(again.view(np.uint16)[number], every.view(np.uint16)[number])
        assert np.array_equal(np.isnan(again), ~number)


SABOTAGES: dict[str, Callable[[NDArray[np.float64]], NDArray[Any]]] = {
    "rounds twice": lambda v: v.astype(np.float32).astype(ml_dtypes.bfloat16),
    "rounds towards zero": lambda v: (
        (v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
    ),
    "flushes subnormals": lambda v: cast_once(
        np.where(np.abs(v) < 2.0**-126, 0, v), ml_dtypes.bfloat16
    ),
    "loses the sign of zero": lambda v: cast_once(v, ml_dtypes.bfloat16) + 0,
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_cast_that_is_wrong_is_seen(sabotage: str) -> None:
    values = traps(BFLOAT16)
    with np.errstate(all="ignore"):
        assert wrong(values, SABOTAGES[sabotage](values), BFLOAT16)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_shape_and_type_are_as_asked_and_the_argument_stays(
    form: Format, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(1).normal(size=shape[::-1]).T
    values.setflags(write=False)
    result = cast_once(values, form.dtype)
    assert (result.shape, result.dtype) == (shape, np.dtype(form.dtype))
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, values)


@pytest.mark.parametrize("form", FORMATS)
def test_rounding_into_an_array_is_the_same_cast(form: Format) -> None:
    values = np.random.default_rng(2).normal(size=(4, 6))
    target = np.empty((4, 12), dtype=form.dtype)[:, ::2]
    round_into(target, values)
    assert np.array_equal(target, cast_once(values, form.dtype))
