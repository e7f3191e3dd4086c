"""Linear maps with their numbers: put together, against both run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import POINT, Taps
from bnfold.kernels import Kernel, added, stacked
from bnfold.layout import Layout
from bnfold.passes.filters import Filter, after_one_another, union
from tests.kernel_runs import random_kernel, run

AXES = {
    "none": ((), ()),
    "line": ((Taps.of(3, 2),), (Taps.of(2, dilation=2),)),
    "plane": ((POINT, Taps.of(3)), (Taps.of(3), Taps.of(2, 2))),
    "padded": ((Taps.of(3, 1, 2, 1, 2), Taps.of(2, 2, 1, 1, 0)), (POINT, Taps.of(2))),
    "point first": ((POINT, POINT), (Taps.of(3), Taps.of(2, 2))),
    "cut": ((Taps.of(1, begin=-1), Taps.of(1, end=-2)), (Taps.of(2), Taps.of(3))),
    "volume": ((Taps.of(2), POINT, Taps.of(1, 2)), (POINT, Taps.of(3, dilation=2), Taps.of(2))),
}  # fmt: skip
# ins, middle, outs, groups of the first, groups of the second
CHANNELS = [
    (2, 3, 4, 1, 1), (4, 4, 4, 4, 4), (4, 4, 4, 4, 1), (4, 4, 6, 1, 2), (4, 8, 8, 4, 2),
    (6, 12, 6, 2, 3), (4, 4, 8, 2, 4), (4, 4, 4, 2, 4), (1, 1, 3, 1, 1), (3, 1, 2, 1, 1),
    (6, 6, 6, 3, 6), (6, 6, 6, 6, 3),
]  # fmt: skip


def data(rng: np.random.Generator, channels: int, axes: int) -> F64:
    return rng.normal(size=(2, channels, *(7, 8, 6)[:axes]))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_one_after_another_is_one_kernel(axes: str, channels: Sequence[int]) -> None:
    rng = np.random.default_rng(0)
    ins, middle, outs, g1, g2 = channels
    one = random_kernel(rng, ins, middle, AXES[axes][0], g1)
    two = random_kernel(rng, middle, outs, AXES[axes][1], g2)
    both = one.then(two, tuple(map(after_one_another, one.taps, two.taps)))
    x = data(rng, ins, len(one.taps))
    np.testing.assert_allclose(run(both, x), run(two, run(one, x)), atol=1e-12)
    filters = (Filter(k.groups * k.weight.shape[2], k.outs, k.groups, k.taps) for k in (one, two))
    first, second = filters
    assert first.then(second).groups == both.groups
    assert first.then(second).weights == both.weight.size


@pytest.mark.parametrize(("one", "two"), list(product((1, 2, 3, 6), repeat=2)))
def test_kernels_are_added_in_the_groups_that_they_share(one: int, two: int) -> None:
    rng = np.random.default_rng(0)
    taps = (Taps.of(3, begin=1, end=1), POINT), (POINT, Taps.of(3, dilation=2, begin=2, end=2))
    kernels = [random_kernel(rng, 6, 6, t, g) for t, g in zip(taps, (one, two), strict=True)]
    reach = tuple(union(pair) or POINT for pair in zip(*taps, strict=True))
    total = added([*kernels, Kernel.identity(6, 2)], reach)
    x = data(rng, 6, 2)
    expected = run(kernels[0], x) + run(kernels[1], x) + x
    np.testing.assert_allclose(run(total, x), expected, atol=1e-12)
    assert total.groups == np.gcd(one, two)


def test_fewer_groups_and_more_taps_change_nothing() -> None:
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, 8, 12, (Taps.of(2, 2, 2, 1, 3),), 4)
    x = data(rng, 8, 1)
    wide = Filter(8, 12, 4, (Taps.of(2, 2, 2, -2, 3),)).runnable().taps
    for groups in (4, 2, 1):
        again = kernel.in_groups(groups)
        assert again.weight.shape == (groups, 12 // groups, 8 // groups, 2)
        np.testing.assert_array_equal(run(again, x), run(kernel, x))
    more = (Taps(8, -3, 1, kernel.taps[0].stride, kernel.taps[0].slack),)
    np.testing.assert_allclose(run(kernel.reading(more), x), run(kernel, x), atol=1e-13)
    assert kernel.reading(kernel.taps) is kernel
    assert wide[0].begin >= 0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 4])
def test_maps_before_and_after_are_taken_over(groups: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, 4, 4, (Taps.of(3), Taps.of(2, 2)), groups)
    taken = AffineMap.of(rng.normal(size=channels), rng.normal(size=channels))
    x = data(rng, 4, 2)
    np.testing.assert_allclose(run(kernel.mapped(taken), x), taken.apply(run(kernel, x), 1))
    np.testing.assert_allclose(
        run(kernel.of_mapped(taken), x), run(kernel, taken.apply(x, 1)), atol=1e-12
    )
    np.testing.assert_allclose(run(kernel.scaled(-1), x), -run(kernel, x))


def test_a_constant_kernel_is_the_mean() -> None:
    x = data(np.random.default_rng(0), 3, 2)
    mean = Kernel.constant(3, (Taps.of(7), Taps.of(8)))
    np.testing.assert_allclose(run(mean, x)[..., 0, 0], x.mean(axis=(2, 3)), atol=1e-13)
    np.testing.assert_array_equal(run(Kernel.identity(3, 2), x), x)


def test_outputs_are_stacked() -> None:
    rng = np.random.default_rng(0)
    kernels = [random_kernel(rng, 4, outs, (Taps.of(2),), g) for outs, g in [(4, 4), (2, 1)]]
    x = data(rng, 4, 1)
    both = np.concatenate([run(kernel, x) for kernel in kernels], axis=1)
    np.testing.assert_allclose(run(stacked(kernels), x), both, atol=1e-13)


@pytest.mark.parametrize(
    ("layout", "shape", "outs"),
    [
        (Layout(0, 1), (4, 6, 3, 2), 4), (Layout(0, 1, 2), (4, 6, 3, 2), 4),
        (Layout(1, 0), (6, 4), 4), (Layout(-1, -2), (6, 4), 4), (Layout(-2, -1), (6, 4), 6),
        (Layout(0, 1, 6), (12, 1, 3), 12),
    ],
)  # fmt: skip
def test_a_weight_is_stored_as_it_was_read(
    layout: Layout, shape: tuple[int, ...], outs: int
) -> None:
    weight = np.random.default_rng(0).normal(size=shape)
    taps = tuple(Taps.of(size) for size in shape[2:])
    kernel = Kernel.of(weight, layout, taps, None)
    assert kernel.outs == outs
    np.testing.assert_array_equal(kernel.stored(layout), weight)


def test_a_weight_is_read_as_its_layout_says() -> None:
    rng = np.random.default_rng(0)
    weight, x, bias = rng.normal(size=(3, 5)), rng.normal(size=(2, 3)), rng.normal(size=5)
    right = Kernel.of(weight, Layout(-1, -2), (), bias)
    np.testing.assert_allclose(run(right, x), x @ weight + bias)
    left = Kernel.of(weight.T, Layout(-2, -1), (), np.array([2.0]))
    np.testing.assert_allclose(run(left, x), x @ weight + 2)
