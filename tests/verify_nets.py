"""A net with random statistics, its right fold, and folds that are wrong in one way each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
F64 = NDArray[np.float64]

EPSILON = 1e-3

UNFOLDED = """agraph ({t}[{n}, 3, 8, 8] x) => ({t}[{n}, 5] y) {{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
    b1 = BatchNormalization <epsilon = 0.001> (c1, g1, s1, m1, v1)
    r1 = Relu(b1)
    c2 = Conv <strides = [2, 2]> (r1, w2, a2)
    b2 = BatchNormalization <epsilon = 0.001> (c2, g2, s2, m2, v2)
    r2 = Relu(b2)
    f = Flatten(r2)
    y = Gemm <transB = 1> (f, wf, af)
}}"""

FOLDED = """agraph ({t}[{n}, 3, 8, 8] x) => ({t}[{n}, 5] y) {{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, a1)
    r1 = Relu(c1)
    c2 = Conv <strides = [2, 2]> (r1, w2, a2)
    r2 = Relu(c2)
    f = Flatten(r2)
    y = Gemm <transB = 1> (f, wf, af)
}}"""


def net(
    text: str, weights: Mapping[str, Array], *, dtype: str = "float", n: str = "1"
) -> onnx.ModelProto:
    """A model of opset 17 from a graph's text and its weights."""
    head = '<ir_version: 8, opset_import: ["" : 17]>'
    model = onnx.parser.parse_model(f"{head} {text.format(t=dtype, n=n)}")
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def statistics(dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    """Weights of the unfolded net: gammas negative, tiny and zero among them."""
    rng = np.random.default_rng(seed)
    raw = {
        "w1": rng.normal(0, 0.3, (6, 3, 3, 3)),
        "w2": rng.normal(0, 0.2, (8, 6, 3, 3)), "a2": rng.normal(0, 0.5, 8),
        "wf": rng.normal(0, 0.2, (5, 72)), "af": rng.normal(0, 0.5, 5),
    }  # fmt: skip
    for i, channels in ((1, 6), (2, 8)):
        gamma = rng.normal(1, 0.3, channels)
        gamma[:3] = [-0.7, 1e-4, 0.0]
        raw |= {
            f"g{i}": gamma, f"s{i}": rng.normal(0.3, 0.5, channels),
            f"m{i}": rng.normal(0, 0.5, channels), f"v{i}": rng.uniform(0.05, 2, channels),
        }  # fmt: skip
    return {name: value.astype(dtype) for name, value in raw.items()}


def fold(
    weights: Mapping[str, Array], epsilon: float = EPSILON, wide: Any = np.float64
) -> dict[str, Array]:
    """The textbook fold, computed in ``wide`` and cast once."""
    dtype = weights["w1"].dtype
    w = {name: value.astype(wide) for name, value in weights.items()}
    out = {"wf": w["wf"], "af": w["af"]}
    for i in ("1", "2"):
        scale = w[f"g{i}"] / np.sqrt(w[f"v{i}"] + wide(np.float32(epsilon)))
        out[f"w{i}"] = w[f"w{i}"] * scale[:, None, None, None]
        out[f"a{i}"] = w[f"s{i}"] + (w.get(f"a{i}", wide(0)) - w[f"m{i}"]) * scale
    return {name: value.astype(dtype) for name, value in out.items()}


def bias_off(weights: dict[str, Array]) -> dict[str, Array]:
    return {**weights, "a2": weights["a2"] * weights["a2"].dtype.type(1.001)}


def one_channel_scaled(weights: dict[str, Array]) -> dict[str, Array]:
    w2 = weights["w2"].copy()
    w2[4] *= w2.dtype.type(1.001)
    return {**weights, "w2": w2}


def channels_swapped(weights: dict[str, Array]) -> dict[str, Array]:
    return {**weights, "a1": weights["a1"][[0, 1, 2, 4, 3, 5]]}


def one_sign_flipped(weights: dict[str, Array]) -> dict[str, Array]:
    w1 = weights["w1"].copy()
    w1[0] *= -1
    return {**weights, "w1": w1}


def mean_forgotten(weights: dict[str, Array]) -> dict[str, Array]:
    return {**weights, "a1": np.zeros_like(weights["a1"])}


SABOTAGES: Mapping[str, Callable[[dict[str, Array]], dict[str, Array]]] = {
    "a bias off by a thousandth": bias_off,
    "one channel scaled by 1.001": one_channel_scaled,
    "two channels swapped": channels_swapped,
    "one sign flipped": one_sign_flipped,
    "the shift forgotten": mean_forgotten,
}
