"""The shapes of linear maps, against maps that are run position by position."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from bnfold.affine import F64
from bnfold.channel_graph import POINT, Taps
from bnfold.kernels import Kernel
from bnfold.passes.filters import Filter, after_one_another, beside, union
from tests.kernel_runs import made, random_kernel, run

SIZES = range(1, 9)
WINDOWS = [
    Taps.of(kernel, stride, dilation, begin, end)
    for kernel, stride, dilation in [(1, 1, 1), (1, 2, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1),
                                     (3, 1, 2), (2, 3, 2)]
    for begin, end in [(0, 0), (1, 1), (1, 0), (2, 1), (-1, 0), (0, -1)]
]  # fmt: skip
PAIRS = list(product(WINDOWS, WINDOWS))


def reads(taps: Taps) -> set[int]:
    """What the first output reads."""
    return {taps.first + k * taps.step for k in range(taps.count)}


def one_axis(taps: Taps, *, shifted: bool = False) -> Filter:
    return Filter(1, 1, 1, (taps,), shifted)


def convolved(x: F64, kernel: F64, stride: int, dilation: int, begin: int, end: int) -> F64:
    """A convolution along one axis, as textbooks have it: zeros around, then windows."""
    wide = np.concatenate([np.zeros(max(0, begin)), x, np.zeros(max(0, end))])
    wide = wide[max(0, -begin) : len(wide) - max(0, -end)]
    extent = (len(kernel) - 1) * dilation + 1
    starts = range(0, len(wide) - extent + 1, stride)
    return np.array([wide[s : s + extent : dilation] @ kernel for s in starts])


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("begin", "end"), [(0, 0), (1, 1), (2, 0), (0, 1), (-1, 2), (1, -2)])
def test_taps_are_those_of_a_convolution(
    kernel: int, stride: int, dilation: int, begin: int, end: int
) -> None:
    rng = np.random.default_rng(0)
    taps = Taps.of(kernel, stride, dilation, begin, end)
    assert (taps.begin, taps.end) == (begin, end)
    one = random_kernel(rng, 1, 1, (taps,), biased=False)
    for size in range((kernel - 1) * dilation + 1 + 3, 10):
        x = rng.normal(size=size)
        expected = convolved(x, one.weight.ravel(), stride, dilation, begin, end)
        np.testing.assert_allclose(run(one, x[None, None]).ravel(), expected)


@pytest.mark.parametrize(("first", "second"), PAIRS[::7])
def test_one_after_another_makes_and_reads_what_both_do(first: Taps, second: Taps) -> None:
    both = after_one_another(first, second)
    assert both.stride == first.stride * second.stride
    for size in SIZES:
        if made(size, first) > 0:
            assert made(size, both) == made(made(size, first), second)
    composed = {first.stride * o + i for o in reads(second) for i in reads(first)}
    assert composed <= reads(both)
    assert {min(composed), max(composed)} == {min(reads(both)), max(reads(both))}


def test_one_after_another_is_associative() -> None:
    for first, second, third in product(WINDOWS[::5], repeat=3):
        left = after_one_another(after_one_another(first, second), third)
        assert left == after_one_another(first, after_one_another(second, third))


def test_a_point_changes_nothing() -> None:
    for taps in WINDOWS:
        assert after_one_another(POINT, taps) == after_one_another(taps, POINT) == taps


def sizes(first: Taps, second: Taps) -> Iterator[int]:
    for size in SIZES:
        if made(size, first) > 0 and made(made(size, first), second) > 0:
            yield size


@pytest.mark.parametrize("shifted", [False, True])
def test_what_meets_the_border_is_one_filter_there_too(shifted: bool) -> None:
    """Sound for every pair; refused without need only where not every position is read."""
    refused = 0
    for first, second in PAIRS:
        rng = np.random.default_rng(1)
        one = random_kernel(rng, 1, 1, (first,), biased=shifted)
        two = random_kernel(rng, 1, 1, (second,))
        joined = one.then(two, (after_one_another(first, second),))
        alike = True
        for size in sizes(first, second):
            x = rng.normal(size=(1, 1, size))
            alike = alike and bool(np.allclose(run(joined, x), run(two, run(one, x)), atol=1e-12))
        meets = one_axis(first, shifted=shifted).meets_border(one_axis(second))
        assert alike or not meets, (first, second)
        refused += alike and not meets and second.stride == second.step == 1
    assert refused <= len(PAIRS) // 30


@pytest.mark.parametrize(
    ("first", "shifted", "second", "meets"),
    [
        (Taps.of(1), True, Taps.of(3), True),
        (Taps.of(1), True, Taps.of(3, begin=1, end=1), False),
        (Taps.of(1), False, Taps.of(3, begin=1, end=1), True),
        (Taps.of(3, begin=1, end=1), False, Taps.of(1), True),
        (Taps.of(3, begin=1, end=1), True, Taps.of(1), True),
        (Taps.of(3, begin=1, end=1), False, Taps.of(3, begin=1, end=1), False),
        (Taps.of(3), False, Taps.of(3, begin=1, end=1), False),
        (Taps.of(1, 2), False, Taps.of(3, begin=1), True),
        (Taps.of(1, 2), False, Taps.of(3, end=1), True),
        (Taps.of(1, 2, end=-1), False, Taps.of(3, end=1), False),
        (Taps.of(2, 2), False, Taps.of(3, begin=1), True),
        (Taps.of(1, begin=2, end=2), False, Taps.of(3, begin=1, end=1), True),
        (Taps.of(1, begin=-1), False, Taps.of(3, begin=1), False),  # what was cut off comes back
        (Taps.of(1, end=-1), False, Taps.of(3, end=1), False),
        (Taps.of(1, end=-1), False, Taps.of(3, begin=1), True),
    ],
)
def test_by_hand_at_the_border(first: Taps, shifted: bool, second: Taps, meets: bool) -> None:
    assert one_axis(first, shifted=shifted).meets_border(one_axis(second)) is meets


def test_all_axes_have_to_meet_the_border() -> None:
    padded, free = Taps.of(3, begin=1, end=1), Taps.of(3)
    two = Filter(1, 1, 1, (POINT, POINT), True)
    assert two.meets_border(Filter(1, 1, 1, (free, free)))
    assert not two.meets_border(Filter(1, 1, 1, (free, padded)))
    assert not two.meets_border(Filter(1, 1, 1, (padded, free)))


# ---- beside one another ----


@pytest.mark.parametrize(("one", "other"), PAIRS[::5])
def test_the_union_reads_what_either_does_where_both_make_the_same_positions(
    one: Taps, other: Taps
) -> None:
    both = union((one, other))
    alike = all(made(s, one) == made(s, other) for s in range(20)) and one.stride == other.stride
    assert (both is not None) == alike
    if both is not None:
        read = reads(one) | reads(other)
        assert read <= reads(both)
        assert (min(read), max(read)) == (both.first, both.last)
        assert (both.stride, both.slack) == (one.stride, one.slack)


def test_branches_around_one_centre_line_up() -> None:
    three, one, row = Taps.of(3, begin=1, end=1), Taps.of(1), Taps.of(5, begin=2, end=2)
    assert union((three, one)) == three
    assert union((one, row, three)) == row
    assert union((Taps.of(3, dilation=2, begin=2, end=2), three)) == row
    assert union((Taps.of(3, dilation=2, begin=2, end=2), one)).step == 2  # type: ignore[union-attr]
    assert union((Taps.of(3), one)) is None
    assert union((Taps.of(3, 2, begin=1, end=1), one)) is None
    assert union((Taps.of(3, 2, begin=1, end=1), Taps.of(1, 2))) == Taps.of(3, 2, begin=1, end=1)


def test_a_sum_has_the_groups_that_all_share_and_is_shifted_if_one_is() -> None:
    found = beside([Filter(12, 12, 4, (POINT,)), Filter(12, 12, 6, (POINT,), True)])
    assert found == Filter(12, 12, 2, (POINT,), True)
    assert beside([Filter(4, 4, 1, (POINT,)), Filter(4, 8, 1, (POINT,))]) is None
    assert beside([Filter(4, 4, 1, (POINT,)), Filter(2, 4, 1, (POINT,))]) is None


# ---- what can be run ----


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("begin", [-3, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("end", [-2, 0, 1, 4])
def test_what_is_runnable_pads_no_less_than_nothing_and_reads_the_same(
    symmetric: bool, kernel: int, stride: int, dilation: int, begin: int, end: int
) -> None:
    taps = Taps.of(kernel, stride, dilation, begin, end)
    (found,) = one_axis(taps).runnable(symmetric=symmetric).taps
    assert found.begin >= 0
    assert found.end >= 0
    assert found.begin == found.end or not symmetric
    assert (found.stride, found.slack) == (taps.stride, taps.slack)
    assert reads(taps) <= reads(found)
    if begin >= 0 and end >= 0 and (begin == end or not symmetric):
        assert found == taps


def test_weights_and_thinning_are_counted() -> None:
    found = Filter(8, 12, 4, (Taps.of(3, 2), Taps.of(5)))
    assert (found.weights, found.thinning) == (12 * 2 * 15, 2)
    assert Filter.identity(6, 3) == Filter(6, 6, 6, (POINT,) * 3)
    assert Kernel.identity(6, 3).groups == 6
