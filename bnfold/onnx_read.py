"""Reading an ONNX file without its weights, and saying in one line what is wrong with it.

An initializer's raw data lies in one piece in the file. So the file is cut along the wire format,
and every large initializer is read as an *external* tensor whose file is the model itself: what is
parsed is small, and a weight is read when somebody asks for it.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from bnfold import protobuf_wire as wire
from bnfold.errors import InvalidModelError, ReadError
from bnfold.onnx_shapes import Inferred
from bnfold.onnx_valid import check_and_infer, known_versions

LARGE_BYTES = 1024  # an initializer from this size on stays in the file

_OWN_FILE = "bnfold:own-file"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model as it was read; its large initializers are still in the file.

    ``shapes`` is what shape inference found for the main graph; ``external`` whether the file
    keeps weights in other files; ``data_files`` which ones.
    """

    path: Path
    model: ir.Model
    shapes: Inferred
    data_files: frozenset[Path]

    @property
    def external(self) -> bool:
        """Whether weights are kept in other files."""
        return bool(self.data_files)


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read the ONNX file at ``path``, leaving its weights where they are.

    Raises:
        ReadError: The file, or its external data, can't be read or is no ONNX model.
        InvalidModelError: It is one, but onnx.checker refuses it or it is too new.
    """
    path = Path(path)
    proto = _parse(path)
    known_versions(proto, path)
    data_files = _external_files(proto, path)
    shapes = check_and_infer(proto, path)
    model = from_proto(proto, str(path))
    _place(model, path)
    return ModelFile(path, model, shapes, data_files)


def from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    """``proto`` as onnx-ir has it.

    Raises:
        InvalidModelError: It holds something that onnx-ir does not know, such as sparse tensors.
    """
    try:
        return ir.from_proto(proto)
    except Exception as error:
        cause = error.__cause__ or error
        met = f"onnx-ir can't take it: {cause}"
        todo = "export it without sparse tensors or types that are newer than onnx-ir"
        raise InvalidModelError(met, file=name, todo=todo) from error


# ---- from bytes to a small proto ----


def _parse(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ReadError("it is empty", file=str(path), todo="export the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                skeleton = _skeleton(buffer)
        proto = onnx.ModelProto()
        proto.ParseFromString(skeleton)
    except OSError as error:
        raise ReadError(_os_error(path, error), file=str(path), todo="check the path") from error
    except (wire.WireError, DecodeError) as error:
        raise _not_a_model(path, error) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _not_a_model(path, None)
    return proto


def _os_error(path: Path, error: OSError) -> str:
    if path.is_dir():
        return "it is a directory, not an ONNX file"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"it can't be read: {error.strerror or error}"


_MAGIC = {
    b"\x89PNG": "a PNG image", b"PK\x03\x04": "a zip archive, such as torch.save makes",
    b"\x80\x02": "a Python pickle", b"\x1f\x8b": "a gzip file", b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF file", b"\x7fELF": "a program", b"TFL3": "a TensorFlow Lite model",
    b"\xff\xd8\xff": "a JPEG image", b"ORTM": "an ONNX Runtime (ORT format) model",
}  # fmt: skip


def _not_a_model(path: Path, error: Exception | None) -> ReadError:
    with path.open("rb") as file:
        head = file.read(512)
    found = next((text for magic, text in _MAGIC.items() if magic in (head[:4], head[:2],
                  head[:3], head[4:8])), "")  # fmt: skip
    if not found and head[8:10] == b'{"':
        found = "a safetensors file"
    if not found and head.isascii() and head.decode("ascii").isprintable() | (b"\n" in head):
        found = "a text file"
    # An ONNX file starts with its IR version, as field 1; then only its end can be missing.
    cut = isinstance(error, wire.WireError) and error.truncated and head[:1] == b"\x08"
    if cut and not found:
        met, todo = "it is truncated", "copy or export it again"
    else:
        met = f"it is not an ONNX model{f' but {found}' if found else ''}"
        todo = "give a file that torch.onnx.export or another exporter wrote"
    return ReadError(met, file=str(path), todo=todo)


def _skeleton(buffer: mmap.mmap) -> bytes:
    """The model with every large initializer as a reference into its own file."""
    pieces = []
    for field in wire.fields(buffer, 0, len(buffer)):
        if field.number == wire.MODEL_GRAPH and field.is_message:
            pieces.append(wire.message(wire.MODEL_GRAPH, _graph(buffer, field)))
        else:
            pieces.append(buffer[field.start : field.end])
    return b"".join(pieces)


def _graph(buffer: mmap.mmap, graph: wire.Field) -> bytes:
    pieces = []
    for field in wire.fields(buffer, graph.value, graph.end):
        large = field.end - field.value >= LARGE_BYTES
        if field.number == wire.GRAPH_INITIALIZER and field.is_message and large:
            pieces.append(wire.message(wire.GRAPH_INITIALIZER, _tensor(buffer, field)))
        else:
            pieces.append(buffer[field.start : field.end])
    return b"".join(pieces)


def _tensor(buffer: mmap.mmap, tensor: wire.Field) -> bytes:
    found = list(wire.fields(buffer, tensor.value, tensor.end))
    raw = [field for field in found if field.number == wire.TENSOR_RAW_DATA]
    if len(raw) != 1 or raw[0].end - raw[0].value < LARGE_BYTES:
        return buffer[tensor.value : tensor.end]
    pieces = [buffer[f.start : f.end] for f in found if f.number != wire.TENSOR_RAW_DATA]
    entries = {"location": _OWN_FILE, "offset": raw[0].value, "length": raw[0].end - raw[0].value}
    for key, value in entries.items():
        entry = onnx.StringStringEntryProto(key=key, value=str(value))
        pieces.append(wire.message(wire.TENSOR_EXTERNAL_DATA, entry.SerializeToString()))
    pieces.append(wire.enum(wire.TENSOR_DATA_LOCATION, onnx.TensorProto.EXTERNAL))
    return b"".join(pieces)


def _place(model: ir.Model, path: Path) -> None:
    """Say of every external tensor where its file is."""
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.location == _OWN_FILE:
                # The model's own file needs no guard against leaving its folder.
                value.const_value = ir.ExternalTensor(
                    path.absolute(), tensor.offset, tensor.length, tensor.dtype,
                    shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string,
                    metadata_props=tensor.metadata_props,
                )  # fmt: skip
            else:
                tensor.base_dir = path.absolute().parent
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.ExternalTensor):
                    attribute.value.base_dir = path.absolute().parent


# ---- external data ----


def _external_files(proto: onnx.ModelProto, path: Path) -> frozenset[Path]:
    """The files that hold the model's external data, each checked to be there and long enough."""
    folder = path.absolute().parent
    files = set()
    for tensor in _external_tensors(proto):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        files.add(_external_file(tensor, entries, folder, path))
    return frozenset(files)


def _external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    graphs, found = [proto.graph], []
    nodes = [node for function in proto.functions for node in function.node]
    while graphs:
        graph = graphs.pop()
        found.extend(graph.initializer)
        nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop().attribute:
                found.extend([attribute.t, *attribute.tensors])
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)
    external = [t for t in found if t.data_location == onnx.TensorProto.EXTERNAL]
    return [t for t in external if not any(e.value == _OWN_FILE for e in t.external_data)]


def _external_file(
    tensor: onnx.TensorProto, entries: dict[str, str], folder: Path, path: Path
) -> Path:
    location = entries.get("location", "")
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or folder.resolve() not in target.parents:
        met = f"the external data of tensor '{tensor.name}' points outside its folder: '{location}'"
        raise InvalidModelError(met, file=str(path), todo="put the data beside the model")
    if not target.is_file():
        met = f"the external data of tensor '{tensor.name}' is missing: {folder / location}"
        raise ReadError(met, file=str(path), todo="copy the data file beside the model")
    try:
        offset, stated = int(entries.get("offset", 0)), entries.get("length")
        length = int(stated) if stated is not None else 0
    except ValueError as error:
        met = f"the external data of tensor '{tensor.name}' has no number as offset or length"
        raise InvalidModelError(met, file=str(path), todo="export the model again") from error
    if offset + length > target.stat().st_size:
        met = (f"the external data of tensor '{tensor.name}' ends at byte {offset + length}, "
               f"its file {target.name} at byte {target.stat().st_size}")  # fmt: skip
        raise ReadError(met, file=str(path), todo="copy the data file again")
    return target
