"""What a Pad adds is in the units of the tensor that it adds it to."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests import nets

SIZES = "[0, 0, 1, 1, 0, 0, 1, 1]"
SCALAR = "a = Mul(x, k) b = Sub(a, one)"
CHANNELS = "a = Mul(x, kc) b = Sub(a, one)"


def net(text: str, opset: int = 17) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    every: dict[str, nets.Array] = {
        "k": np.array(1 / 127.5, np.float32),
        "kc": rng.normal(1, 0.3, (2, 1, 1)).astype(np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
        "least": np.array(-np.inf, np.float32),
        "w": nets.weight(rng, 3, 2, 3, 3),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    if opset < 11:
        del every["pads"]  # an attribute
    used = {name: value for name, value in every.items() if name in nets.words(text)}
    graph = f"g (float[N,2,5,6] x) => (float[N,3,H,W] y) {{ {text} }}"
    return nets.model(graph, used, opset=opset)


@pytest.mark.parametrize(
    ("pad", "opset", "expected"),
    [
        ("p = Pad(b, pads)", 17, 127.5),
        ("p = Pad(b, pads, half)", 17, 191.25),
        ("p = Pad(b, pads)", 11, 127.5),
        (f"p = Pad<pads={SIZES}>(b)", 10, 127.5),
        (f"p = Pad<pads={SIZES}, value=0.5>(b)", 10, 191.25),
    ],
)
def test_a_scalar_normalisation_goes_through_a_pad_into_the_conv(
    pad: str, opset: int, expected: float
) -> None:
    model, report = nets.folded(net(f"{SCALAR} {pad} y = Conv(p, w)", opset))
    assert not report.kept
    assert nets.operators(model) == {"Pad": 1, "Conv": 1}
    node = next(node for node in model.graph.node if node.op_type == "Pad")
    stated = [a.f for a in node.attribute if a.name == "value"]
    value = stated[0] if stated else nets.constant(model, node.input[2])
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_channels_of_their_own_do_not_share_what_is_padded_in() -> None:
    _, report = nets.folded(net(f"{CHANNELS} p = Pad(b, pads, half) y = Conv(p, w)"))
    assert nets.verdicts(report) == {"Mul(a)": "BNF018", "Sub(b)": "BNF017"}
    _, report = nets.folded(net("a = Mul(x, kc) p = Pad(a, pads) y = Conv(p, w)"))
    assert not report.kept


def test_minus_infinity_is_the_same_in_all_units_of_a_positive_scale() -> None:
    pooled = "p = Pad(b, pads, least) q = MaxPool<kernel_shape=[3,3]>(p) y = Conv(q, w)"
    _, report = nets.folded(net(f"{CHANNELS} {pooled}"))
    assert not report.kept
    negative = "a = Neg(x) b = Sub(a, one)"
    _, report = nets.folded(net(f"{negative} {pooled}"))
    assert nets.verdicts(report)["Neg(a)"] == "BNF015"


def test_a_relu_behind_the_pad_still_asks_for_no_shift() -> None:
    _, report = nets.folded(net(f"{SCALAR} p = Pad(b, pads, half) r = Relu(p) y = Conv(r, w)"))
    assert nets.verdicts(report)["Sub(b)"] == "BNF017"
