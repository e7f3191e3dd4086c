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
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnfold.affine import (
    F64,
    AffineMap,
    Layout,
    RangeFault,
    RangeGuard,
    cast_once,
    fold_weight,
    in_channels,
    out_channels,
    range_fault,
    scale_factors,
    scale_rows,
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
    st.lists(FEW_BITS, min_size=CHANNELS, max_size=CHANNELS),
    st.lists(FEW_BITS, min_size=1, max_size=1),
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
    assert AffineMap.of([1, 2, 3], [4, 5, 6]).take([False, True, True]).scale.tolist() == [2, 3]
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
    g, b, m, v = parameters = [np.array([n], dtype=np.float32) for n in (0.1, 0.2, 0.3, 0.7)]
    gamma, beta, mean, variance = (Fraction(float(p[0])) for p in parameters)
    made = AffineMap.batch_norm(g, b, m, v, epsilon=1e-3)
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
            result[m] += weight[(m, c, *tap)] * x[channel][window]
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
            result[channel] += weight[(c, i, *tap)] * x[c][window]
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
        shape,
        layout,
        data,
        -1,
        lambda x, w: np.matmul(x, np.swapaxes(w, -1, -2) if transposed else w),
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
    sizes = 10.0 ** rng.integers(-4, 4, (2, channels))
    scale, shift = rng.normal(0, 1, (2, channels)) * sizes
    scale[0] = -abs(scale[0])
    scale[rng.integers(1, channels)] = 0
    return AffineMap.of(scale, shift)


def worst(
    case: Case, weight: F64, folded: F64, x: F64, taken: tuple[AffineMap, AffineMap]
) -> float:
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


def judged(
    case: Case, entry: bool, leave: bool, sabotage: Callable[[F64], F64] | None = None
) -> float:
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
    monkeypatch.setattr("bnfold.affine.SLAB", slab)
    monkeypatch.setattr("bnfold.layout.SLAB", slab)
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
    assert judged(case, side == "input", side == "output", SABOTAGES[sabotage]) > 1e-12


# ---- storage ----


def product(weight: Array, layout: Layout, outer: F64, inner: F64) -> F64:
    """``outer * weight * inner``, channel by channel."""
    result = np.empty(weight.shape)
    for place in np.ndindex(*weight.shape):
        m, c = channels_of(place, weight.shape, layout)
        result[place] = float(weight[place]) * outer[m] * inner[c]
    return result


def channels_of(place: tuple[int, ...], shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """The output and the input channel of one element of a weight."""
    out_axis, in_axis = layout.out_axis % len(shape), layout.in_axis % len(shape)
    m, c = place[out_axis], place[in_axis]
    if out_axis < in_axis:
        return m, m * layout.groups // shape[out_axis] * shape[in_axis] + c
    return c * layout.groups // shape[in_axis] * shape[out_axis] + m, c


def drawn(case: Case, dtype: Any = np.float64) -> tuple[Array, F64, F64]:
    """A random weight, and scales for its outputs and inputs."""
    rng = np.random.default_rng(11)
    outer = hard_map(rng, out_channels(case.shape, case.layout)).scale
    inner = hard_map(rng, in_channels(case.shape, case.layout)).scale
    return rng.normal(size=case.shape).astype(dtype), outer, inner


@PARAMETERS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_folded_in_float64_and_cast_once(case: Case, dtype: Any) -> None:
    weight, outer, inner = drawn(case, dtype)
    kept = weight.copy()
    result = fold_weight(weight, case.layout, output_scale=outer, input_scale=inner)
    assert np.array_equal(result, cast_once(product(weight, case.layout, outer, inner), dtype))
    assert result.dtype == weight.dtype
    assert result.flags.c_contiguous
    assert np.array_equal(weight, kept)


def test_a_scale_rounded_before_the_product_is_seen() -> None:
    weight, outer, inner = drawn(CASES["Conv 2d"], np.float32)
    layout = CASES["Conv 2d"].layout
    exact = cast_once(product(weight, layout, outer, np.ones_like(inner)), np.float32)
    early = fold_weight(weight, layout, output_scale=outer.astype(np.float32).astype(np.float64))
    assert not np.array_equal(early, exact)


@PARAMETERS
def test_one_scale_for_all_channels_may_be_given_once(case: Case) -> None:
    weight, _, _ = drawn(case)
    for sides in ({"output_scale": np.array([-3.0])}, {"input_scale": np.array([-3.0])}):
        assert np.array_equal(fold_weight(weight, case.layout, **sides), weight * -3)


def test_a_fold_makes_a_new_array_even_when_nothing_changes() -> None:
    weight = np.ones((4, 6), np.float32).T[::2]
    result = fold_weight(weight, Layout(0, 1))
    assert np.array_equal(result, weight)
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, weight)


@pytest.mark.parametrize("side", ["output_scale", "input_scale"])
def test_a_scale_of_the_wrong_length_is_refused(side: str) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        fold_weight(np.ones((4, 6)), Layout(0, 1), **{side: np.ones(5)})


@PARAMETERS
@pytest.mark.parametrize("count", [1, 2, 100])
def test_a_weight_folded_rows_at_a_time_is_the_weight_folded_at_once(
    case: Case, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, outer, inner = drawn(case, np.float32)
    sides = {"output_scale": outer, "input_scale": inner}
    whole, rows = fold_weight(weight, case.layout, **sides), case.shape[0]
    monkeypatch.setattr("bnfold.affine.SLAB", 2)
    monkeypatch.setattr("bnfold.layout.SLAB", 2)
    factors = scale_factors(case.shape, case.layout, **sides)
    parts = [scale_rows(weight[at : at + count], factors, at, rows) for at in range(0, rows, count)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1024, 1024), Layout(1, 0)),
        ((1, 1024, 1024), Layout(-1, -2)),
        ((256, 512, 3, 3), Layout(0, 1)),
    ],
)
def test_no_float64_copy_of_a_large_weight_is_made(shape: tuple[int, ...], layout: Layout) -> None:
    weight = np.ones(shape, np.float32)
    scale, shift = np.full(out_channels(shape, layout), 2.0), np.ones(in_channels(shape, layout))
    tracemalloc.start()
    try:
        fold_weight(weight, layout, output_scale=scale)
        fold_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        shift_through(weight, layout, shift)
        shift_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fold_peak < weight.nbytes + (2 << 20)
    assert shift_peak < 2 << 20


# ---- shifts ----


@PARAMETERS
def test_a_shift_reaches_each_output_as_the_sum_over_its_inputs(case: Case) -> None:
    weight, _, shift = drawn(case)
    batches = int(np.prod(case.shape[:-2])) if case.layout.in_axis < 0 else 1
    expected = np.zeros((batches, out_channels(case.shape, case.layout)))
    for number, place in enumerate(np.ndindex(*case.shape)):
        m, c = channels_of(place, case.shape, case.layout)
        expected[number * batches // weight.size, m] += weight[place] * shift[c]
    if batches > 1:
        with pytest.raises(ValueError, match="no one shift for all batches"):
            shift_through(weight, case.layout, shift)
        return
    bound = 1e-12 * np.abs(weight).sum() * np.abs(shift).max()
    assert np.allclose(shift_through(weight, case.layout, shift), expected[0], rtol=0, atol=bound)


def test_batches_that_agree_have_one_shift() -> None:
    weight = np.broadcast_to(np.arange(6.0).reshape(2, 3), (4, 2, 3))
    assert shift_through(weight, Layout(-1, -2), np.array([1.0, 10.0])).tolist() == [30, 41, 52]
    assert shift_through(weight, Layout(-2, -1), np.array([1.0])).tolist() == [3, 12]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_a_weight_that_has_not_the_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not have Layout"):
        shift_through(np.ones(shape), Layout(0, -1), np.ones(1))


# ---- range ----

INF, NAN = np.inf, np.nan
RANGE = {
    "in range": (np.float16, [1, 2], [3, -4], None),
    "overflows": (np.float16, [1, 60000], [1, INF], RangeFault(1, "overflows")),
    "overflows below": (np.float16, [-60000, 1], [-INF, 1], RangeFault(0, "overflows")),
    "was not finite before": (np.float32, [INF, NAN], [INF, NAN], None),
    "becomes subnormal": (np.float16, [1, 1e-4], [1, 1e-5], RangeFault(1, "underflows")),
    "becomes subnormal, bfloat16": (
        ml_dtypes.bfloat16, [1e-37, 1], [1e-39, 1], RangeFault(0, "underflows")
    ),
    "becomes zero": (np.float32, [1, -1], [1, 0], RangeFault(1, "underflows")),
    "smallest normal is in range": (np.float32, [1, 1], [1, 2.0**-126], None),
    "was subnormal before": (np.float32, [1, 1e-40], [1, 1e-42], None),
    "was zero before": (np.float32, [1, 0], [1, 0], None),
    "in range, float64": (np.float64, [1, 1e-300], [1, 1e-307], None),
    "overflows, float64": (np.float64, [1, 1e300], [1, INF], RangeFault(1, "overflows")),
}  # fmt: skip


@pytest.mark.parametrize("row", RANGE.values(), ids=RANGE)
@pytest.mark.parametrize("layout", [Layout(0, 1), Layout(1, 0)])
def test_the_range_guard_names_channel_and_fault(row: Any, layout: Layout) -> None:
    dtype, before, after, expected = row
    pair = [np.array([v, v, np.zeros(2)]).astype(dtype) for v in (before, after)]
    first, second = (p.T.copy() if layout.out_axis == 0 else p for p in pair)
    assert range_fault(first, second, layout) == expected


def test_a_channel_emptied_on_purpose_is_no_fault() -> None:
    before, after = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    zeroed = np.array([True, False, True])
    assert range_fault(before, after, Layout(0, 1), zeroed=zeroed) == RangeFault(1, "underflows")
    assert range_fault(before, after, Layout(0, 1), zeroed=np.ones(3, bool)) is None


def watched(before: Array, after: Array, layout: Layout, count: int) -> RangeFault | None:
    guard = RangeGuard(before.shape, layout, after.dtype)
    for at in range(0, before.shape[0], count):
        guard.see(at, before[at : at + count], after[at : at + count])
    return guard.fault()


@PARAMETERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planted", [INF, -INF, NAN])
def test_no_planted_overflow_is_missed(case: Case, dtype: Any, planted: float) -> None:
    before = drawn(case, dtype)[0]
    for place in np.ndindex(*case.shape):
        after = before.copy()
        after[place] = planted
        expected = RangeFault(channels_of(place, case.shape, case.layout)[0], "overflows")
        assert range_fault(before, after, case.layout) == expected
        assert watched(before, after, case.layout, 2) == expected


@PARAMETERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 100])
def test_no_channel_that_underflows_is_missed(case: Case, dtype: Any, count: int) -> None:
    before, channels = drawn(case, dtype)[0], out_channels(case.shape, case.layout)
    for channel in range(channels):
        scale = np.ones(channels)
        scale[channel] = float(ml_dtypes.finfo(dtype).smallest_normal) / 100  # type: ignore[no-untyped-call]
        after = fold_weight(before, case.layout, output_scale=scale)
        assert watched(before, after, case.layout, count) == RangeFault(channel, "underflows")


VECTORS_STORED = {
    "in range": ([1, 2], [1, 2], None),
    "becomes zero": ([1e-9, 2], [0, 2], None),
    "overflows": ([1, -1e9], [1, -INF], RangeFault(1, "overflows")),
    "there was none": (None, [INF, 2], RangeFault(0, "overflows")),
    "not a number": ([0, 0], [0, NAN], RangeFault(1, "is not finite")),
    "was not finite before": ([INF, NAN], [INF, NAN], None),
    "in rows": ([[1, 2, 3], [4, 5, 6]], [[1, 2, INF], [4, INF, 6]], RangeFault(1, "overflows")),
}


@pytest.mark.parametrize("row", VECTORS_STORED.values(), ids=VECTORS_STORED)
def test_a_bias_that_overflows_is_named(row: Any) -> None:
    before, after, expected = row
    wide = None if before is None else np.array(before, dtype=np.float64)
    assert vector_fault(wide, np.array(after, dtype=np.float16)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_signalling_nans_are_not_warned_of(dtype: Any) -> None:
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    infinity = np.array([INF]).astype(dtype).view(unsigned)
    broken = (infinity + unsigned.type(1)).view(dtype).reshape(1, 1)
    assert range_fault(np.ones_like(broken), broken, Layout(0, 1)) == RangeFault(0, "overflows")
    assert np.isnan(fold_weight(broken, Layout(0, 1), output_scale=np.ones(1)).astype(np.float64))
