"""Inputs: seeded, valid and distinct; the user's own in every form that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from bnfold.errors import UsageError
from bnfold.verify.inputs import synthetic, user_samples


def model(inputs: str, body: str = "y = Identity(x)", constants: str = "") -> onnx.ModelProto:
    graph = f"g ({inputs}) => (float y) {constants} {{ {body} }}"
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')


IMAGE = model("float[N, 3, H, W] x")
PAIR = model("float[N, 3] x, int64[N] i")


def test_the_same_seed_gives_the_same_samples_and_another_gives_others() -> None:
    one, again, other = synthetic(IMAGE, 8, 5), synthetic(IMAGE, 8, 5), synthetic(IMAGE, 8, 6)
    assert (one.seed, len(one.feeds), one.distinct) == (5, 8, 8)
    for a, b, c in zip(one.feeds, again.feeds, other.feeds, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert not np.array_equal(a["x"], c["x"])


def test_more_samples_keep_the_first_ones() -> None:
    few, many = synthetic(IMAGE, 2), synthetic(IMAGE, 4)
    np.testing.assert_array_equal(few.feeds[1]["x"], many.feeds[1]["x"])


@pytest.mark.parametrize(
    ("inputs", "shape", "dtype"),
    [
        ("float[1, 3, 20, 30] x", (1, 3, 20, 30), np.float32),
        ("float[N, 3, H, W] x", (1, 3, 64, 64), np.float32),
        ("double[N, 3, D, H, W] x", (1, 3, 32, 32, 32), np.float64),
        ("float16[N, 7] x", (1, 7), np.float16),
        ("bfloat16[4, 7] x", (4, 7), ml_dtypes.bfloat16),
        ("float[N, 40, T] x", (1, 40, 32), np.float32),
        ("int64[N, T] x", (1, 16), np.int64),
        ("bool[N, T] x", (1, 16), np.bool_),
        ("float[?, 3] x", (1, 3), np.float32),
        ("float x", (), np.float32),
    ],
)
def test_open_sizes_are_small_and_types_are_the_inputs(
    inputs: str, shape: tuple[int, ...], dtype: Any
) -> None:
    x = synthetic(model(inputs), 1).feeds[0]["x"]
    assert (x.shape, x.dtype) == (shape, dtype)


def test_a_symbol_has_one_size_wherever_it_stands() -> None:
    feeds = synthetic(model("float[1, T, 8, 8] x, float[T, 5] z"), 1).feeds[0]
    assert feeds["x"].shape[1] == feeds["z"].shape[0]


def test_integers_are_valid_where_they_are_looked_up() -> None:
    proto = model("int64[N, T] x", "y = Gather(table, x)", "<float[5, 2] table>")
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((5, 2), np.float32), "table")
    )
    drawn = np.concatenate([f["x"].ravel() for f in synthetic(proto, 20).feeds])
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3, 4]


def test_pixels_use_the_whole_range() -> None:
    x = synthetic(model("uint8[1, 3, 64, 64] x"), 1).feeds[0]["x"]
    assert x.min() < 5
    assert x.max() > 250


def test_initializers_that_are_inputs_are_not_fed() -> None:
    proto = model("float[1] x, float[2] w")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    assert set(synthetic(proto, 1).feeds[0]) == {"x"}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [("seq(float[2]) x", "no tensor of known rank"), ("string[2] x", "no synthetic input")],
)
def test_an_input_that_cannot_be_drawn_is_named(inputs: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        synthetic(model(inputs))


def test_equal_samples_count_once() -> None:
    x = np.ones((1, 3), np.float32)
    given = [
        {"x": x, "i": np.array([1])},
        {"x": x, "i": np.array([1])},
        {"x": x, "i": np.array([2])},
    ]
    assert user_samples(PAIR, given).distinct == 2


@pytest.mark.parametrize(
    ("inputs", "arrays", "shapes"),
    [
        ("float[1, 3] x", np.zeros((1, 3)), [(1, 3)]),
        ("float[1, 3] x", np.zeros((4, 3)), [(1, 3)] * 4),  # rows are samples
        ("float[2, 3] x", np.zeros((4, 3)), [(2, 3)] * 2),
        ("float[2, 3] x", np.zeros((5, 2, 3)), [(2, 3)] * 5),  # a leading axis of samples
        ("float[N, 3] x", np.zeros((4, 3)), [(1, 3)] * 4),
        ("float[N, 3] x", np.zeros((4, 2, 3)), [(2, 3)] * 4),
        ("float x", np.zeros(()), [()]),
        ("float x", np.zeros(3), [()] * 3),
    ],
)
def test_an_array_holds_one_or_several_samples(inputs: str, arrays: Any, shapes: Any) -> None:
    samples = user_samples(model(inputs), {"x": arrays})
    assert [f["x"].shape for f in samples.feeds] == shapes
    assert {f["x"].dtype for f in samples.feeds} == {np.dtype(np.float32)}
    assert samples.seed is None


def test_an_npz_file_is_read(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, i=np.arange(5))
    for path in (tmp_path / "in.npz", str(tmp_path / "in.npz")):
        samples = user_samples(PAIR, path)
        np.testing.assert_array_equal(np.concatenate([f["x"] for f in samples.feeds]), x)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.zeros((1, 3))}, "input 'i' is not given"),
        ({"x": np.zeros((1, 3)), "i": np.zeros(1, int), "z": 1}, "input 'z' is no input"),
        ({"x": np.zeros((1, 4)), "i": np.zeros(1, int)}, r"'x' has shape \[1, 4\], not \['N', 3\]"),
        ({"x": np.zeros((1, 3)), "i": np.zeros(1)}, "'i' is float64, not int64"),
        ({"x": np.zeros((2, 3)), "i": np.zeros(3, int)}, "different numbers of samples"),
        ([], "no samples"),
        ([3], "a sample is a int"),
        (3, "a int is no set of inputs"),
        ("missing.npz", "missing.npz: can't be read as inputs"),
    ],
)
def test_inputs_that_are_not_the_models_are_refused_by_name(inputs: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        user_samples(PAIR, inputs)


def test_a_file_of_pickles_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="can't be read as inputs"):
        user_samples(PAIR, tmp_path / "in.npz")
