"""How large each channel of a weight is before and after a fold."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.verify.ranges import SHOWN, channel_sizes, weight_ranges
from bnfold.verify.result import WeightRange
from tests import nets
from tests.verify_nets import FOLDED, UNFOLDED, fold, net, statistics

BEFORE = net(UNFOLDED, statistics())
AFTER = net(FOLDED, fold(statistics()))


def largest(weight: nets.Array, axis: int) -> list[float]:
    rows = np.moveaxis(np.abs(weight.astype(np.float64)), axis, 0)
    return [float(peak) for peak in rows.reshape(len(rows), -1).max(axis=1)]


def test_weights_that_changed_are_shown_and_no_others() -> None:
    found = {shown.tensor: shown for shown in weight_ranges(BEFORE, AFTER)}
    assert set(found) == {"w1", "w2"}
    for name, shown in found.items():
        old, new = (nets.constant(proto, name) for proto in (BEFORE, AFTER))
        assert shown.before == pytest.approx(largest(old, 0), rel=6e-3)
        assert shown.after == pytest.approx(largest(new, 0), rel=6e-3)
    assert weight_ranges(BEFORE, BEFORE) == ()


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Conv<group=2>(x, w)", (6, 2, 3, 3), 0),
        ("y = ConvTranspose(x, w)", (4, 6, 2, 2), 1),
        ("f = Flatten(x) y = Gemm(f, w)", (144, 5), 1),
        ("f = Flatten(x) y = Gemm<transB=1>(f, w)", (5, 144), 0),
        ("y = MatMul(x, w)", (6, 7), 1),
        ("y = MatMul(w, x)", (7, 6), 1),
    ],
)
def test_channels_are_those_of_the_output(body: str, shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    old, new = nets.weight(rng, *shape), nets.weight(rng, *shape)
    pair = [
        nets.model(f"g (float[2,4,6,6] x) => (float y) {{ {body} }}", {"w": weight})
        for weight in (old, new)
    ]
    assert weight_ranges(*pair) == (
        WeightRange("w", channel_sizes(old, axis), channel_sizes(new, axis)),
    )
    assert channel_sizes(new, axis) == pytest.approx(largest(new, axis), rel=6e-3)


def renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for number, node in enumerate(copy.graph.node):
        node.name = f"other{number}"
    return copy


def test_renamed_operators_are_paired_in_their_order() -> None:
    expected = weight_ranges(BEFORE, AFTER)
    assert len(expected) == 2
    assert weight_ranges(renamed(BEFORE), AFTER) == expected
    assert weight_ranges(BEFORE, renamed(AFTER)) == expected
    more = renamed(AFTER)
    more.graph.node.add(op_type="MatMul", input=["y", "wf"], output=["z"], name="more")
    assert weight_ranges(BEFORE, more) == ()


def test_operators_of_one_name_are_paired_by_it_in_whatever_order() -> None:
    turned = renamed(BEFORE)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in turned.graph.node]
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(nodes))
    names = {node.output[0]: node.name for node in nodes}
    after = renamed(AFTER)
    for node in after.graph.node:
        node.name = names[node.output[0]]
    found = {shown.tensor: shown for shown in weight_ranges(turned, after)}
    assert found == {shown.tensor: shown for shown in weight_ranges(BEFORE, AFTER)}


def test_a_fold_into_a_new_operator_is_shown_where_both_have_it() -> None:
    shown = weight_ranges(BEFORE, bnfold.fold(BEFORE).model)
    assert len(shown) == 2
    assert all(len(s.before) == len(s.after) for s in shown)


@pytest.mark.parametrize("channels", [SHOWN, SHOWN + 1, 1000])
def test_of_many_channels_neighbours_share_a_number(channels: int) -> None:
    weight = np.arange(1.0, channels + 1).reshape(channels, 1)
    sizes = channel_sizes(weight, 0)
    assert len(sizes) <= SHOWN
    assert sizes[-1] == pytest.approx(channels, rel=6e-3)
    assert sizes == tuple(sorted(sizes))
    assert (len(sizes) == channels) is (channels <= SHOWN)


def test_one_large_channel_among_many_is_not_lost() -> None:
    weight = np.ones((1000, 3))
    weight[517, 1] = -40.0
    assert max(channel_sizes(weight, 0)) == 40.0


def test_what_holds_no_floats_has_no_sizes() -> None:
    assert channel_sizes(np.ones((3, 4), np.int8), 0) == ()
    assert channel_sizes(np.ones((0, 4), np.float32), 0) == ()
