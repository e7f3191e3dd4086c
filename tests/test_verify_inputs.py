"""The user's own inputs in every form that is promised; what is not the model's is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bnfold.errors import ReadError, UsageError
from bnfold.verify.inputs import user_samples
from bnfold.verify.onnx_inputs import input_specs
from bnfold.verify.subject import TensorSpec


def specs(inputs: str) -> tuple[TensorSpec, ...]:
    head = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float y)'
    return input_specs(onnx.parser.parse_model(f"{head} {{ y = Identity(x) }}"))


PAIR = specs("float[N, 3] x, int64[N] i")
ONE = specs("float[1, 3] x")
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
I = np.arange(5)  # noqa: E741


# ---- forms ----


def as_npz(folder: Path) -> Any:
    np.savez(folder / "in.npz", x=X, i=I)
    return folder / "in.npz"


def as_npz_by_order(folder: Path) -> Any:
    np.savez(folder / "in.npz", X, I)
    return str(folder / "in.npz")


def save_sets(folder: Path, *, named: bool) -> Path:
    for row in range(5):
        inner = folder / f"test_data_set_{row + 7}"  # 10 and 11 come after 9
        inner.mkdir()
        arrays: dict[str, NDArray[Any]] = {"i": I[row : row + 1], "x": X[row : row + 1]}
        if not named:
            arrays = {"x": arrays["x"], "i": arrays["i"]}
        for number, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(array, name if named else None)
            (inner / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
        (inner / "output_0.pb").write_bytes(b"never read")
    return folder


def as_several_files(folder: Path) -> Any:
    np.savez(folder / "a.npz", x=X[:2], i=I[:2])
    np.savez(folder / "b.npz", x=X[2:], i=I[2:])
    return [folder / "a.npz", str(folder / "b.npz")]


FORMS: dict[str, Callable[[Path], Any]] = {
    "an npz file": as_npz,
    "an npz file of arrays by order": as_npz_by_order,
    "a folder of test data with names": lambda folder: save_sets(folder, named=True),
    "a folder of test data without names": lambda folder: save_sets(folder, named=False),
    "its folders one by one": lambda folder: sorted(
        save_sets(folder, named=True).iterdir(), key=lambda path: int(path.name[14:])
    ),
    "several files": as_several_files,
    "several files in a tuple": lambda folder: tuple(as_several_files(folder)),
    "a mapping": lambda _: {"x": X, "i": I},
    "a list of mappings": lambda _: [
        {"x": x, "i": i} for x, i in zip(X[:, None], I[:, None], strict=True)
    ],
    "an iterator of mappings": lambda _: iter([{"x": X[:3], "i": I[:3]}, {"x": X[3:], "i": I[3:]}]),
    "a tuple by order": lambda _: (X, I),
    "a list of tuples": lambda _: [(X[:1], I[:1]), (X[1:], I[1:])],
    "torch tensors": lambda _: (torch.from_numpy(X).requires_grad_(), torch.from_numpy(I)),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_taken_in_every_form(form: str, tmp_path: Path) -> None:
    samples = user_samples(PAIR, FORMS[form](tmp_path))
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in samples.feeds]), X)
    assert [f["i"].tolist() for f in samples.feeds] == [[0], [1], [2], [3], [4]]
    assert (samples.seed, samples.distinct) == (None, 5)
    assert samples.roles == ("given",) * 5
    assert [(u.name, u.dtype, u.shapes, u.kind) for u in samples.uses()] == [
        ("x", "float32", ((1, 3),), "given"), ("i", "int64", ((1,),), "given"),
    ]  # fmt: skip
    assert samples.without_second_sizes() is samples.without_extremes() is samples


def as_npy(folder: Path) -> Any:
    np.save(folder / "x.npy", X)
    return folder / "x.npy"


def as_npy_files(folder: Path) -> Any:
    for row in range(5):
        np.save(folder / f"{row}.npy", X[row : row + 1])
    return [folder / f"{row}.npy" for row in range(5)]


def as_pb(folder: Path) -> Any:
    (folder / "x.pb").write_bytes(numpy_helper.from_array(X).SerializeToString())
    return folder / "x.pb"


SINGLE: dict[str, Callable[[Path], Any]] = {
    "an npy file": as_npy,
    "npy files": as_npy_files,
    "a pb file": as_pb,
    "an array": lambda _: X,
    "a list of arrays": lambda _: list(X[:, None]),
    "a tensor": lambda _: torch.from_numpy(X),
    "a list of tensors": lambda _: list(torch.from_numpy(X[:, None])),
}


@pytest.mark.parametrize("form", SINGLE)
def test_a_model_of_one_input_takes_a_bare_array(form: str, tmp_path: Path) -> None:
    samples = user_samples(ONE, SINGLE[form](tmp_path))
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in samples.feeds]), X)


# ---- how many samples ----


@pytest.mark.parametrize(
    ("inputs", "arrays", "shapes"),
    [
        ("float[1, 3] x", np.zeros((1, 3)), [(1, 3)]),
        ("float[1, 3] x", np.zeros((4, 3)), [(1, 3)] * 4),  # rows are samples
        ("float[2, 3] x", np.zeros((4, 3)), [(2, 3)] * 2),
        ("float[2, 3] x", np.zeros((5, 2, 3)), [(2, 3)] * 5),  # a leading axis of samples
        ("float[N, 3] x", np.zeros((4, 3)), [(1, 3)] * 4),
        ("float[N, 3] x", np.zeros((4, 2, 3)), [(2, 3)] * 4),
        ("float[N, N] x", np.zeros((4, 4)), [(4, 4)]),  # what stands elsewhere is no batch
        ("float x", np.zeros(()), [()]),
        ("float x", np.zeros(3), [()] * 3),
    ],
)
def test_an_array_holds_one_or_several_samples(inputs: str, arrays: Any, shapes: Any) -> None:
    samples = user_samples(specs(inputs), {"x": arrays})
    assert [f["x"].shape for f in samples.feeds] == shapes
    assert {f["x"].dtype for f in samples.feeds} == {np.dtype(np.float32)}


def test_inputs_without_a_common_batch_are_taken_whole() -> None:
    given = {"x": np.zeros((4, 3)), "t": np.zeros((2, 5))}
    (feed,) = user_samples(specs("float[N, 3] x, float[T, 5] t"), given).feeds
    assert {name: array.shape for name, array in feed.items()} == {"x": (4, 3), "t": (2, 5)}


def test_equal_samples_count_once() -> None:
    given = [{"x": X[:1], "i": np.array([n])} for n in (1, 1, 2)]
    assert user_samples(PAIR, given).distinct == 2


# ---- types ----


@pytest.mark.parametrize(
    ("kind", "given", "dtype", "values"),
    [
        ("float", np.array([[1, 2, 3]], np.float64), np.float32, [1, 2, 3]),
        ("float16", np.array([[1, 2, -np.inf]], np.float32), np.float16, [1, 2, -np.inf]),
        ("double", np.array([[1, 2, 255]], np.uint8), np.float64, [1, 2, 255]),
        ("bfloat16", np.array([[1, 2, 3]], np.float32), ml_dtypes.bfloat16, [1, 2, 3]),
        ("bfloat16", torch.tensor([[1, 2, 3]], dtype=torch.bfloat16), ml_dtypes.bfloat16,
         [1, 2, 3]),
        ("float8e4m3fn", torch.tensor([[1, 2, 3]]).to(torch.float8_e4m3fn),
         ml_dtypes.float8_e4m3fn, [1, 2, 3]),
        ("int4", np.array([[1, -8, 7]], np.int64), ml_dtypes.int4, [1, -8, 7]),
        ("int32", np.array([[1, 2, 3]], np.int64), np.int32, [1, 2, 3]),
        ("uint8", np.array([[True, False, True]]), np.uint8, [1, 0, 1]),
        ("bool", np.array([[True, False, True]]), np.bool_, [True, False, True]),
        ("complex64", np.array([[1j, 2, 3]]), np.complex64, [1j, 2, 3]),
        ("string", np.array([["a", "bc", ""]]), np.object_, ["a", "bc", ""]),
        ("string", np.array([[b"a", b"bc", b"d"]]), np.object_, ["a", "bc", "d"]),
        ("string", np.array([["a", "bc", "d"]], dtype=object), np.object_, ["a", "bc", "d"]),
    ],
)  # fmt: skip
def test_values_take_the_inputs_type(kind: str, given: Any, dtype: Any, values: Any) -> None:
    (feed,) = user_samples(specs(f"{kind}[1, 3] x"), (given,)).feeds
    assert feed["x"].dtype == np.dtype(dtype)
    assert feed["x"].shape == (1, 3)
    assert feed["x"].ravel().tolist() == values


def test_strings_are_read_from_a_file_and_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([["a", "b", "c"], ["a", "b", "d"], ["a", "b", "c"]]))
    samples = user_samples(specs("string[1, 3] x"), tmp_path / "in.npz")
    assert [f["x"].tolist() for f in samples.feeds][1] == [["a", "b", "d"]]
    assert samples.distinct == 2
    assert samples.uses()[0].dtype == "string"


# ---- refusals ----


def nan_at(row: int) -> Any:
    x = X.copy()
    x[row, 2] = np.nan
    return x


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.zeros((1, 3))}, "input 'i' is not given"),
        ({"x": np.zeros((1, 3)), "i": np.zeros(1, int), "z": 1}, "input 'z' is no input"),
        ({"x": np.zeros((1, 4)), "i": np.zeros(1, int)}, r"'x' has shape \[1, 4\], not \['N', 3\]"),
        ({"x": np.zeros((1, 3)), "i": np.zeros(1)}, "'i' is float64, not int64"),
        ({"x": np.array([["a", "b", "c"]]), "i": [1]}, "'x' is <U1, not float32"),
        ({"x": np.zeros((2, 3)), "i": np.zeros((3, 1), int)}, "different numbers of samples"),
        ({"x": np.full((1, 3), 1e300), "i": [1]},
         r"'x' holds 1e\+300 at \[0, 0\], which does not fit float32"),
        ({"x": np.zeros((1, 3)), "i": np.array([2**63], np.uint64)},
         r"'i' holds 9223372036854775808 at \[0\], which does not fit int64"),
        ((nan_at(3), I), r"input 'x' is NaN at \[0, 2\] of sample 3"),
        ((X, I, I), "3 array.s. by order, and the model has 2 inputs"),
        (X, "1 array.s. by order, and the model has 2 inputs"),
        ([], "no samples"),
        ([3], "a sample is a int"),
        (3, "a int is no set of inputs"),
    ],
)  # fmt: skip
def test_inputs_that_are_not_the_models_are_refused_by_name(inputs: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        user_samples(PAIR, inputs)


@pytest.mark.parametrize("name", ["missing.npz", "missing.npy", "missing.pb", "missing"])
def test_a_file_that_is_not_there_is_told_apart(name: str, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=f"{name}: can't be read as inputs: No such file"):
        user_samples(ONE, tmp_path / name)


def test_infinities_are_fed() -> None:
    (feed,) = user_samples(ONE, np.array([[1, np.inf, -np.inf]])).feeds
    assert feed["x"].tolist() == [[1, np.inf, -np.inf]]


def test_one_array_in_a_file_is_no_set_for_several_inputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.npy: .*one array.*np\.savez\(file, x=\.\.\., i="):
        user_samples(PAIR, as_npy(tmp_path))


def test_a_file_of_pickles_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "in.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("in.npz", "in.npy"):
        with pytest.raises(UsageError, match=f"{name}: can't be read as inputs"):
            user_samples(ONE, tmp_path / name)


def a_sequence(folder: Path) -> None:
    held = helper.make_sequence("x", onnx.SequenceProto.TENSOR, [numpy_helper.from_array(X)])
    (folder / "input_0.pb").write_bytes(held.SerializeToString())


def an_external_tensor(folder: Path) -> None:
    tensor = numpy_helper.from_array(X, "x")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())


def one_too_many(folder: Path) -> None:
    for number in range(2):
        (folder / f"input_{number}.pb").write_bytes(numpy_helper.from_array(X).SerializeToString())


def truncated(folder: Path) -> None:
    (folder / "input_0.pb").write_bytes(numpy_helper.from_array(X).SerializeToString()[:-9])


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a sequence": (a_sequence, r"input_0\.pb: (it holds no TensorProto|can't be read)"),
    "a tensor in another file": (an_external_tensor, r"input_0\.pb: .*another file"),
    "one input too many": (one_too_many, "holds 2 inputs, and the model has 1"),
    "a truncated tensor": (truncated, r"input_0\.pb: can't be read"),
    "nothing": (lambda _: None, "neither input_0.pb nor test_data_set_0"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_no_set_of_inputs_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, said = FOLDERS[what]
    make(tmp_path)
    with pytest.raises(UsageError, match=said) as caught:
        user_samples(ONE, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_input_that_is_no_tensor_cannot_be_fed() -> None:
    sequence = specs("seq(float[2]) x")
    with pytest.raises(UsageError, match="node 'x': this input is a sequence"):
        user_samples(sequence, {"x": [X]})
