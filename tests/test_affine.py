"""The fold algebra: absorbing a map must be the same as applying it."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bnfold.affine
from bnfold.affine import (
    F64,
    AffineMap,
    Layout,
    RangeFault,
    cast_once,
    fold_weight,
    in_channels,
    out_channels,
    range_fault,
    shift_through,
    vector_fault,
)

Array = NDArray[Any]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# ---- maps ----

# Few bits, so that float64 computes products of three of them exactly: laws hold with ==.
FEW_BITS = st.one_of(
    st.integers(-64, 64).map(lambda n: n / 8), st.sampled_from([0.0, -0.0, 2.0**-10, -(2.0**-10)])
)
CHANNELS = 3
VECTORS = st.one_of(
    st.lists(FEW_BITS, min_size=CHANNELS, max_size=CHANNELS), st.lists(FEW_BITS, min_size=1, max_size=1)
)
MAPS = st.builds(AffineMap.of, VECTORS, VECTORS)
DATA = st.lists(FEW_BITS, min_size=CHANNELS, max_size=CHANNELS).map(lambda v: np.array([v, v]))


def equal(left: AffineMap, right: AffineMap) -> bool:
    channels = max(left.channels, right.channels)
    left, right = left.expand(channels), right.expand(channels)
    return np.array_equal(left.scale, right.scale) and np.array_equal(left.shift, right.shift)


@given(first=MAPS, second=MAPS, third=MAPS)
def test_composition_is_associative(first: AffineMap, second: AffineMap, third: AffineMap) -> None:
    assert equal(third.after(second).after(first), third.after(second.after(first)))


@given(first=MAPS, second=MAPS, x=DATA)
def test_composition_is_one_after_the_other(first: AffineMap, second: AffineMap, x: F64) -> None:
    one_by_one = second.apply(first.apply(x, axis=1), axis=1)
    assert np.array_equal(second.after(first).apply(x, axis=1), one_by_one)


@given(one=MAPS)
def test_the_identity_changes_nothing_on_either_side(one: AffineMap) -> None:
    assert equal(one.after(AffineMap.identity()), one)
    assert equal(AffineMap.identity().after(one), one)


@given(one=MAPS, x=DATA)
def test_a_map_is_its_scaling_and_then_its_shifting(one: AffineMap, x: F64) -> None:
    assert equal(AffineMap.shifting(one.shift).after(AffineMap.scaling(one.scale)), one)
    assert np.array_equal(one.apply(x, axis=-1), x * one.scale + one.shift)


@given(one=MAPS, x=DATA)
def test_the_inverse_undoes_a_map_or_names_the_channel(one: AffineMap, x: F64) -> None:
    if one.scale.all():
        assert np.allclose(one.inverse().apply(one.apply(x, axis=1), axis=1), x, rtol=0, atol=1e-9)
        return
    channel = one.scale.tolist().index(0)
    with pytest.raises(ZeroDivisionError, match=f"the scale of channel {channel} is 0"):
        one.inverse()


@given(one=MAPS)
def test_the_predicates_say_what_the_values_are(one: AffineMap) -> None:
    assert one.is_scaling == all(t == 0 for t in one.shift)
    assert one.is_shifting == all(s == 1 for s in one.scale)
    assert one.is_identity == equal(one, AffineMap.identity())
    assert one.finite


def test_scale_and_shift_are_widened_to_each_other() -> None:
    assert AffineMap.identity().channels == 1
    assert AffineMap.scaling([[1], [2]]).shift.tolist() == [0, 0]
    assert AffineMap.shifting([1, 2, 3]).scale.tolist() == [1, 1, 1]
    assert AffineMap.identity().expand(2).scale.tolist() == [1, 1]
    with pytest.raises(ValueError, match="broadcast"):
        AffineMap.of([1, 2], [1, 2, 3])


def test_channels_are_picked() -> None:
    assert AffineMap.of([1, 2, 3], [4, 5, 6]).take([2, 0, 0]).shift.tolist() == [6, 4, 4]
    assert AffineMap.of([1, 2, 3], [4, 5, 6]).take(slice(1, 3)).scale.tolist() == [2, 3]
    assert equal(AffineMap.of(2, 3).take([5, 7]), AffineMap.of(2, 3))


def test_a_map_keeps_its_values_whatever_happens_to_the_arrays_it_was_made_of() -> None:
    scale = np.ones(2)
    made = AffineMap(scale, np.zeros(2))
    scale[:] = 7
    assert made.is_identity
    with pytest.raises(ValueError, match="read-only"):
        made.scale[0] = 7


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_map_applies_along_its_axis(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
    one = AffineMap.of([2, -3, 0], [1, 0, 5])
    result = one.apply(x, axis)
    for channel in range(3):
        expected = np.take(x.astype(np.float64), channel, axis) * one.scale[channel]
        assert np.array_equal(np.take(result, channel, axis), expected + one.shift[channel])
    assert result.dtype == np.float64


HARD = {"gamma": [-1.5, 1e-6, 0, 3], "beta": [0.5, -2, 7, 0], "mean": [100, -3, 0, 1e-3]}


def test_batch_norm_is_its_formula_on_data() -> None:
    variance, x = np.array([1e-12, 4, 1e6, 0]), np.random.default_rng(0).normal(size=(5, 4, 2))
    gamma, beta, mean = (np.array(v)[:, None] for v in HARD.values())
    centred = (x - mean) / np.sqrt(variance[:, None] + 1e-5)
    result = AffineMap.batch_norm(**HARD, variance=variance, epsilon=1e-5).apply(x, axis=1)
    assert np.allclose(result, gamma * centred + beta, rtol=1e-10, atol=1e-10)


def test_batch_norm_of_float32_parameters_is_computed_in_float64() -> None:
    parameters = [np.float32([v]) for v in (0.1, 0.2, 0.3, 0.7)]
    gamma, beta, mean, variance = (Fraction(float(p[0])) for p in parameters)
    made = AffineMap.batch_norm(*parameters, epsilon=1e-3)
    scale = float(gamma) / float(variance + Fraction(1e-3)) ** 0.5
    assert made.scale[0] == pytest.approx(scale, rel=4e-16)
    assert made.shift[0] == pytest.approx(float(beta) - float(mean) * scale, rel=4e-16)


def test_what_is_not_finite_is_only_data() -> None:
    broken = AffineMap.batch_norm([1, 0, 1], 0, 0, [0, 0, -1], epsilon=0)
    huge = AffineMap.of(1e308, 1e308)
    made = (broken, huge.after(huge), broken.after(huge), AffineMap.of(5e-324, 1).inverse())
    assert not any(one.finite for one in made)
    assert not np.isfinite(huge.apply(np.full((1, 1), 1e308), axis=1)).any()
    assert huge.finite
    assert not AffineMap.shifting(np.nan).is_scaling


# ---- absorption: operators written out, one product at a time ----


def conv(x: F64, weight: F64, groups: int) -> F64:
    """Unpadded: (C, ...) by (M, C/g, ...)."""
    outputs, inputs, *kernel = weight.shape
    size = [n - k + 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    result = np.zeros((outputs, *size))
    for m, c in itertools.product(range(outputs), range(inputs)):
        channel = m // (outputs // groups) * inputs + c
        for tap in np.ndindex(*kernel):
            window = tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True))
            result[m] += weight[(m, c, *tap)] * x[(channel, *window)]
    return result


def conv_transpose(x: F64, weight: F64, groups: int) -> F64:
    """Only where all taps meet the input: (C, ...) by (C, M/g, ...)."""
    inputs, per_group, *kernel = weight.shape
    size = [n - k + 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    result = np.zeros((per_group * groups, *size))
    for c, i in itertools.product(range(inputs), range(per_group)):
        channel = c // (inputs // groups) * per_group + i
        for tap in np.ndindex(*kernel):
            starts = [k - 1 - t for k, t in zip(kernel, tap, strict=True)]
            window = tuple(slice(s, s + n) for s, n in zip(starts, size, strict=True))
            result[channel] += weight[(c, i, *tap)] * x[(c, *window)]
    return result


@dataclass(frozen=True, slots=True)
class Case:
    """A linear operator: its weight, its data and what it computes, channels on ``axis``."""

    shape: tuple[int, ...]
    layout: Layout
    data: tuple[int, ...]
    axis: int
    compute: Callable[[F64, F64], F64]


def _conv(shape: tuple[int, ...], groups: int = 1) -> Case:
    data = (shape[1] * groups, *(k + 2 for k in shape[2:]))
    return Case(shape, Layout(0, 1, groups), data, 0, lambda x, w: conv(x, w, groups))


def _conv_transpose(shape: tuple[int, ...], groups: int = 1) -> Case:
    data = (shape[0], *(k + 2 for k in shape[2:]))
    return Case(shape, Layout(1, 0, groups), data, 0, lambda x, w: conv_transpose(x, w, groups))


def _right(shape: tuple[int, ...], layout: Layout) -> Case:
    transposed = layout.out_axis % len(shape) < layout.in_axis % len(shape)
    data = (2, *shape[:-2], 5, shape[layout.in_axis])
    return Case(
        shape, layout, data, -1, lambda x, w: np.matmul(x, np.swapaxes(w, -1, -2) if transposed else w)
    )


CASES = {
    "Conv 1d": _conv((4, 3, 3)),
    "Conv 2d": _conv((5, 3, 2, 3)),
    "Conv 3d": _conv((2, 3, 2, 1, 2)),
    "Conv 1x1": _conv((4, 6, 1, 1)),
    "Conv of 2 groups": _conv((6, 2, 3), groups=2),
    "Conv of 3 groups, 2d": _conv((6, 3, 2, 2), groups=3),
    "Conv depthwise": _conv((4, 1, 3, 3), groups=4),
    "Conv depthwise, times 2": _conv((8, 1, 3), groups=4),
    "ConvTranspose 1d": _conv_transpose((3, 4, 3)),
    "ConvTranspose 2d": _conv_transpose((3, 5, 2, 3)),
    "ConvTranspose 3d": _conv_transpose((3, 2, 2, 1, 2)),
    "ConvTranspose of 2 groups": _conv_transpose((6, 4, 3), groups=2),
    "ConvTranspose of 3 groups, 2d": _conv_transpose((6, 3, 2, 2), groups=3),
    "ConvTranspose depthwise": _conv_transpose((4, 1, 3), groups=4),
    "Gemm (K, N)": _right((3, 5), Layout(1, 0)),
    "Gemm (N, K)": _right((5, 3), Layout(0, 1)),
    "MatMul (K, N)": _right((3, 5), Layout(-1, -2)),
    "MatMul (1, K, N)": _right((1, 3, 5), Layout(-1, -2)),
    "MatMul (B, K, N)": _right((4, 3, 5), Layout(-1, -2)),
    "MatMul (M, K) first": Case((5, 3), Layout(-2, -1), (3, 4), -2, lambda x, w: np.matmul(w, x)),
    "MatMul (B, 1, M, K) first": Case(
        (2, 1, 5, 3), Layout(-2, -1), (2, 4, 3, 4), -2, lambda x, w: np.matmul(w, x)
    ),
}
PARAMETERS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def hard_map(rng: np.random.Generator, channels: int) -> AffineMap:
    """Scales negative, tiny, zero and large; shifts of all sizes."""
    scale = rng.normal(0, 1, channels) * 10.0 ** rng.integers(-8, 8, channels)
    scale[rng.integers(0, channels)] = 0
    return AffineMap.of(scale, rng.normal(0, 1, channels) * 10.0 ** rng.integers(-8, 8, channels))


def worst(case: Case, weight: F64, folded: F64, x: F64, taken: tuple[AffineMap, AffineMap]) -> float:
    """The judge: error of the folded operator, relative to the sum of all magnitudes in it."""
    entry, leave = taken
    expected = leave.apply(case.compute(entry.apply(x, case.axis), weight), case.axis)
    size_in = AffineMap.of(np.abs(entry.scale), np.abs(entry.shift)).apply(np.abs(x), case.axis)
    size_out = AffineMap.of(np.abs(leave.scale), np.abs(leave.shift))
    size = size_out.apply(case.compute(size_in, np.abs(weight)), case.axis)
    bias = leave.shift
    if not entry.is_scaling:
        bias = leave.scale * shift_through(weight, case.layout, entry.shift) + bias
    got = AffineMap.shifting(bias).apply(case.compute(x, folded), case.axis)
    return float(np.max(np.abs(got - expected) / np.where(size == 0, 1, size)))


def judged(case: Case, entry: bool, leave: bool, sabotage: Callable[[F64], F64] | None = None) -> float:
    rng = np.random.default_rng(7)
    weight, x = rng.normal(size=case.shape), rng.normal(size=case.data)
    inner = hard_map(rng, in_channels(case.shape, case.layout)) if entry else AffineMap.identity()
    outer = hard_map(rng, out_channels(case.shape, case.layout)) if leave else AffineMap.identity()
    if case.shape[:-2] not in ((), (1,)) and case.layout.in_axis < 0:
        inner = AffineMap.scaling(inner.scale)  # batches: no one shift for all of them
    change = sabotage or (lambda scale: scale)
    folded = fold_weight(
        weight, case.layout,
        output_scale=change(outer.scale) if leave else None,
        input_scale=change(inner.scale) if entry else None,
    )  # fmt: skip
    return worst(case, weight, folded, x, (inner, outer))


@PARAMETERS
@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_absorbing_a_map_is_applying_it(case: Case, sides: str) -> None:
    assert judged(case, entry=sides != "output", leave=sides != "input") <= 1e-12


@PARAMETERS
@pytest.mark.parametrize("slab", [1, 7, 40])
def test_absorbing_is_the_same_however_little_is_computed_at_a_time(
    case: Case, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnfold.affine, "_SLAB", slab)
    assert judged(case, entry=True, leave=True) <= 1e-12


SABOTAGES: dict[str, Callable[[F64], F64]] = {
    "channels reversed": lambda scale: scale[::-1],
    "one channel on": lambda scale: np.roll(scale, 1),
    "wrong by 1e-6": lambda scale: scale * (1 + 1e-6),
    "inverted": lambda scale: 1 / np.where(scale == 0, 1, scale),
    "sign lost": np.abs,
}


@PARAMETERS
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_absorbing_a_wrong_map_is_seen(case: Case, side: str, sabotage: str) -> None:
    assert judged(case, side == "input", side == "output", SABOTAGES[sabotage]) > 1e-9
