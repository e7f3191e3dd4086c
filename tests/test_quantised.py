"""What integers and their scales become, against the same numbers scaled in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfold.channel_graph import Side
from bnfold.layout import F64, Array, Layout, beside, in_channels, out_channels
from bnfold.quantised import (
    Factor,
    UnnegatableError,
    factor,
    power,
    rounded_bias,
    scale_fault,
    steady,
    turned,
    varies,
)


@dataclass(frozen=True, slots=True)
class Shaped:
    """A weight of ``shape`` whose scales vary along ``axis``."""

    shape: tuple[int, ...]
    layout: Layout
    axis: int | None


CONV, GEMM = Layout(0, 1), Layout(-1, -2)
SHAPES = [
    Shaped(shape, layout, axis)
    for shape, layout in [
        ((6, 4, 2), CONV), ((6, 1, 2), Layout(0, 1, 6)), ((6, 1, 2), Layout(0, 1, 3)),
        ((6, 2, 2), Layout(0, 1, 2)), ((4, 6, 2), Layout(1, 0)), ((4, 1, 2), Layout(1, 0, 4)),
        ((4, 1, 2), Layout(1, 0, 2)), ((4, 3, 2), Layout(1, 0, 2)), ((4, 6), GEMM),
        ((3, 4, 6), GEMM), ((6, 4), Layout(0, 1)), ((1, 4, 1), CONV),
    ]
    for axis in (None, *range(len(shape)))
]  # fmt: skip

some = settings(max_examples=60, deadline=None)


def drawn(shaped: Shaped, side: Side, rng: np.random.Generator) -> tuple[F64 | None, F64 | None]:
    """Scales of both sides that vary along ``side``."""
    both = []
    for one, count in (
        (Side.OUTPUT, out_channels(shaped.shape, shaped.layout)),
        (Side.INPUT, in_channels(shaped.shape, shaped.layout)),
    ):
        scales = rng.choice([-2.0, -0.5, 0.0, 0.25, 3.0], count)
        both.append(scales if one in side else np.full(count, scales[0]))
    return both[0], both[1]


def scaled(shaped: Shaped, weight: F64, output: F64 | None, inputs: F64 | None) -> F64:
    for axis, values in ((shaped.layout.out_axis, output), (shaped.layout.in_axis, inputs)):
        if values is not None:
            weight = weight * beside(shaped.shape, shaped.layout, axis, values)
    return weight


def along(values: Array, axis: int | None, rank: int) -> Array:
    return values.reshape([-1 if k == axis else 1 for k in range(rank)])


@some
@given(st.sampled_from(SHAPES), st.integers(0, 999), st.booleans())
def test_integers_and_scales_give_the_scaled_weight(
    shaped: Shaped, seed: int, widened: bool
) -> None:
    rng = np.random.default_rng(seed)
    rank, axis = len(shaped.shape), shaped.axis
    for side in varies(shaped.shape, shaped.layout, axis, widened=widened):
        count = 1 if axis is None else shaped.shape[axis]
        step, zero = rng.uniform(0.5, 2, count), rng.integers(-3, 4, count)
        integers = rng.integers(-128, 128, shaped.shape).astype(np.int8)
        output, inputs = drawn(shaped, side, rng)
        wide_integers = integers.astype(np.float64)
        weight = (wide_integers - along(zero, axis, rank)) * along(step, axis, rank)
        found = factor(shaped.shape, shaped.layout, axis, output, inputs)
        wide = np.broadcast_to(zero, found.values.shape)
        turn = turned(integers, found.axis, wide, found.values, (-128, 127), keep_zero=False)
        after = turn.of(integers).astype(np.int64) - along(turn.zero_point, found.axis, rank)
        made = after * along(step * steady(found.values), found.axis, rank)
        np.testing.assert_allclose(made, scaled(shaped, weight, output, inputs), rtol=1e-12)


@pytest.mark.parametrize("shaped", SHAPES, ids=str)
def test_factor_of_each_output_is_what_the_channel_is_multiplied_by(shaped: Shaped) -> None:
    rng = np.random.default_rng(0)
    channels = out_channels(shaped.shape, shaped.layout)
    for side in varies(shaped.shape, shaped.layout, shaped.axis, widened=True):
        output = drawn(shaped, side & Side.OUTPUT, rng)[0]
        found = factor(shaped.shape, shaped.layout, shaped.axis, output, None)
        each = found.per_output(shaped.shape, shaped.layout)
        if each is not None:
            np.testing.assert_array_equal(np.broadcast_to(each, (channels,)), output)


def test_rows_of_a_group_that_differ_have_no_one_factor() -> None:
    layout = Layout(1, 0, 2)
    assert Factor(0, np.arange(1.0, 5.0)).per_output((4, 1, 2), layout) is None
    same = Factor(0, np.array([1.0, 1.0, 2.0, 2.0])).per_output((4, 1, 2), layout)
    assert same is not None
    assert same.tolist() == [1.0, 2.0]


def test_scales_on_two_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="does not lie on 0"):
        factor((6, 4, 2), CONV, 0, None, np.arange(4.0))


def test_scales_apart_by_a_rounding_are_one_number() -> None:
    values = np.full(4, 3.0) * (1 + 2.0**-50 * np.arange(4))
    assert factor((6, 4, 2), CONV, 0, None, values).values.tolist() == [3.0] * 6


NEGATED = [
    # lowest and highest integer, zero point, limits, all negated, kept zero: what comes of it
    ((-127, 127), 0, (-128, 127), False, True, "mirrored"),
    ((-128, 127), 0, (-128, 127), False, True, "refused"),
    ((-128, 127), 0, (-128, 127), False, False, "complement"),
    ((-128, 127), 0, (-128, 127), True, True, "complement"),
    ((0, 255), 128, (0, 255), False, True, "refused"),
    ((1, 255), 128, (0, 255), False, True, "mirrored"),
    ((0, 15), 7, (0, 15), False, False, "complement"),
]  # fmt: skip


@pytest.mark.parametrize("row", NEGATED, ids=str)
def test_integers_are_negated_within_their_type(
    row: tuple[tuple[int, int], int, tuple[int, int], bool, bool, str],
) -> None:
    ends, zero, limits, every, kept, wanted = row
    dtype = np.int8 if limits[0] else np.uint8
    integers = np.array([ends, ends], dtype)
    values = np.array([-1.0, -1.0 if every else 1.0])
    points = np.full(2, zero)
    if wanted == "refused":
        with pytest.raises(UnnegatableError):
            turned(integers, 0, points, values, limits, keep_zero=kept)
        return
    turn = turned(integers, 0, points, values, limits, keep_zero=kept)
    after = turn.of(integers).astype(np.int64) - turn.zero_point[:, None]
    np.testing.assert_array_equal(after, values[:, None] * (integers.astype(np.int64) - zero))
    assert bool(turn.zero_point[0] == zero) is (wanted == "mirrored")


def test_power_sums_the_squares_of_each_output() -> None:
    rng = np.random.default_rng(0)
    for shaped in SHAPES:
        integers = rng.integers(-9, 10, shaped.shape)
        unit = np.eye(out_channels(shaped.shape, shaped.layout))
        wanted = [
            np.square(scaled(shaped, integers.astype(float), one, None)).sum() for one in unit
        ]
        zero = np.zeros(1 if shaped.axis is None else shaped.shape[shaped.axis], np.int64)
        found = power(integers, zero, shaped.axis, shaped.layout)
        np.testing.assert_allclose(found, wanted)


@pytest.mark.parametrize(
    ("wide", "step", "said"),
    [
        ([1.0, 2.0], 0.5, ""),
        ([1.0, 2.0**40], 0.5, "overflows int32 on channel 1"),
        ([np.nan, 1.0], 0.5, "overflows int32 on channel 0"),
        ([0.1, 0.26], 0.5, "is too coarse in int32 on channel 1"),
    ],
)
def test_bias_that_is_no_int32_says_why(wide: list[float], step: float, said: str) -> None:
    made = rounded_bias(np.array(wide), np.full(2, step), np.full(2, 4.0))
    assert made.fault == said


@pytest.mark.parametrize(
    ("wide", "said"), [(1e-3, ""), (1e39, "the scale overflows"), (1e-39, "the scale underflows")]
)
def test_scale_that_leaves_its_type_is_told(wide: float, said: str) -> None:
    with np.errstate(over="ignore"):
        made = np.array([wide]).astype(np.float32)
    assert scale_fault(np.array([wide]), made).startswith(said)
    assert bool(scale_fault(np.array([wide]), made)) is bool(said)
