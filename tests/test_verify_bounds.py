"""What rounding constants does to an operator's output, held against the bounds, at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from bnfold.verify.bounds import (
    Operation,
    Rounding,
    channel_axis,
    fitting,
    norms,
    rounding,
)
from bnfold.verify.oracle import Oracle

F64 = NDArray[np.float64]
UNITS = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11}
DTYPES = st.sampled_from([np.float32, np.float16])
often = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


class Case:
    """One operator with drawn inputs; ``constant`` are the positions of its constants."""

    def __init__(self, op_type: str, inputs: list[F64], constant: set[int], **attributes: Any):
        self.op_type, self.inputs, self.constant = op_type, inputs, constant
        self.attributes = attributes

    def run(self, inputs: list[F64]) -> F64:
        """In float64."""
        names = [f"i{k}" for k in range(len(inputs))]
        node = helper.make_node(self.op_type, names, ["y"], **self.attributes)
        given = [helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in names]
        made = helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)
        graph = helper.make_graph([node], "g", given, [made])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        y: F64 = Oracle(model).run(dict(zip(names, inputs, strict=True)))["y"]
        return y

    def bound(self, y: F64) -> tuple[Rounding, int | None]:
        axis = channel_axis(self.op_type, y.ndim)
        known = [k in self.constant for k in range(len(self.inputs))]
        done = Operation(self.op_type, self.inputs, known, self.attributes)
        return rounding(done, y, axis), axis

    def with_constants(self, change: Callable[[F64], F64]) -> list[F64]:
        return [change(x) if k in self.constant else x for k, x in enumerate(self.inputs)]


def drawn(rng: np.random.Generator, *shape: int) -> F64:
    """Normal numbers, none below the least normal one of float16."""
    values = rng.normal(size=shape)
    return np.where(np.abs(values) < 2.0**-10, 2.0**-10, values)


def conv(rng: np.random.Generator) -> Case:
    rank, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 4]))
    inner, outer = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    kernel = rng.integers(1, 4, rank).tolist()
    x = rng.normal(size=(2, groups * inner, *rng.integers(4, 8, rank)))
    w = drawn(rng, groups * outer, inner, *kernel)
    attributes = {"group": groups, "kernel_shape": kernel, "pads": rng.integers(0, 2, 2 * rank),
                  "strides": rng.integers(1, 3, rank)}  # fmt: skip
    bias = [3 * drawn(rng, groups * outer)] if rng.random() < 0.5 else []
    return Case("Conv", [x, w, *bias], {1, 2}, **attributes)


def transposed(rng: np.random.Generator) -> Case:
    groups, inner, outer = int(rng.choice([1, 2])), int(rng.integers(1, 4)), 2
    kernel = rng.integers(1, 4, 2).tolist()
    x = rng.normal(size=(2, groups * inner, 4, 5))
    w = drawn(rng, groups * inner, outer, *kernel)
    attributes = {"group": groups, "kernel_shape": kernel, "strides": rng.integers(1, 3, 2)}
    return Case("ConvTranspose", [x, w, drawn(rng, groups * outer)], {1, 2}, **attributes)


def gemm(rng: np.random.Generator) -> Case:
    m, k, n = rng.integers(1, 9, 3).tolist()
    turned = rng.integers(0, 2, 2).tolist()
    a = rng.normal(size=(k, m) if turned[0] else (m, k))
    b = drawn(rng, *((n, k) if turned[1] else (k, n)))
    shape = [(n,), (m, n), (1, n), (m, 1), (1,)][int(rng.integers(5))]
    attributes = {"transA": turned[0], "transB": turned[1], "alpha": float(rng.uniform(-2, 2)),
                  "beta": float(rng.uniform(-2, 2))}  # fmt: skip
    return Case("Gemm", [a, b, drawn(rng, *shape)], {1, 2}, **attributes)


def matmul(rng: np.random.Generator) -> Case:
    batch, m, k, n = rng.integers(1, 7, 4).tolist()
    if rng.random() < 0.5:
        x = rng.normal(size=[(m, k), (batch, m, k), (2, batch, m, k)][int(rng.integers(3))])
        return Case("MatMul", [x, drawn(rng, k, n)], {1})
    return Case("MatMul", [drawn(rng, m, k), rng.normal(size=(batch, k, n))], {0})


def added(rng: np.random.Generator) -> Case:
    x = rng.normal(size=(2, 4, 3, 3))
    shape = [(4, 1, 1), (1,), (1, 4, 1, 1), (2, 4, 3, 3)][int(rng.integers(4))]
    return Case(str(rng.choice(["Add", "Sub", "Mul"])), [x, drawn(rng, *shape)], {1})


CASES = {case.__name__: case for case in (conv, transposed, gemm, matmul, added)}


@pytest.mark.parametrize("kind", CASES)
@often
@given(seed=st.integers(0, 2**32 - 1), dtype=DTYPES)
def test_constants_that_are_cast_once_move_no_channel_beyond_its_bound(
    kind: str, seed: int, dtype: Any
) -> None:
    rng = np.random.default_rng(seed)
    case = CASES[kind](rng)
    unit = UNITS[np.dtype(dtype)]
    right = case.run(case.inputs)
    found = case.run(case.with_constants(lambda x: x.astype(dtype).astype(np.float64)))
    bound, axis = case.bound(right)
    allowed = unit * fitting(bound.once(), norms(right, axis).size)
    assert (norms(found - right, axis) <= allowed + 1e-14).all()


def folded_in(
    dtype: Any, w: F64, bias: F64, statistics: tuple[F64, F64, F64, F64], axis: int
) -> tuple[F64, F64]:
    """The fold of a BatchNorm as a tool computes it in the type that weights are stored in."""
    narrow = [np.asarray(x, dtype) for x in (w, bias, *statistics)]
    weight, added_on, gamma, beta, mean, variance = narrow
    scale = gamma / np.sqrt(variance + dtype(1e-3))
    shape = [-1 if k == axis else 1 for k in range(w.ndim)]
    return weight * scale.reshape(shape), (added_on - mean) * scale + beta


@often
@given(seed=st.integers(0, 2**32 - 1), dtype=DTYPES, kind=st.sampled_from(["conv", "matmul"]))
def test_folds_in_the_stored_type_stay_within_the_random_walk(
    seed: int, dtype: Any, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    inner, outer, unit = int(rng.integers(2, 9)), int(rng.integers(1, 6)), UNITS[np.dtype(dtype)]
    if kind == "conv":
        x, w = rng.normal(size=(2, inner, 6, 6)), rng.normal(size=(outer, inner, 3, 3))
    else:
        x, w = rng.normal(size=(3, 5, inner)), rng.normal(size=(inner, outer))
    axis = 0 if kind == "conv" else 1
    w, bias = w.astype(dtype), rng.normal(size=outer).astype(dtype)
    statistics = [rng.normal(size=outer).astype(dtype) for _ in range(3)]
    statistics.append(rng.uniform(0.05, 3, outer).astype(dtype))
    wide = [s.astype(np.float64) for s in statistics]
    right = folded_in(np.float64, w, bias, (*wide,), axis)  # type: ignore[arg-type]
    found = folded_in(dtype, w, bias, (*statistics,), axis)  # type: ignore[arg-type]
    if kind == "conv":
        one, other = (Case("Conv", [x, *(c.astype(np.float64) for c in fold)], {1, 2})
                      for fold in (right, found))  # fmt: skip
        y, moved = one.run(one.inputs), other.run(other.inputs)
        rounded, along = one.bound(y)
        linear = y - right[1].reshape(-1, 1, 1)
    else:
        one, other = (Case("MatMul", [x, fold[0].astype(np.float64)], {1})
                      for fold in (right, found))  # fmt: skip
        linear, moved = one.run(one.inputs), other.run(other.inputs) + found[1].astype(np.float64)
        y = linear + right[1]
        rounded, along = one.bound(linear)
    # What the unfolded steps add up on the way, as bnfold.verify.lockstep.offset_norms has it.
    scale = np.abs(wide[0]) / np.sqrt(wide[3] + 1e-3)
    offsets = scale * (np.abs(bias.astype(np.float64)) + np.abs(wide[2])) + np.abs(wide[1])
    count = np.sqrt(y.size / outer)
    allowed = unit * (rounded.several(norms(linear, along)) + 4.0 * offsets * count)
    assert (norms(moved - y, along) <= allowed).all()


def test_a_weight_that_is_off_by_more_is_beyond_its_bound() -> None:
    """The bounds say no: ten roundings of one sign are more than one."""
    rng = np.random.default_rng(0)
    for kind in ("conv", "transposed", "gemm", "matmul"):
        case = CASES[kind](rng)
        right = case.run(case.inputs)
        bound, axis = case.bound(right)
        unit = UNITS[np.dtype(np.float32)]
        shaken = case.run(case.with_constants(lambda x: x * (1 + 1e-3)))
        assert (norms(shaken - right, axis) > 10 * unit * bound.once()).any()


def test_what_has_no_constants_has_no_bound() -> None:
    x = np.ones((2, 3, 4))
    for op_type in ("Relu", "Add", "MatMul", "Conv"):
        nothing = rounding(Operation(op_type, [x, x], [False, False], {}), x, 1)
        assert not nothing.once().any()


def test_a_weight_of_few_values_is_rounded_alike_everywhere() -> None:
    """All of its weights are off by one rounding of one sign: no random walk."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(1, 64, 5, 5)))
    w = np.full((2, 64, 3, 3), 0.1)
    found = w.astype(np.float16).astype(np.float64)
    case, other = (Case("Conv", [x, weight], {1}) for weight in (w, found))
    y, moved = case.run(case.inputs), other.run(other.inputs)
    bound, axis = case.bound(y)
    far = norms(moved - y, axis)
    unit = UNITS[np.dtype(np.float16)]
    assert (far <= unit * bound.once()).all()
    assert np.array_equal(bound.random, bound.absolute)


@pytest.mark.parametrize(
    ("op_type", "rank", "axis"),
    [("Conv", 4, 1), ("Conv", 2, 1), ("Gemm", 2, 1), ("MatMul", 3, 2), ("Relu", 1, 0),
     ("Relu", 0, None), ("Add", 3, 1)],
)  # fmt: skip
def test_the_channel_axis_is_where_weights_have_their_outputs(
    op_type: str, rank: int, axis: int | None
) -> None:
    assert channel_axis(op_type, rank) == axis


def test_a_bound_on_other_channels_is_all_of_it_for_each() -> None:
    bound = np.array([3.0, 4.0])
    assert fitting(bound, 2) is bound
    assert fitting(bound, 7).tolist() == [5.0]
    assert fitting(np.array([2.0]), 7).tolist() == [2.0]
