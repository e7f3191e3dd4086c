"""Where the tensors of an ONNX file lie, and whether all their bytes are there.

nbytes = ceil(product(dims) * bits / 8), wherever they are: in the file itself or in another one.
A tensor in another file says where: location (relative to the model's folder), offset, length.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from bnfold.errors import InvalidModelError, ReadError

# Marks a tensor that lies in the model's own file. No model can hold it: it is new in each run.
OWN_FILE = f"bnfold:own-file:{os.urandom(8).hex()}"

# Most attributes are numbers and strings: not looking into them saves half of the time.
_PLAIN = frozenset(
    onnx.AttributeProto.AttributeType.Value(name)
    for name in ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS")
)


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor: initializers and attributes of nodes, also in subgraphs and functions."""
    yield from proto.graph.initializer
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        for attribute in nodes.pop().attribute:
            if attribute.type in _PLAIN:
                continue
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graph.initializer
                nodes.extend(graph.node)


def external_files(proto: onnx.ModelProto, path: Path) -> frozenset[Path]:
    """The files beside the model that hold weights of it, each checked to be there and whole.

    Raises:
        ReadError: One is missing, or shorter than a tensor needs.
        InvalidModelError: A tensor's data has another size than its shape says, or lies outside
            the model's folder.
    """
    files: set[Path] = set()
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            file = _checked(tensor, path)
            files.update(() if file is None else (file,))
    return frozenset(files)


def _checked(tensor: onnx.TensorProto, path: Path) -> Path | None:
    """The file that ``tensor`` lies in; None when it is the model's own."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = _extent(tensor, entries, path)
    if entries.get("location") == OWN_FILE:
        return None
    target = _target(tensor, entries.get("location", ""), path)
    size = target.stat().st_size
    if offset + length > size:
        met = (f"the external data of tensor '{tensor.name}' ends at byte {offset + length}, "
               f"its file {target.name} at byte {size}")  # fmt: skip
        raise ReadError(met, file=str(path), todo="copy the data file again")
    return target


def _extent(tensor: onnx.TensorProto, entries: dict[str, str], path: Path) -> tuple[int, int]:
    """Offset and length of the data; its length is that of the shape."""
    needed = _needed_bytes(tensor)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or needed or 0)
    except ValueError as error:
        met = f"the external data of tensor '{tensor.name}' has no number as offset or length"
        raise InvalidModelError(met, file=str(path), todo="export the model again") from error
    if offset < 0 or length < 0 or needed not in (None, length):
        met = (f"tensor '{tensor.name}' of shape {list(tensor.dims)} takes {needed} bytes, but "
               f"its data is {length} bytes at offset {offset}")  # fmt: skip
        raise InvalidModelError(met, file=str(path), todo="export the model again")
    return offset, length


def _needed_bytes(tensor: onnx.TensorProto) -> int | None:
    """The bytes that type and shape ask for; None for a type without a fixed size."""
    try:
        bits = int(ir.DataType(tensor.data_type).bitwidth)
    except (TypeError, ValueError):
        return None
    return -(-math.prod(int(dim) for dim in tensor.dims) * bits // 8)


def _target(tensor: onnx.TensorProto, location: str, path: Path) -> Path:
    folder = path.absolute().parent
    target = (folder / location).resolve()
    whose = f"the external data of tensor '{tensor.name}'"
    beside = "put the data beside the model"
    if not location or Path(location).is_absolute() or folder.resolve() not in target.parents:
        met = f"{whose} points outside its folder: '{location}'"
        raise InvalidModelError(met, file=str(path), todo=beside)
    if not target.is_file():
        met = f"{whose} is missing: {folder / location}"
        raise ReadError(met, file=str(path), todo="copy the data file beside the model")
    if not os.access(target, os.R_OK):
        met = f"{whose} can't be read: {target}"
        raise ReadError(met, file=str(path), todo="change the permissions of the data file")
    if target.stat().st_nlink > 1:
        # onnx and onnx-ir both refuse it: a hard link may lead out of the folder unseen.
        met = f"{whose} is in a file with several hard links, which onnx refuses: {target}"
        raise ReadError(met, file=str(path), todo="copy the data file instead of linking it")
    return target
