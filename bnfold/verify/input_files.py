"""Inputs in files: ``.npz``, ``.npy``, and folders in the layout of the ONNX backend tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bnfold.errors import BnfoldError, ReadError, UsageError
from bnfold.verify.subject import TensorSpec

Arrays = dict[str, NDArray[Any]]

TODO = (
    "pass .npz or .npy files, folders with test_data_set_0/input_0.pb, a mapping of input names to "
    "arrays, or a sequence of mappings"
)
_BY_ORDER = re.compile(r"arr_\d+")


def read_sets(path: Path, specs: Sequence[TensorSpec]) -> list[Arrays]:
    """The sets of inputs that a file or folder holds, each with arrays by name.

    Args:
        path: An ``.npz``, an ``.npy`` (for a model of one input), a ``.pb`` (likewise), a folder
            of ``input_0.pb``, ``input_1.pb`` ..., or a folder of such folders, called
            ``test_data_set_0`` and so on.
        specs: The model's inputs, for those that are given by order.

    Raises:
        UsageError: It is none of these; names the file.
        ReadError: It is not there, or can't be read.
    """
    if path.is_dir():
        return _read_folder(path, specs)
    if path.suffix.lower() == ".pb":
        return [{_only(path, specs).name: _read_tensor(path)[1]}]
    if path.suffix.lower() == ".npy":
        return [{_only(path, specs).name: _loaded(path)}]
    return [_read_npz(path, specs)]


def _only(path: Path, specs: Sequence[TensorSpec]) -> TensorSpec:
    if len(specs) == 1:
        return specs[0]
    raise UsageError(
        f"it holds one array, and the model has {len(specs)} inputs", file=str(path),
        todo=f"store all in one file, as np.savez(file, {_keywords(specs)})",
    )  # fmt: skip


def _keywords(specs: Sequence[TensorSpec]) -> str:
    names = [spec.name for spec in specs]
    if all(name.isidentifier() for name in names):
        return ", ".join(f"{name}=..." for name in names)
    return "**{" + ", ".join(f"'{name}': ..." for name in names) + "}"


# ---- numpy ----


def _loaded(path: Path) -> Any:
    try:
        # Never pickled objects: the file may be anyone's.
        return np.load(path, allow_pickle=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _read_npz(path: Path, specs: Sequence[TensorSpec]) -> Arrays:
    loaded = _loaded(path)
    if isinstance(loaded, np.ndarray):  # an .npy of another name
        return {_only(path, specs).name: loaded}
    try:
        with loaded as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:
        raise _unreadable(path, error) from error
    # np.savez(file, x, y) calls them arr_0, arr_1.
    unnamed = all(_BY_ORDER.fullmatch(name) for name in arrays) and len(arrays) == len(specs)
    if unnamed and not {spec.name for spec in specs} & set(arrays):
        return {spec.name: arrays[f"arr_{i}"] for i, spec in enumerate(specs)}
    return arrays


def _unreadable(path: Path, error: Exception) -> BnfoldError:
    if isinstance(error, OSError) and error.errno is not None:  # the file, not what is in it
        met = f"can't be read as inputs: {error.strerror or error}"
        return ReadError(met, file=str(path), todo=TODO)
    return UsageError(f"can't be read as inputs: {error}", file=str(path), todo=TODO)


# ---- the layout of the ONNX backend tests ----


def _read_folder(path: Path, specs: Sequence[TensorSpec]) -> list[Arrays]:
    if list(path.glob("input_*.pb")):
        return [_read_set(path, specs)]
    inner = _in_order(p for p in path.glob("test_data_set_*") if p.is_dir())
    if not inner:
        raise UsageError(
            "the folder holds neither input_0.pb nor test_data_set_0", file=str(path), todo=TODO
        )
    return [_read_set(folder, specs) for folder in inner]


def _in_order(paths: Any) -> list[Path]:
    return sorted(paths, key=lambda path: (_number(path), path.name))


def _number(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _read_set(folder: Path, specs: Sequence[TensorSpec]) -> Arrays:
    files = _in_order(folder.glob("input_*.pb"))
    if len(files) != len(specs):
        raise UsageError(
            f"the folder holds {len(files)} inputs, and the model has {len(specs)}",
            file=str(folder), todo="store one input_N.pb for each input of the model",
        )  # fmt: skip
    read = [_read_tensor(file) for file in files]
    names = [name for name, _ in read]
    wanted = [spec.name for spec in specs]
    # Many writers leave the names out; then the files' numbers say which is which.
    chosen = names if sorted(names) == sorted(wanted) else wanted
    return {name: array for name, (_, array) in zip(chosen, read, strict=True)}


def _read_tensor(path: Path) -> tuple[str, NDArray[Any]]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
    except Exception as error:
        raise _unreadable(path, error) from error
    known = onnx.TensorProto.DataType.values()
    if tensor.data_type not in known or tensor.data_type == onnx.TensorProto.UNDEFINED:
        raise UsageError(
            "it holds no TensorProto (a sequence, a map or an optional can't be fed)",
            file=str(path), todo=TODO,
        )  # fmt: skip
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UsageError(
            "its values lie in another file, which is not read", file=str(path), todo=TODO
        )
    try:
        return tensor.name, numpy_helper.to_array(tensor)
    except Exception as error:
        raise _unreadable(path, error) from error
