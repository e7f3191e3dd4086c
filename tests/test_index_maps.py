"""Links say where entries go: held against numpy, which moves them."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from bnfold.channel_graph import Dim, Link
from bnfold.index_maps import along, broadcast, permuted, reduced, reshaped, same_axes
from tests.units import pairs

Axes = tuple[int, ...]
Shape = tuple[int, ...]


def axes_of(links: tuple[Link, ...]) -> list[tuple[Axes, Axes]]:
    return [(link.source, link.target) for link in links]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """Two shapes of one number of elements, from the same prime factors in one order."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=1, max_size=5))

    def cut() -> Shape:
        ends = sorted(draw(st.sets(st.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        bounds = [0, *ends, len(factors)]
        dims = [prod(factors[a:b]) for a, b in pairwise(bounds)]
        for _ in range(draw(st.integers(0, 2))):
            dims.insert(draw(st.integers(0, len(dims))), 1)
        return tuple(dims)

    return cut(), cut()


@given(reshapes())
@settings(deadline=None)
def test_reshape_keeps_the_order_of_all_elements(shapes: tuple[Shape, Shape]) -> None:
    left, right = pairs(reshaped(*shapes), *shapes)
    assert sorted(left.tolist()) == list(range(prod(shapes[0])))
    assert left.tolist() == right.tolist()


@given(reshapes(), st.data())
@settings(deadline=None)
def test_reshape_of_half_known_sizes_says_nothing_wrong(
    shapes: tuple[Shape, Shape], data: st.DataObject
) -> None:
    def hidden(shape: Shape) -> tuple[Dim, ...]:
        return tuple(data.draw(st.sampled_from([size, size, f"s{size}", None])) for size in shape)

    left, right = pairs(reshaped(*map(hidden, shapes)), *shapes)
    assert left.tolist() == right.tolist()


# Sizes, and which axes become which.
GROUPS: dict[str, tuple[tuple[Dim, ...], tuple[Dim, ...], list[tuple[Axes, Axes]]]] = {
    "equal": ((2, 3), (2, 3), [((0,), (0,)), ((1,), (1,))]),
    "split": ((2, 12, 5), (2, 3, 4, 5), [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]),
    "joined": ((2, 3, 4, 5), (2, 12, 5), [((0,), (0,)), ((1, 2), (1,)), ((3,), (2,))]),
    "across": ((6, 4), (3, 8), [((0, 1), (0, 1))]),
    "symbols": (("N", 4, "H", "W"), ("N", 2, 2, "H", "W"),
                [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,)), ((3,), (4,))]),
    "symbols joined": (("N", 4, "H", "W"), ("N", 4, None),
                       [((0,), (0,)), ((1,), (1,)), ((2, 3), (2,))]),
    "unknown in front": ((None, 7, 4), (None, 4), [((2,), (1,)), ((0, 1), (0,))]),
    "unknown at the back": ((2, 4, None), (2, 4, None, 3),
                            [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
    "other symbols": (("N", 4), ("M", 4), [((1,), (1,)), ((0,), (0,))]),
    "symbols in another order": (("N", "M"), ("M", "N"), [((0, 1), (0, 1))]),
    "nothing known": ((None, None), (None,), [((0, 1), (0,))]),
    "to a scalar": ((1, 1), (), []),
    "no elements": ((0, 4), (4, 0), []),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_reshape_closes_groups_as_early_as_it_can(name: str) -> None:
    source, target, expected = GROUPS[name]
    assert sorted(axes_of(reshaped(source, target))) == sorted(expected)


def test_permuted_is_a_transpose() -> None:
    shape, order = (2, 3, 4), (2, 0, 1)
    left, right = pairs(permuted(order), shape, (4, 2, 3))
    places = np.arange(24).reshape(shape).transpose(order).ravel()
    assert (places[right] == left).all()


def test_along_takes_entries_of_one_axis() -> None:
    links = along(3, 1, [2, 0], [1, 3])
    left, right = pairs(links, (2, 3, 4), (2, 5, 4))
    source, target = np.arange(24).reshape(2, 3, 4), np.arange(40).reshape(2, 5, 4)
    assert left.tolist() == source.transpose(0, 2, 1)[..., [2, 0]].ravel().tolist()
    assert right.tolist() == target.transpose(0, 2, 1)[..., [1, 3]].ravel().tolist()


def test_along_without_indices_means_all() -> None:
    left, right = pairs(along(2, 1), (2, 3), (2, 3))
    assert left.tolist() == right.tolist() == list(range(6))


@pytest.mark.parametrize(("keep", "expected"), [
    (True, [((0,), (0,)), ((2,), (2,))]), (False, [((0,), (0,)), ((2,), (1,))]),
])  # fmt: skip
def test_reduced_axes_are_in_no_link(keep: bool, expected: list[tuple[Axes, Axes]]) -> None:
    assert axes_of(reduced(4, (1, 3), keep=keep)) == expected


def test_same_axes_leaves_out_what_is_changed() -> None:
    assert axes_of(same_axes(4, (2, 3))) == [((0,), (0,)), ((1,), (1,))]


BROADCAST: dict[str, tuple[tuple[Dim, ...], tuple[Dim, ...], list[tuple[Axes, Axes]]]] = {
    "equal": ((2, 3), (2, 3), [((0,), (0,)), ((1,), (1,))]),
    "fewer axes": ((4, 1, 1), (2, 4, 5, 6), [((0,), (1,))]),
    "symbols": (("N", 4), ("N", 4), [((0,), (0,)), ((1,), (1,))]),
    "unknown": ((None, 4), (None, 4), [((1,), (1,))]),
    "1 stays 1": ((1, 4), (1, 4), [((0,), (0,)), ((1,), (1,))]),
    "a scalar": ((), (2, 3), []),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_broadcast_links_axes_that_are_not_repeated(name: str) -> None:
    source, target, expected = BROADCAST[name]
    assert axes_of(broadcast(source, target)) == expected
