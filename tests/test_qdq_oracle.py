"""QuantizeLinear and DequantizeLinear in float64: every version, by the text of the standard."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from bnfold.verify.integer_biases import _over_an_edge
from bnfold.verify.oracle import Oracle
from tests import nets, qdq_nets
from tests.nets import Array

PLAIN = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
AXIS = "q = QuantizeLinear<axis = 1>(x, sa, za) y = DequantizeLinear<axis = 1>(q, sa, za)"


def constants() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "s": np.array(0.02, np.float32), "z": np.array(3, np.uint8),
        "sa": rng.uniform(0.01, 0.03, 4).astype(np.float32), "za": np.arange(-2, 2, dtype=np.int8),
    }  # fmt: skip


def net(body: str, opset: int, known: dict[str, Array] | None = None) -> onnx.ModelProto:
    return qdq_nets.model(body, known or constants(), opset=opset, given="float[3,4,5] x",
                          made="float[3,4,5] y")  # fmt: skip


@pytest.mark.parametrize(
    ("body", "opset"),
    [(PLAIN, o) for o in (10, 11, 13, 19, 21, 23)] + [(AXIS, o) for o in (13, 21)],
)
@pytest.mark.parametrize("size", [1.0, 10.0], ids=["inside", "beyond the ends"])
def test_oracle_agrees_with_the_runtime(body: str, opset: int, size: float) -> None:
    proto = net(body, opset)
    feeds = {"x": nets.feeds(proto)["x"] * np.float32(size)}
    found = Oracle(proto).run(feeds)["y"]
    assert found.dtype == np.float64
    ran = qdq_nets.on_ort(proto, feeds, qdq_nets.LEVELS[0])
    np.testing.assert_allclose(found, ran, rtol=1e-6, atol=1e-7)


def test_integers_of_more_than_24_bits_keep_their_digits() -> None:
    known: dict[str, Array] = {
        "q": np.array([2**30 + 1, -(2**31)], np.int32),
        "s": np.array(1, np.float32),
    }
    proto = nets.model(
        "g (float[2] x) => (float[2] y) { d = DequantizeLinear(q, s) y = Add(x, d) }", known,
        opset=13,
    )  # fmt: skip
    found = Oracle(proto).run({"x": np.zeros(2, np.float32)})["y"]
    assert found.tolist() == [2.0**30 + 1, -(2.0**31)]


def test_blocks_have_scales_of_their_own() -> None:
    known: dict[str, Array] = {
        "q": np.arange(-8, 8, dtype=np.int8).reshape(4, 4),
        "s": np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32),
    }
    proto = nets.model(
        "g (float[4,4] x) => (float[4,4] y) "
        "{ d = DequantizeLinear<axis = 1, block_size = 2>(q, s) y = Add(x, d) }", known,
        opset=21, ir=10,
    )  # fmt: skip
    found = Oracle(proto).run({"x": np.zeros((4, 4), np.float32)})["y"]
    np.testing.assert_array_equal(found, known["q"] * np.repeat(known["s"], 2, axis=1))


def test_small_integers_end_where_their_type_ends() -> None:
    known: dict[str, Array] = {"s": np.array(1, np.float32), "z": np.array(0, ml_dtypes.int4)}
    proto = net(PLAIN, 21, known)
    found = Oracle(proto).run({"x": np.full((3, 4, 5), 100, np.float32)})["y"]
    assert (found == 7).all()


def test_halves_go_to_the_even_neighbour() -> None:
    known: dict[str, Array] = {"s": np.array(1, np.float32), "z": np.array(0, np.int8)}
    x = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32), (3, 4, 5))
    found = Oracle(net(PLAIN, 13, known)).run({"x": x})["y"]
    assert found.ravel()[:5].tolist() == [0, 2, 2, 0, -2]


def test_what_is_nearest_to_an_edge_goes_over_it_and_no_other() -> None:
    known: dict[str, Array] = {"s": np.array(1, np.float32), "z": np.array(0, np.int8)}
    x = np.zeros((3, 4, 5), np.float32)
    x[0, 0, :4] = [0.2, 1.45, -3.3, 400.49]  # the last stays at the end of the type
    values: dict[str, Array] = {}
    node = next(Oracle(net(PLAIN, 13, known)).walk({"x": x}, values))
    moved = _over_an_edge(node, values)
    assert moved[0, 0, :4].tolist() == [0, 2, -3, 127]
    assert (moved != values["q"]).sum() == 1
