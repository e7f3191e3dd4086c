"""Twins: what other roundings of the constants differ by bounds a right fold, and no wrong one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from bnfold.verify.bounds import channel_axis, norms
from bnfold.verify.oracle import Oracle
from bnfold.verify.twins import Twins
from tests import nets

U16, U32 = 2.0**-11, 2.0**-24
TEXT = """g (float[2,3,7,7] x) => (float[2,5] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)
    s = Softmax(f) y = Gemm(s, m, k) }"""


def net(change: Any = None) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 3, 3, 3), "b": (6,), "m": (6, 5), "k": (5,)}
    given = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if change is not None:
        given = {name: change(name, value) for name, value in given.items()}
    text = TEXT.replace("float[", "double[")
    return nets.model(text, given)


def followed(unit: float, start: str = "c") -> tuple[dict[str, Any], dict[str, nets.Array]]:
    """All tensors, and the noise of each from ``start`` on."""
    oracle = Oracle(net())
    twins = Twins(unit, set(oracle.constants))
    values: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    noise: dict[str, nets.Array] = {}
    for node in oracle.walk(nets.feeds(net()), values):
        (name,) = node.output
        kept[name] = values[name]
        if name == start or twins.reach(node):
            noise[name] = twins.noise(node, name, values)
            twins.keep(node, name, values)
        twins.tidy(values)
    return kept, noise


def tensors(model: onnx.ModelProto) -> dict[str, Any]:
    values: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for node in Oracle(model).walk(nets.feeds(net()), values):
        kept |= {name: values[name] for name in node.output}
    return kept


@pytest.mark.parametrize(("unit", "dtype"), [(U32, np.float32), (U16, np.float16)])
def test_constants_rounded_in_any_way_are_within_the_noise(unit: float, dtype: Any) -> None:
    true, noise = followed(unit)
    assert set(noise) == {"c", "r", "p", "f", "s", "y"}
    rng = np.random.default_rng(1)

    def shaken(_: str, value: nets.Array) -> nets.Array:
        return value * (1 + unit * rng.uniform(-1, 1, value.shape))

    found = [tensors(net(shaken)) for _ in range(50)]
    found.append(tensors(net(lambda _, value: value.astype(dtype).astype(np.float64))))
    for other in found:
        for name, allowed in noise.items():
            axis = channel_axis("Gemm" if name == "y" else "Conv", true[name].ndim)
            assert (norms(other[name] - true[name], axis) <= allowed).all(), name


@pytest.mark.parametrize(
    "wrong", [lambda n, v: 1.001 * v if n == "b" else v, lambda n, v: v[::-1] if n == "w" else v]
)
def test_a_fault_is_beyond_the_noise_wherever_it_is_seen(wrong: Any) -> None:
    true, noise = followed(U32)
    other = tensors(net(lambda n, v: np.ascontiguousarray(wrong(n, v))))
    for name, allowed in noise.items():
        axis = channel_axis("Gemm" if name == "y" else "Conv", true[name].ndim)
        assert (norms(other[name] - true[name], axis) > allowed).any(), name


def test_noise_is_as_large_as_the_unit() -> None:
    """Sixteen times the unit, sixteen times the noise: it is no fixed number."""
    _, one = followed(U32)
    _, other = followed(16 * U32)
    for name, noise in one.items():
        ratio = float(np.linalg.norm(other[name]) / np.linalg.norm(noise))
        assert ratio == pytest.approx(16, rel=0.01)


def test_only_what_is_computed_from_a_doubtful_tensor_is_followed() -> None:
    _, noise = followed(U32, start="s")
    assert set(noise) == {"s", "y"}


def test_twins_of_tensors_that_are_gone_are_let_go() -> None:
    oracle = Oracle(net())
    twins = Twins(U32, set(oracle.constants))
    values: dict[str, Any] = {}
    alive: list[bool] = []
    for node in oracle.walk(nets.feeds(net()), values):
        if node.output[0] == "c":
            twins.keep(node, "c", values)
        alive.append(twins.reach(node))
        twins.tidy({} if node.output[0] == "c" else values)
    assert not any(alive)
