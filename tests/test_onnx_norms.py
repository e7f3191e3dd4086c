"""A normalisation has a scale and a shift of its own, on the axis that is stated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from bnfold.channel_graph import Bias, Norm
from bnfold.verify.oracle import Oracle
from tests import nets
from tests.tie_nets import Row, feeds, net, of_last_node, only


def random(*shape: int, seed: int = 5) -> nets.Array:
    return np.random.default_rng(seed).normal(0, 1, shape)


NORMS: Mapping[str, tuple[Row, int]] = {
    "LayerNormalization": (
        Row("y = LayerNormalization(x, four, four)", 4, inputs="float[2,3,4] x"), 2),
    "LayerNormalization, rank unknown": (
        Row("y = LayerNormalization(x, four, four)", 4, inputs="float[] x",
            given={"x": random(2, 3, 4)}), -1),
    "LayerNormalization, axis from the front": (
        Row("y = LayerNormalization<axis=2>(x, four, four)", 4, inputs="float[2,3,4] x"), 2),
    "InstanceNormalization": (Row("y = InstanceNormalization(x, four, four)", 4), 1),
    "GroupNormalization": (
        Row("y = GroupNormalization<num_groups=2>(x, four, four)", 4, opset=21), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norm_takes_what_follows_on_its_axis(name: str) -> None:
    row, axis = NORMS[name]
    proto = net(row)
    norm = only(proto)
    assert isinstance(norm, Norm)
    assert (norm.axis, norm.channels, norm.bias) == (axis, 4, Bias.BUILT_IN)
    assert norm.weight is not None
    assert (norm.weight.storage, norm.weight.dtype, norm.weight.nbytes) == ("four", "FLOAT", 16)
    assert norm.weight.readers == ("four",)
    a, b = random(4), random(4, seed=7)
    given = feeds(proto, row)
    before = np.moveaxis(Oracle(proto).run(given)["y"], axis, -1)
    proto.graph.node[0].input[1:] = ["scale", "shift"]
    four = nets.constant(proto, "four").astype(np.float64)
    for key, value in (("scale", a * four), ("shift", a * four + b)):
        proto.graph.initializer.append(ir.to_proto(ir.tensor(value, name=key)))
    after = np.moveaxis(Oracle(proto).run(given)["y"], axis, -1)
    np.testing.assert_allclose(after, a * before + b, rtol=1e-9)


BIASES = {
    "absent, but possible": ("y = LayerNormalization(x, four)", Bias.BUILT_IN, 17),
    "computed": ("y = LayerNormalization(x, four, z)", Bias.DYNAMIC, 17),
    "none": ("y = RMSNormalization(x, four)", Bias.OPERATOR, 23),
    "computed, over space": ("y = InstanceNormalization(w, four, z)", Bias.DYNAMIC, 17),
}


@pytest.mark.parametrize("name", BIASES)
def test_norm_says_where_a_shift_would_go(name: str) -> None:
    body, bias, opset = BIASES[name]
    norm = only(net(Row(body, 0, inputs="float[2,3,4] x, float[2,4,3] w, float[4] z", opset=opset)))
    assert isinstance(norm, Norm)
    assert norm.bias is bias


def test_norm_by_a_computed_scale_has_no_weight() -> None:
    norm = only(net(Row("y = LayerNormalization(x, z)", 0, inputs="float[2,4] x, float[4] z")))
    assert isinstance(norm, Norm)
    assert (norm.weight, norm.channels) == (None, 4)


NO_NORMS = {
    "over two axes": Row("y = LayerNormalization<axis=-2>(x, rows4)", 0, inputs="float[2,4,4] x"),
    "rank unknown, axis from the front": Row(
        "y = LayerNormalization<axis=2>(x, four)", 0, inputs="float[] x"),
    "one scale for all": Row("y = LayerNormalization(x, one_scale)", 0, inputs="float[2,4] x"),
    "one scale, size unknown": Row(
        "y = LayerNormalization(x, one_scale)", 0, inputs="float[2,?] x"),
    "mean is read": Row("y, mean = LayerNormalization(x, four)", 0, inputs="float[2,4] x",
                        outputs="float[] y, float[] mean"),
    "one scale a group": Row(
        "y = GroupNormalization<num_groups=4>(x, four, four)", 0, opset=18),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NORMS)
def test_no_norm_is_stated(name: str) -> None:
    assert of_last_node(net(NO_NORMS[name])) is None
